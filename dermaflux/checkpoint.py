"""What a checkpoint folder says of itself, read from its JSON files without torch.

A checkpoint is what `FluxPipeline.save_pretrained` writes, and may have `classifier/` (timm's
layout) and `provenance.json`. Where the latter is absent, as in FLUX.1 as downloaded, defaults come
from the model: with guidance it is a "dev", without it a "schnell".

    >>> Checkpoint.open("models/mini").defaults
    Defaults(steps=20, guidance=3.5, height=128, width=128)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dermaflux.bundle import ClassifierSpec, Defaults, Limits, ModelSpec, sha256
from dermaflux.errors import BundleError
from dermaflux.strict import read

UNKNOWN_LICENCE: Final = "unknown: see the checkpoint's own licence"
INTAKE: Final = "classifier/intake.json"
STATISTICS: Final = "classifier/intake.npz"
"""The classifier's gate: limits and rates of errors, and the statistics that it compares with."""
MAX_STEPS: Final = 100
"""Schedules beyond 50 steps change no pixel that anybody sees; twice that is a generous end."""
MAX_BATCH: Final = 8
"""Batching stops paying long before on a CPU; a bundle for a large GPU may say more."""


@dataclass(frozen=True)
class Told:
    """`defaults` of `provenance.json`: each may be left out."""

    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    text_length: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The settings of an opened checkpoint, in the forms that a bundle keeps them in."""

    path: Path
    model: ModelSpec
    scheduler: Mapping[str, Any]
    defaults: Defaults
    limits: Limits
    classifier: ClassifierSpec | None
    provenance: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read the folder's JSON files; weights are not touched.

        Raises:
            BundleError: it is no Flux checkpoint, or a file is missing or lacks a key.
        """
        folder = Path(path)
        index = _load(folder, "model_index.json")
        if index.get("_class_name") != "FluxPipeline":
            raise BundleError(
                f"{folder} holds a {index.get('_class_name')}, not a FluxPipeline; use a folder "
                "that FluxPipeline.save_pretrained wrote"
            )
        transformer = _load(folder, "transformer/config.json")
        guided = bool(transformer.get("guidance_embeds", False))
        provenance = _provenance(folder)
        told = read(Told, provenance.get("defaults", {}), "provenance.json: defaults")
        vae = _load(folder, "vae/config.json")
        scale = 2 ** (len(_key(vae, "block_out_channels", "vae/config.json")) - 1)
        defaults = _defaults(told, guided)
        return cls(
            path=folder,
            model=ModelSpec(
                latent_channels=_key(transformer, "in_channels", "transformer/config.json") // 4,
                scale=scale,
                scaling_factor=float(_key(vae, "scaling_factor", "vae/config.json")),
                shift_factor=float(vae.get("shift_factor") or 0.0),
                text_length=told.text_length or (512 if guided else 256),
                clip_length=_clip_length(folder),
                guidance_embeds=guided,
            ),
            scheduler=_load(folder, "scheduler/scheduler_config.json"),
            defaults=defaults,
            limits=_limits(defaults, 2 * scale),
            classifier=classifier_spec(folder),
            provenance=provenance,
        )


def _provenance(folder: Path) -> Mapping[str, Any]:
    if (folder / "provenance.json").is_file():
        provenance = _load(folder, "provenance.json")
        _key(provenance, "name", "provenance.json")
        return provenance
    name = folder.resolve().name
    return {
        "name": name,
        "base": name,
        "created": None,
        "wording": None,
        "ingredients": [],
        "licence": UNKNOWN_LICENCE,
        "training": {},
    }


def _defaults(told: Told, guided: bool) -> Defaults:
    """The model cards' settings: 28 steps and guidance 3.5 for dev, 4 steps for schnell."""
    guidance = 3.5 if told.guidance is None else told.guidance
    return Defaults(
        steps=told.steps or (28 if guided else 4),
        guidance=guidance if guided else None,
        height=told.height or 1024,
        width=told.width or 1024,
    )


def _limits(defaults: Defaults, token: int) -> Limits:
    """Half to twice the size that the model was made for: beyond, images fall apart."""
    smallest, largest = sorted((defaults.height, defaults.width))
    return Limits(
        min_size=max(token, smallest // 2 // token * token),
        max_size=2 * largest // token * token,
        size_multiple=token,
        max_steps=MAX_STEPS,
        max_batch=MAX_BATCH,
    )


def _clip_length(folder: Path) -> int:
    """diffusers pads CLIP to the tokenizer's `model_max_length`; CLIP cannot read further."""
    positions = _load(folder, "text_encoder/config.json").get("max_position_embeddings", 77)
    told = _load(folder, "tokenizer/tokenizer_config.json").get("model_max_length", positions)
    return int(min(told, positions))


def classifier_spec(folder: Path, *, gate: bool = True) -> ClassifierSpec | None:
    """The classifier of a checkpoint's folder, None where it has none; its gate's limits too, if
    there are any and `gate` asks for them.

    Raises:
        BundleError: a file lacks a key, or the gate was fitted to other weights.
    """
    if not (folder / "classifier").is_dir():
        return None
    where = "classifier/config.json"
    config = _load(folder, where)
    data = _key(config, "pretrained_cfg", where)
    reading = _key(config, "dermaflux", where)
    if data.get("crop_mode", "center") != "center":
        raise BundleError(f"{where}: crop_mode {data['crop_mode']!r} is not supported; use center")
    values = {
        "classes": _key(config, "label_names", where),
        **{
            name: _key(data, name, f"{where}: pretrained_cfg")
            for name in ("input_size", "mean", "std", "interpolation", "crop_pct")
        },
        **{
            name: _key(reading, name, f"{where}: dermaflux")
            for name in ("temperature", "threshold", "abstain")
        },
        "intake": _intake(folder) if gate else None,
    }
    return read(ClassifierSpec, values, where)


def _intake(folder: Path) -> Mapping[str, Any] | None:
    if not (folder / INTAKE).is_file():
        return None
    content = _load(folder, INTAKE)
    # Another classifier has other features: what is usual for one is not for the other.
    if _key(content, "weights", INTAKE) != sha256(folder / "classifier/model.safetensors"):
        raise BundleError(
            f"{folder / INTAKE} was fitted to other weights than classifier/model.safetensors; "
            f"fit it again (python -m training.intake {folder / 'classifier'} --data DATASET), or "
            "remove it to do without a gate"
        )
    limits = _key(content, "limits", INTAKE)
    if not isinstance(limits, dict):
        raise BundleError(f"{INTAKE}.limits needs an object")
    return {"file": STATISTICS, **limits}


def _load(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a checkpoint: it has no {name}") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder / name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{folder / name} needs a JSON object")
    return content


def _key(content: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in content:
        raise BundleError(f"{where} has no key {name!r}")
    return content[name]
