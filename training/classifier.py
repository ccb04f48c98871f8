"""The classifier as a folder: timm's `config.json` and `model.safetensors`, calibration included.

`build` makes the model of a recipe, `save` and `load` write and read the folder that the export
and timm read too, `logits_of` and `features_of` run it over pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dermaflux import files
from dermaflux.prompt import LABELS
from training import data
from training.recipe import Recipe as Recipe
from training.states import History

_MEAN = _STD = (0.5, 0.5, 0.5)


def build(recipe: Recipe) -> nn.Module:
    """The timm model of a recipe with fresh weights and two classes."""
    model: nn.Module = timm.create_model(
        recipe.architecture, num_classes=len(LABELS), **recipe.model_args
    )
    return model


def normalized(images: Tensor) -> Tensor:
    """[N, 3, H, W] in 0..1 -> what the network takes."""
    mean = torch.tensor(_MEAN)[:, None, None]
    std = torch.tensor(_STD)[:, None, None]
    return (images - mean) / std


@torch.no_grad()
def _over(
    images: NDArray[np.uint8], run: Callable[[Tensor], Tensor], batch: int = 64
) -> NDArray[np.float64]:
    rows = [
        run(normalized(torch.from_numpy(images[i : i + batch]).permute(0, 3, 1, 2).float() / 255))
        for i in range(0, len(images), batch)
    ]
    return torch.cat(rows).double().numpy()


def logits_of(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[N, S, S, 3] uint8 -> logits [N, 2]."""
    return _over(images, model)


def features_of(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[N, S, S, 3] uint8 -> what the model's last layer sees, [N, D]."""

    def penultimate(batch: Tensor) -> Tensor:
        tokens = model.forward_features(batch)  # type: ignore[operator]
        found: Tensor = model.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
        return found

    return _over(images, penultimate)


def shift_logit(model: nn.Module, shift: float) -> None:
    """Add to the malignant class's logit, in the bias of the model's last layer."""
    with torch.no_grad():
        model.get_classifier().bias[LABELS.index("malignant")] += shift  # type: ignore[operator]


def as_shipped(model: nn.Module) -> None:
    """Round the weights to float16 and back: what is scored is what `save` writes."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(value.half())


def save(
    model: nn.Module, recipe: Recipe, calibration: dict[str, Any], figures: dict[str, Any],
    history: History, out: Path,
) -> None:  # fmt: skip
    """Write `config.json`, `model.safetensors` (float16) and, last, `report.json` into `out`.

    Each is there whole or not at all, and without a report the folder is not complete.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").unlink(missing_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / "model.part", metadata={"format": "pt"})
    config = {
        "architecture": recipe.architecture,
        "num_classes": len(LABELS),
        "num_features": model.num_features,
        "global_pool": "token",
        "model_args": {k: v for k, v in recipe.model_args.items() if k != "drop_path_rate"},
        "label_names": list(LABELS),
        "pretrained_cfg": {
            "input_size": [3, recipe.size, recipe.size],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(_MEAN),
            "std": list(_STD),
            "num_classes": len(LABELS),
            "classifier": "head",
            "first_conv": "patch_embed.proj",
        },
        "dermaflux": {name: calibration[name] for name in ("temperature", "threshold", "abstain")},
    }
    described = history.document()
    document = {"recipe": asdict(recipe), "saw": described["saw"],
                "started_from": described["started_from"], "calibration": calibration,
                "test": figures}  # fmt: skip
    files.write(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    (out / "model.part").chmod(0o644)  # safetensors makes its files their owner's alone
    (out / "model.part").replace(out / "model.safetensors")
    files.write(out / "report.json", (json.dumps(document, indent=2) + "\n").encode())


def load(folder: Path) -> nn.Module:
    """The model that `save` wrote, in float32 and in eval mode.

    Raises:
        DatasetError: the folder holds no such model.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        model: nn.Module = timm.create_model(
            config["architecture"], num_classes=config["num_classes"], **config["model_args"]
        )
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        AttributeError,
        SafetensorError,
    ) as error:
        raise data.DatasetError(
            f"{folder} holds no classifier that can be read ({error}); "
            f"make one with: python -m training.vit --data DATASET --out {folder}"
        ) from error
    return model.eval()
