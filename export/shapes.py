"""Tensors of every part: their names, which of their axes are free, and arrays of a given size.

The names are Optimum's. Free are batch, image tokens, and latent or pixel height and width; text
length is not: Flux does not mask its text, so another length is another image.

    >>> examples(checkpoint, "vae_decoder", Size(batch=2, height=64, width=96))
    {'latent_sample': float32 [2, 16, 8, 12]}
    >>> describe(graph.input[0])
    Tensor(name='latent_sample', dtype='float32', shape=('batch', 16, 'latent_height', ...))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from dermaflux import flow
from dermaflux.bundle import Tensor
from dermaflux.checkpoint import Checkpoint

Arrays = Mapping[str, NDArray[Any]]

AXES: Final[Mapping[str, Mapping[int, str]]] = {
    "input_ids": {0: "batch"},
    "pooler_output": {0: "batch"},
    "last_hidden_state": {0: "batch"},
    "hidden_states": {0: "batch", 1: "image_tokens"},
    "encoder_hidden_states": {0: "batch"},
    "pooled_projections": {0: "batch"},
    "timestep": {0: "batch"},
    "img_ids": {0: "image_tokens"},
    "txt_ids": {},
    "guidance": {0: "batch"},
    "out_hidden_states": {0: "batch", 1: "image_tokens"},
    "latent_sample": {0: "batch", 2: "latent_height", 3: "latent_width"},
    "sample": {0: "batch", 2: "height", 3: "width"},
    "latent_parameters": {0: "batch", 2: "latent_height", 3: "latent_width"},
    "pixel_values": {0: "batch"},
    "logits": {0: "batch"},
    "features": {0: "batch"},
    "saliency": {0: "batch"},
}
"""Tensor name -> its free axes. A name means the same in every part that has it."""


@dataclass(frozen=True)
class Size:
    """How large example arrays are; height and width are of the image, in pixels."""

    batch: int
    height: int
    width: int


def describe(value: onnx.ValueInfoProto) -> Tensor:
    """The entry of `bundle.json` for an input or output of a graph."""
    kind = value.type.tensor_type
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return Tensor(
        value.name, dtype, tuple(axis.dim_param or axis.dim_value for axis in kind.shape.dim)
    )


def sizes(checkpoint: Checkpoint) -> tuple[Size, ...]:
    """Sizes at which parts are compared: the default, the smallest and both kinds of oblong, at
    batches of 1 to 3."""
    default, limits = checkpoint.defaults, checkpoint.limits
    middle = (default.height + limits.min_size) // 2 // limits.size_multiple * limits.size_multiple
    return (
        Size(1, default.height, default.width),
        Size(2, limits.min_size, default.width),
        Size(3, middle, limits.min_size),
    )


def examples(checkpoint: Checkpoint, part: str, size: Size, seed: int = 0) -> Arrays:
    """Random inputs of a part: normal numbers, token ids of its vocabulary, real positions."""
    random = np.random.default_rng(seed)
    model = checkpoint.model
    channels, h, w = flow.latent_shape(size.height, size.width, model.latent_channels, model.scale)

    def normal(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal((size.batch, *shape), dtype=np.float32)

    def words(folder: str, length: int) -> Arrays:
        vocabulary = _config(checkpoint, folder)["vocab_size"]
        return {"input_ids": random.integers(0, vocabulary, (size.batch, length))}

    match part:
        case "text_encoder":
            return words(part, model.clip_length)
        case "text_encoder_2":
            return words(part, model.text_length)
        case "vae_decoder":
            return {"latent_sample": normal(channels, h, w)}
        case "vae_encoder":
            return {"sample": normal(3, h * model.scale, w * model.scale).clip(-1, 1)}
        case "classifier":
            assert checkpoint.classifier is not None
            return {"pixel_values": normal(*checkpoint.classifier.input_size)}
    config = _config(checkpoint, part)
    tokens = {
        "hidden_states": normal(h * w // 4, config["in_channels"]),
        "encoder_hidden_states": normal(model.text_length, config["joint_attention_dim"]),
        "pooled_projections": normal(config["pooled_projection_dim"]),
        # Items of one batch may stand at different steps.
        "timestep": np.linspace(1, 0.1, size.batch, dtype=np.float32),
        "img_ids": flow.image_ids(h, w),
        "txt_ids": flow.text_ids(model.text_length),
    }
    if model.guidance_embeds:
        guidance = checkpoint.defaults.guidance
        return {**tokens, "guidance": np.full(size.batch, guidance, dtype=np.float32)}
    return tokens


def _config(checkpoint: Checkpoint, folder: str) -> Mapping[str, Any]:
    content = json.loads((checkpoint.path / folder / "config.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content
