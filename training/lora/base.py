"""The model that is adapted: its parts, opened from local safetensors alone, one at a time.

A diffusers folder holds everything. BFL's single file (`flux1-dev.safetensors`) holds the
transformer, and `--encoders` names a diffusers folder with the rest.

    >>> base = Base.open(settings)
    >>> base.checkpoint.model.text_length
    512
    >>> transformer = base.transformer(torch.bfloat16)
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from dermaflux import files
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import eager, parts
from dermaflux.errors import BundleError
from training.lora import bfl
from training.lora.settings import Settings, SettingsError

DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Base:
    """Where the parts are. `single` is BFL's file, or None for a diffusers folder."""

    checkpoint: Checkpoint
    single: Path | None = None

    @classmethod
    def open(cls, settings: Settings) -> Base:
        """Read the configuration; weights are not touched.

        Raises:
            SettingsError: a single file without its other parts, or parts given twice; or 4 bits
                of a single file, or without their package.
            BundleError: the folder is no Flux checkpoint.
        """
        if settings.base_dtype == "4bit":
            if settings.base.is_file():
                raise SettingsError("--base-dtype 4bit needs a diffusers folder, not a single file")
            _require_bitsandbytes()
        if settings.base.is_dir():
            if settings.encoders is not None:
                raise SettingsError(
                    f"--encoders goes with a single file; {settings.base} is a folder that has "
                    "its own"
                )
            return cls(Checkpoint.open(settings.base))
        if not settings.base.is_file() or settings.base.suffix != ".safetensors":
            raise SettingsError(
                f"the base {settings.base} is neither a diffusers folder nor a .safetensors file"
            )
        if settings.encoders is None:
            raise SettingsError(
                f"{settings.base} holds the transformer alone; name a diffusers folder with the "
                "text encoders, the VAE and transformer/config.json as --encoders"
            )
        return cls(Checkpoint.open(settings.encoders), settings.base)

    @property
    def name(self) -> str:
        """As provenance has it; for a single file, its stem."""
        return self.single.stem if self.single else str(self.checkpoint.provenance["name"])

    @property
    def licence(self) -> str:
        """As the checkpoint states it; empty where it does not."""
        return str(self.checkpoint.provenance.get("licence", ""))

    def transformer(self, dtype: torch.dtype, *, four_bits: bool = False) -> Any:
        """The transformer on the CPU, frozen; with `four_bits`, where bitsandbytes puts it.

        Raises:
            EngineError, BundleError: its weights are not there or do not fit.
            SettingsError: bitsandbytes is not installed.
        """
        if self.single is not None:
            config = self.checkpoint.path / "transformer" / "config.json"
            return bfl.transformer(self.single, config, dtype)
        if four_bits:
            return _in_four_bits(self.checkpoint.path / "transformer")
        opened: Any = parts.module(self.checkpoint.path, "transformer", dtype)
        return opened.model

    def part(self, name: str, dtype: torch.dtype) -> nn.Module:
        """text_encoder, text_encoder_2, vae_encoder or vae_decoder; see `dermaflux.engines.eager`.

        Raises:
            EngineError: its weights are not there or do not fit.
        """
        return parts.module(self.checkpoint.path, name, dtype)

    def weights(self, part: str) -> list[Path]:
        """The files of a part (`vae`, `transformer`, `text_encoder`, ...), sorted.

        Raises:
            BundleError: there is none.
        """
        if part == "transformer" and self.single is not None:
            return [self.single]
        folder = self.checkpoint.path / part
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise BundleError(f"{folder} has no .safetensors{parts.pickled(folder)}")
        return found

    def digest(self, part: str, memory: Path) -> str:
        """sha256 over a part's files, hex. What was hashed is remembered in the file `memory`
        (by path, size and time of change), for 24 GB take half a minute.

        Raises:
            BundleError: the part has no weights.
        """
        known: dict[str, str] = {}
        if memory.is_file():
            try:
                known = dict(json.loads(memory.read_text(encoding="utf-8")))
            except ValueError:
                known = {}
        total, before = hashlib.sha256(), dict(known)
        for file in self.weights(part):
            at = file.stat()
            key = f"{file.resolve()} {at.st_size} {at.st_mtime_ns}"
            if key not in known:
                with file.open("rb") as stream:
                    known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(known[key].encode())
        if known != before:
            memory.parent.mkdir(parents=True, exist_ok=True)
            files.write(memory, json.dumps(known, indent=1).encode())
        return total.hexdigest()


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SettingsError("--base-dtype 4bit needs bitsandbytes; pip install bitsandbytes")


def _in_four_bits(folder: Path) -> Any:
    """NF4 with doubly quantized scales, computing in bf16 (Dettmers et al., arXiv 2305.14314)."""
    _require_bitsandbytes()
    from diffusers import BitsAndBytesConfig, FluxTransformer2DModel

    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return FluxTransformer2DModel.from_pretrained(
        folder, quantization_config=wanted, dtype=torch.bfloat16, use_safetensors=True,
        local_files_only=True,
    ).requires_grad_(False)  # fmt: skip


class Writer(nn.Module):
    """Both text encoders over texts: hidden [B, text length, D], pooled [B, P]."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        super().__init__()
        self.text_encoder = base.part("text_encoder", dtype)
        self.text_encoder_2 = base.part("text_encoder_2", dtype)
        self._tokens = eager.tokenizers(base.checkpoint)

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        device = next(self.parameters()).device
        clip = torch.from_numpy(self._tokens["tokenizer"].ids(texts)).to(device)
        t5 = torch.from_numpy(self._tokens["tokenizer_2"].ids(texts)).to(device)
        return self.text_encoder_2(t5)[0], self.text_encoder(clip)[0]

    def counts(self, text: str) -> tuple[int, int]:
        """Tokens of a text for CLIP and for T5, before anything is cut."""
        return self._tokens["tokenizer"].count(text), self._tokens["tokenizer_2"].count(text)
