"""PyTorch as it is: the reference that every other engine is compared with.

Opens parts of a checkpoint (not of a bundle) behind the tensor names of a bundle's graphs. The one
module of the runtime that imports torch, so nothing imports it until it was asked for.

    >>> load(Path("models/mini"), "transformer").run({"hidden_states": tokens, ...})
    >>> load(Path("models/mini"), "transformer", compile=True)      # torch.compile
    >>> module(Path("models/mini"), "transformer")                  # the part, ready to be traced
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import EAGER, Array, Arrays
from dermaflux.errors import EngineError
from dermaflux.tokens import Tokens

PRECISIONS: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


class TextEncoder(nn.Module):
    """CLIP: input_ids [B, T] -> pooler_output [B, P], last_hidden_state [B, T, P]."""

    inputs = ("input_ids",)
    outputs = ("pooler_output", "last_hidden_state")

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        from transformers import CLIPTextModel

        super().__init__()
        self.model = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=dtype)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(input_ids)
        return output.pooler_output, output.last_hidden_state


class TextEncoder2(nn.Module):
    """T5: input_ids [B, T] -> last_hidden_state [B, T, D]."""

    inputs = ("input_ids",)
    outputs = ("last_hidden_state",)

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        from transformers import T5EncoderModel

        super().__init__()
        self.model = T5EncoderModel.from_pretrained(checkpoint / "text_encoder_2", dtype=dtype)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.model(input_ids).last_hidden_state,)


class Transformer(nn.Module):
    """Flux: tokens [B, N, 4C], text, timestep [B] (0..1), ids, guidance [B] -> velocity."""

    inputs: tuple[str, ...] = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "img_ids",
        "txt_ids",
        "guidance",
    )
    outputs = ("out_hidden_states",)

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        from diffusers import FluxTransformer2DModel

        super().__init__()
        self.model = FluxTransformer2DModel.from_pretrained(checkpoint / "transformer", dtype=dtype)
        if not self.model.config.guidance_embeds:
            self.inputs = self.inputs[:-1]

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        (velocity,) = self.model(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            return_dict=False,
        )
        return (velocity,)


class VaeDecoder(nn.Module):
    """latent_sample [B, C, h, w] (scaled and shifted) -> sample [B, 3, H, W] (-1..1)."""

    inputs = ("latent_sample",)
    outputs = ("sample",)

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self.model: Any = _vae(checkpoint, dtype)

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (sample,) = self.model.decode(latent_sample, return_dict=False)
        return (sample,)


class VaeEncoder(nn.Module):
    """sample [B, 3, H, W] (-1..1) -> latent_parameters [B, 2C, h, w]: means, log variances."""

    inputs = ("sample",)
    outputs = ("latent_parameters",)

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self.model: Any = _vae(checkpoint, dtype)

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.model.encode(sample).latent_dist.parameters,)


class Classifier(nn.Module):
    """timm: pixel_values [B, 3, H, W] (normalised) -> logits [B, classes], features [B, F]."""

    inputs = ("pixel_values",)
    outputs = ("logits", "features")

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        import timm
        from safetensors.torch import load_file

        super().__init__()
        folder = checkpoint / "classifier"
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.model = timm.create_model(
            config["architecture"],
            pretrained=False,
            num_classes=config["num_classes"],
            **config.get("model_args", {}),
        )
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        self.model.to(dtype)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = self.model.forward_features(pixel_values)
        features = self.model.forward_head(tokens, pre_logits=True)
        return self.model.get_classifier()(features), features


_PARTS: Final[Mapping[str, type[nn.Module]]] = {
    "text_encoder": TextEncoder,
    "text_encoder_2": TextEncoder2,
    "transformer": Transformer,
    "vae_decoder": VaeDecoder,
    "vae_encoder": VaeEncoder,
    "classifier": Classifier,
}


def module(checkpoint: Path, part: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A part of a checkpoint as a module: `forward` takes tensors in the order of `.inputs` and
    gives a tuple in the order of `.outputs`. In evaluation mode, without gradients.

    Raises:
        EngineError: the part's weights are not there or do not fit its config.
    """
    try:
        return _PARTS[part](checkpoint, dtype).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineError(f"{part} of {checkpoint} cannot be opened: {error}") from error


@dataclass(frozen=True)
class EagerEngine:
    """A part of a checkpoint in torch. Calls from several threads take turns."""

    model: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: str
    dtype: torch.dtype
    device: torch.device
    lock: threading.Lock
    name: str = EAGER

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`."""
        return self.bind({})(inputs)

    def bind(self, constant: Arrays) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`: constant inputs move to the device once."""
        held = {name: self._tensor(value) for name, value in constant.items()}

        def step(varying: Arrays) -> dict[str, Array]:
            given = {**held, **{name: self._tensor(value) for name, value in varying.items()}}
            if given.keys() != set(self.inputs):
                raise EngineError(f"the part takes {sorted(self.inputs)}, not {sorted(given)}")
            with self.lock, torch.inference_mode():
                results = self.model(*(given[name] for name in self.inputs))
            arrays = (result.float().cpu().numpy() for result in results)
            return dict(zip(self.outputs, arrays, strict=True))

        return step

    def _tensor(self, value: Array) -> torch.Tensor:
        tensor = torch.from_numpy(value.copy()).to(self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def load(
    checkpoint: Path,
    part: str,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    compile: bool = False,
    threads: int | None = None,
) -> EagerEngine:
    """The engine of a part; `compile` puts torch.compile around it, which pays after minutes.

    `threads` is torch's number for the whole process: torch has no other.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    part_module: Any = module(checkpoint, part, dtype).to(device)
    return EagerEngine(
        model=torch.compile(part_module) if compile else part_module,
        inputs=part_module.inputs,
        outputs=part_module.outputs,
        precision=PRECISIONS[dtype],
        dtype=dtype,
        device=torch.device(device),
        lock=threading.Lock(),
    )


def tokenizers(checkpoint: Checkpoint) -> dict[str, Tokens]:
    """The tokenizers of a checkpoint at its lengths, as transformers makes them.

    A downloaded FLUX.1 has no `tokenizer.json` for CLIP, and none that pads.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    made: dict[str, Tokens] = {}
    lengths = (checkpoint.model.clip_length, checkpoint.model.text_length)
    for name, length in zip(("tokenizer", "tokenizer_2"), lengths, strict=True):
        source = AutoTokenizer.from_pretrained(checkpoint.path / name)
        tokenizer = Tokenizer.from_str(source.backend_tokenizer.to_str())
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(
            length=length, pad_id=source.pad_token_id, pad_token=source.pad_token
        )
        made[name] = Tokens(tokenizer, length, f"{name}/")
    return made


def _vae(checkpoint: Path, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(checkpoint / "vae", dtype=dtype)
