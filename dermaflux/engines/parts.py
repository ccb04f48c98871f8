"""The parts of a checkpoint as torch modules, under the tensor names of a bundle's graphs.

What `dermaflux.engines.eager` runs and what an export traces. Weights come from safetensors on the
local disk, and from nowhere else.

    >>> module(Path("models/mini"), "transformer")                  # ready to be run or traced
    >>> module(Path("models/mini"), "transformer", weights=False)   # its shape alone
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from dermaflux.errors import EngineError

PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack")
"""Files of weights that run whatever code they hold when they are opened."""
_FROM_DISK: Final = {"use_safetensors": True, "local_files_only": True}
"""Without the first, a pickle is opened where there is nothing else; without the second, the
network is asked for what is missing."""


class TextEncoder(nn.Module):
    """CLIP: input_ids [B, T] -> pooler_output [B, P], last_hidden_state [B, T, P]."""

    inputs = ("input_ids",)
    outputs = ("pooler_output", "last_hidden_state")

    def __init__(self, checkpoint: Path, dtype: torch.dtype, weights: bool = True) -> None:
        from transformers import CLIPTextModel

        super().__init__()
        self.model = _transformers(CLIPTextModel, checkpoint / "text_encoder", dtype, weights)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(input_ids)
        return output.pooler_output, output.last_hidden_state


class TextEncoder2(nn.Module):
    """T5: input_ids [B, T] -> last_hidden_state [B, T, D]."""

    inputs = ("input_ids",)
    outputs = ("last_hidden_state",)

    def __init__(self, checkpoint: Path, dtype: torch.dtype, weights: bool = True) -> None:
        from transformers import T5EncoderModel

        super().__init__()
        self.model = _transformers(T5EncoderModel, checkpoint / "text_encoder_2", dtype, weights)

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

    def __init__(self, checkpoint: Path, dtype: torch.dtype, weights: bool = True) -> None:
        from diffusers import FluxTransformer2DModel

        super().__init__()
        self.model = _diffusers(FluxTransformer2DModel, checkpoint / "transformer", dtype, weights)
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

    def __init__(self, checkpoint: Path, dtype: torch.dtype, weights: bool = True) -> None:
        super().__init__()
        self.model: Any = _vae(checkpoint, dtype, weights)

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (sample,) = self.model.decode(latent_sample, return_dict=False)
        return (sample,)


class VaeEncoder(nn.Module):
    """sample [B, 3, H, W] (-1..1) -> latent_parameters [B, 2C, h, w]: means, log variances."""

    inputs = ("sample",)
    outputs = ("latent_parameters",)

    def __init__(self, checkpoint: Path, dtype: torch.dtype, weights: bool = True) -> None:
        super().__init__()
        self.model: Any = _vae(checkpoint, dtype, weights)

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.model.encode(sample).latent_dist.parameters,)


class Classifier(nn.Module):
    """timm: pixel_values [B, 3, H, W] (normalised) -> logits [B, classes], features [B, F], and
    saliency [B, rows, columns]: how much each patch was looked at, its largest 1.

    A saliency is a vision transformer's attention rolled out over its blocks, heads averaged, the
    residual counted half. Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers
    (2020). It tells where the model looked, not why. A model of another kind has none.
    """

    inputs = ("pixel_values",)
    outputs: tuple[str, ...] = ("logits", "features", "saliency")

    def __init__(self, checkpoint: Path, dtype: torch.dtype, weights: bool = True) -> None:
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
        if weights:
            self.model.load_state_dict(load_file(folder / "model.safetensors"))
        self.model.to(dtype)
        # Not an attribute of tensors: a trace allows a module none that it was not born with.
        mixed: list[torch.Tensor] = []
        self._mixed: Callable[[], list[torch.Tensor]] = lambda: mixed
        # Blocks of nets of convolutions (EfficientNet's) have none, those of others another kind.
        blocks = getattr(self.model, "blocks", ())
        self._attentions: list[Any] = [getattr(block, "attn", None) for block in blocks]
        needed = ("qkv", "q_norm", "k_norm")
        if not self._attentions or not all(hasattr(a, n) for a in self._attentions for n in needed):
            self.outputs = self.outputs[:-1]
            return
        for attention in self._attentions:
            attention.qkv.register_forward_hook(lambda _, __, output: mixed.append(output))
        rows, columns = self.model.patch_embed.grid_size
        prefix = self.model.num_prefix_tokens
        start = torch.zeros(1, 1, prefix + rows * columns, dtype=dtype)
        if self.model.global_pool == "token":
            start[..., 0] = 1
        else:
            start[..., prefix:] = 1 / (rows * columns)
        self.register_buffer("start", start, persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self._mixed().clear()
        tokens = self.model.forward_features(pixel_values)
        features = self.model.forward_head(tokens, pre_logits=True)
        head = self.model.get_classifier()
        if isinstance(head, nn.Conv2d):  # a linear layer over one pixel: timm's ResNetV2 and others
            logits = head(features[:, :, None, None]).flatten(1)
        else:
            logits = head(features)
        if "saliency" not in self.outputs:
            return logits, features
        return logits, features, self._saliency()

    def _saliency(self) -> torch.Tensor:
        """From the last block, whose token is read, back to the patches."""
        looked: torch.Tensor = self.get_buffer("start")
        for attention, mixed in zip(self._attentions[::-1], self._mixed()[::-1], strict=True):
            batch, length, _ = mixed.shape
            heads = mixed.reshape(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
            query, key = attention.q_norm(heads[0]), attention.k_norm(heads[1])
            weights = (query @ key.transpose(-2, -1) * attention.scale).softmax(-1).mean(1)
            looked = 0.5 * (looked + looked @ weights)
        patches = looked[:, 0, self.model.num_prefix_tokens :]
        patches = patches / patches.amax(dim=1, keepdim=True)
        return patches.reshape(-1, *self.model.patch_embed.grid_size)


_PARTS: Final[Mapping[str, type[nn.Module]]] = {
    "text_encoder": TextEncoder,
    "text_encoder_2": TextEncoder2,
    "transformer": Transformer,
    "vae_decoder": VaeDecoder,
    "vae_encoder": VaeEncoder,
    "classifier": Classifier,
}


def module(
    checkpoint: Path, part: str, dtype: torch.dtype = torch.float32, *, weights: bool = True
) -> nn.Module:
    """A part of a checkpoint as a module: `forward` takes tensors in the order of `.inputs` and
    gives a tuple in the order of `.outputs`. In evaluation mode, without gradients.

    Without `weights` the files of weights are not opened, and parameters hold anything: on the
    device "meta" such a part takes no memory, and can still be traced.

    Raises:
        EngineError: the part's weights are not there or do not fit its config.
    """
    try:
        return _PARTS[part](checkpoint, dtype, weights).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError) as error:
        refused = pickled(checkpoint / ("vae" if part.startswith("vae_") else part))
        raise EngineError(f"{part} of {checkpoint} cannot be opened: {error}{refused}") from error


def pickled(folder: Path) -> str:
    """For an error on weights that are not there: that they are, as a pickle. Or nothing."""
    names = sorted(file.name for kind in PICKLES for file in folder.glob(kind))
    if not names:
        return ""
    return (
        f" (a pickle, {names[0]}, is there and is refused: opening it runs its code; "
        "save the weights as safetensors)"
    )


def _vae(checkpoint: Path, dtype: torch.dtype, weights: bool) -> Any:
    from diffusers import AutoencoderKL

    return _diffusers(AutoencoderKL, checkpoint / "vae", dtype, weights)


def _diffusers(kind: Any, folder: Path, dtype: torch.dtype, weights: bool) -> Any:
    if weights:
        return kind.from_pretrained(folder, dtype=dtype, **_FROM_DISK)
    with _default(dtype):
        return kind.from_config(kind.load_config(folder))


def _transformers(kind: Any, folder: Path, dtype: torch.dtype, weights: bool) -> Any:
    if weights:
        return kind.from_pretrained(folder, dtype=dtype, **_FROM_DISK)
    with _default(dtype):
        return kind(kind.config_class.from_pretrained(folder))


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Floating-point tensors that are made without a type have this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
