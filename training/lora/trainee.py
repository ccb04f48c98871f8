"""The model in training: a frozen base with LoRA in it, as one module from pictures to velocity.

>>> trainee = Trainee.make(base, settings, device)
>>> trainee(noisy, share, grid=(32, 32), hidden=hidden, pooled=pooled)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dermaflux import flow
from training.lora.attention import Attention, end_early
from training.lora.base import DTYPES, Base, Writer
from training.lora.float8 import Float8Linear
from training.lora.layers import BLOCKS, LoraLinear, inject, targets
from training.lora.settings import Settings

log = logging.getLogger(__name__)

Grid = tuple[int, int]
"""Rows and columns of latent cells."""


class Trainee(nn.Module):
    """The transformer, and the text encoders where they are trained or kept.

    `layers` are the LoRA layers by the adapter's names (`transformer.<layer>`, ...), `dtype` the
    type that activations have.
    """

    def __init__(
        self, transformer: Any, writer: Writer | None, base: Base, guidance: float
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.writer = writer
        self.layers: dict[str, LoraLinear] = {}
        self.dtype: torch.dtype = torch.float32
        self._guidance = guidance if base.checkpoint.model.guidance_embeds else None
        self._text_length = base.checkpoint.model.text_length
        self._positions = _Positions(transformer.pos_embed)
        transformer.pos_embed = self._positions

    @classmethod
    def make(cls, base: Base, settings: Settings, device: torch.device) -> Trainee:
        """Open the base on the CPU and put LoRA into it; `device` is where it will be.

        Raises:
            SettingsError: a pattern matches nothing, or a package is missing (see `Base.open`).
            EngineError, BundleError: weights are not there or do not fit.
        """
        kind = settings.base_dtype
        if kind == "auto":
            kind = "fp32" if device.type == "cpu" else "bf16"
        dtype = DTYPES.get(kind, torch.bfloat16 if device.type != "cpu" else torch.float32)
        transformer = base.transformer(dtype, four_bits=kind == "4bit")
        wanted = targets(transformer, settings.targets)
        seeds = (settings.rank, settings.alpha, settings.seed)
        layers = {
            f"transformer.{name}": layer
            for name, layer in inject(transformer, wanted, *seeds).items()
        }
        if kind == "fp8":
            _shrink(transformer)
        writer = None
        if settings.text_encoders or settings.keep_encoders:
            writer = Writer(base, dtype)
            for part in settings.text_encoders:
                model = writer.get_submodule(part).get_submodule("model")
                found = inject(model, targets(model, ("*",), ("",)), *seeds)
                layers |= {f"{part}.{name}": layer for name, layer in found.items()}
        trainee = cls(transformer, writer, base, settings.guidance)
        trainee.layers, trainee.dtype = layers, dtype
        transformer.set_attn_processor(Attention())
        end_early(transformer)
        if settings.checkpointing:
            transformer.enable_gradient_checkpointing()
        trainee.eval()
        if settings.compile:
            transformer.compile_repeated_blocks(dynamic=False)
        count = sum(p.numel() for p in trainee.parameters() if p.requires_grad)
        log.info("%d layers adapted, %d weights trained, base in %s", len(layers), count, kind)
        return trainee

    def forward(
        self, noisy: Tensor, share: Tensor, *, grid: Grid, hidden: Tensor | None = None,
        pooled: Tensor | None = None, texts: Sequence[str] = (), guidance: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Noisy tokens [B, T, 4C] and shares [B] -> velocity [B, T, 4C].

        The text is given as embeddings (hidden [B, L, D] and pooled [B, P]) or, where the encoders
        are here, as `texts`. `guidance` is the run's where it is not given.
        """
        if hidden is None or pooled is None:
            assert self.writer is not None
            hidden, pooled = self.writer(texts)
        guidance = self._guidance if guidance is None else guidance
        told = None
        if self._guidance is not None:
            told = torch.full_like(share, guidance or 0.0)
        text_ids, image_ids = self._positions.at(grid, hidden.shape[1], noisy.device)
        (velocity,) = self.transformer(
            hidden_states=noisy.to(self.dtype),
            encoder_hidden_states=hidden.to(self.dtype),
            pooled_projections=pooled.to(self.dtype),
            timestep=share,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=told,
            return_dict=False,
        )
        result: Tensor = velocity
        return result


class _Positions(nn.Module):
    """Rotary tables: those of a grid are computed once, not at every step."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self._known: dict[Any, Any] = {}
        self._key: Any = None

    def at(self, grid: Grid, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The ids of the text and of a picture's tokens, for the next forward."""
        self._key = (grid, length, device)
        if self._key not in self._known:
            # A preview may ask first, and what is made in inference mode cannot be trained on.
            with torch.inference_mode(False), torch.no_grad():
                text = torch.from_numpy(flow.text_ids(length)).to(device)
                image = torch.from_numpy(flow.image_ids(*grid)).to(device)
                tables = self.original(torch.cat([text, image]))
            self._known[self._key] = (text, image, tables)
        text, image, _ = self._known[self._key]
        return text, image

    def forward(self, ids: Tensor) -> Any:
        return self._known[self._key][2]


def _shrink(transformer: nn.Module) -> None:
    """All frozen linear layers of the blocks in float8, in place."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(BLOCKS):
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, Float8Linear.of(module))
