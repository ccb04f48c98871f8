"""A checkpoint whose classifier is of another architecture: to time ViT-B/16, none is trained here.

    python -m benchmarks.classifiers vit_base_patch16_224 --out runs/b16
    python -m export runs/b16 --out bundles/b16 --prompts 8

All but the classifier is linked from another checkpoint. The classifier's weights are random, equal
for an equal seed, and its provenance says so: its time is that of a trained one, its answers are
nothing. timm's own start makes every attention even; here queries and keys are larger, so that some
patches are looked at more than others, as in a trained one, and what prunes by attention has
something to choose from. It has no gate, since features of random weights have no usual values.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dermaflux.command import ended, option, parsed
from dermaflux.errors import BundleError

PEAKED: Final = 2.0
"""Factor on the weights of queries and keys: products of 1.2 in the spread on ViT-B/16 where timm's
start has 0.3."""
_READING: Final = {"temperature": 1.0, "threshold": 0.5, "abstain": [0.5, 0.5]}


@dataclass(frozen=True)
class Settings:
    """Which classifier to make, and what to put it into."""

    architecture: str = option("timm's name of it, such as vit_base_patch16_224")
    out: Path = option("the checkpoint's folder", position=False)
    base: Path = option("checkpoint that lends all else", Path("models/mini"))
    seed: int = option("of the weights; default: 0", 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    settings = parsed(
        Settings, "python -m benchmarks.classifiers", "Make a checkpoint to time.", arguments
    )
    return ended(lambda: print(json.dumps(make(settings)), flush=True))


def make(settings: Settings) -> dict[str, Any]:
    """Write the checkpoint, whole or not at all; what it is.

    Raises:
        BundleError: timm knows no such architecture, `base` is no checkpoint, or `out` exists.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    if settings.architecture not in timm.list_models():
        raise BundleError(
            f"timm has no {settings.architecture!r}; see timm.list_models() for those it has"
        )
    if settings.out.exists():
        raise BundleError(f"{settings.out} is there already; remove it or choose another --out")
    try:
        provenance = json.loads((settings.base / "provenance.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{settings.base} is no checkpoint with a provenance: {error}") from error
    torch.manual_seed(settings.seed)
    model = timm.create_model(settings.architecture, num_classes=2)
    _peak(model)
    words = f"random, seed {settings.seed}, {settings.architecture}: for timing only"
    provenance |= {
        "name": settings.out.resolve().name,
        "base": f"{provenance['name']}, its classifier replaced by {words}",
        "ingredients": [
            {**one, "attribution": words} if one.get("name") == "classifier weights" else one
            for one in provenance.get("ingredients", ())
        ],
    }
    folder = settings.out.with_name(f".{settings.out.name}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True)
        for name in sorted(os.listdir(settings.base)):
            if name not in ("classifier", "provenance.json", "report.json"):
                (folder / name).symlink_to((settings.base / name).resolve())
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", "utf-8")
        (folder / "classifier").mkdir()
        config = _config(settings.architecture, model)
        (folder / "classifier/config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file(model.state_dict(), folder / "classifier/model.safetensors")
        folder.rename(settings.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {
        "path": str(settings.out),
        "architecture": settings.architecture,
        "parameters": count,
        "weights": words,
    }


def _peak(model: Any) -> None:
    """Enlarge queries and keys of a vision transformer, if it is one."""
    for block in getattr(model, "blocks", ()):
        qkv = getattr(getattr(block, "attn", None), "qkv", None)
        if qkv is not None:
            qkv.weight.data[: 2 * qkv.in_features] *= PEAKED


def _config(architecture: str, model: Any) -> dict[str, Any]:
    """As `training.vit` writes it, with timm's own pre-processing for the architecture."""
    read = ("input_size", "interpolation", "crop_pct", "mean", "std")
    return {
        "architecture": architecture,
        "num_classes": 2,
        "num_features": model.num_features,
        "label_names": ["benign", "malignant"],
        "pretrained_cfg": {
            **{name: model.pretrained_cfg[name] for name in read},
            "crop_mode": "center",
            "num_classes": 2,
        },
        "dermaflux": _READING,
    }


if __name__ == "__main__":
    sys.exit(main())
