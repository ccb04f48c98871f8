"""The classifier as a folder: timm's `config.json` and `model.safetensors`, calibration included.

`build` makes the model of a recipe, `save` and `load` write and read the folder that the export
and timm read too, `logits_of` and `features_of` run it over pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
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
from training.data import DatasetError
from training.recipe import Recipe as Recipe
from training.recipe import RecipeError, local
from training.states import History


def build(recipe: Recipe) -> nn.Module:
    """The timm model of a recipe with fresh weights and two classes.

    Raises:
        RecipeError: timm has no such model, or it is not built with these arguments.
    """
    try:
        model: nn.Module = timm.create_model(
            recipe.architecture, num_classes=len(LABELS), **recipe.model_args
        )
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        name = recipe.architecture.split(".")[0]
        like = get_close_matches(name, timm.list_models(), 3)
        hint = f" (timm has {', '.join(like)})" if like and name not in like else ""
        raise RecipeError(
            f"timm cannot build {recipe.architecture}{hint} with --model-args "
            f"{json.dumps(recipe.model_args)}: {' '.join(str(error).split())[:160]}"
        ) from error
    # What the model learns is what the recipe shows it, not what timm's own weights saw.
    model.pretrained_cfg = {  # type: ignore[assignment]
        **model.pretrained_cfg,  # type: ignore[dict-item]
        **_shown(recipe),
    }
    return model


def _shown(recipe: Recipe) -> dict[str, Any]:
    """How pictures are given to the model, in timm's words."""
    return {
        "input_size": [3, recipe.size, recipe.size],
        "interpolation": recipe.interpolation,
        "crop_pct": recipe.crop_pct,
        "crop_mode": "center",
        "mean": list(recipe.mean),
        "std": list(recipe.std),
    }


def normalized(images: Tensor, model: Any) -> Tensor:
    """[N, 3, H, W] in 0..1 -> what the network takes."""
    shown = model.pretrained_cfg
    mean, std = (
        torch.tensor(shown[name], device=images.device)[:, None, None] for name in ("mean", "std")
    )
    return (images - mean) / std


@torch.no_grad()
def _over(
    model: Any, images: NDArray[np.uint8], run: Callable[[Tensor], Tensor], batch: int = 64
) -> NDArray[np.float64]:
    if not len(images):
        return np.zeros((0, len(LABELS)))
    images = _middle(images, int(model.pretrained_cfg["input_size"][1]))
    device = next(model.parameters()).device

    def shares(start: int) -> Tensor:
        chunk = torch.from_numpy(np.ascontiguousarray(images[start : start + batch])).to(device)
        return normalized(chunk.permute(0, 3, 1, 2).float() / 255, model)

    rows = [run(shares(start)).float().cpu() for start in range(0, len(images), batch)]
    return torch.cat(rows).double().numpy()


def _middle(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Of pictures larger than the model takes, the middle, as `dermaflux.classifier` cuts it."""
    start = round((images.shape[1] - size) / 2)
    return images if start <= 0 else images[:, start : start + size, start : start + size]


def logits_of(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[N, S, S, 3] uint8 -> logits [N, 2]; S is `Recipe.whole`, or the model's own size."""
    return _over(model, images, model)


def features_of(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[N, S, S, 3] uint8 -> what the model's last layer sees, [N, D]."""

    def penultimate(batch: Tensor) -> Tensor:
        tokens = model.forward_features(batch)  # type: ignore[operator]
        found: Tensor = model.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
        return found

    return _over(model, images, penultimate)


def shift_logit(model: nn.Module, shift: float) -> None:
    """Add to the malignant class's logit, in the bias of the model's last layer."""
    with torch.no_grad():
        model.get_classifier().bias[LABELS.index("malignant")] += shift  # type: ignore[operator]


def as_shipped(model: nn.Module) -> None:
    """Round the weights to float16 and back: what is scored is what `save` writes.

    Running statistics stay as they are: a variance may be beyond float16.
    """
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.half())


def described(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """What timm reads of `config.json`; needs no training, so that a run can ask before it.

    Not all of timm's models have all attributes: where one keeps its pooling in its head
    (ConvNeXt, VGG, NFNet), "avg" is written, which timm leaves to the architecture. The last
    layer's name is the one that it has in the model.

    Raises:
        RecipeError: the model has no last layer.
    """
    own: Any = model  # timm's own attributes are not in nn.Module's type
    last = own.get_classifier() if hasattr(own, "get_classifier") else None
    name = next((name for name, module in model.named_modules() if module is last), None)
    width = getattr(own, "num_features", None) or getattr(last, "in_features", None)
    if name is None or width is None:
        raise RecipeError(
            f"{recipe.architecture} has no last layer of its own, whose name timm's config.json "
            "states; choose another --model"
        )
    pool = getattr(own, "global_pool", "avg")
    return {
        "architecture": recipe.architecture,
        "num_classes": len(LABELS),
        "num_features": width,
        "global_pool": pool if isinstance(pool, str) else "avg",
        "model_args": {k: v for k, v in recipe.model_args.items() if "drop" not in k},
        "label_names": list(LABELS),
        "pretrained_cfg": {
            **_shown(recipe),
            "num_classes": len(LABELS),
            "classifier": own.pretrained_cfg.get("classifier", name),
            "first_conv": own.pretrained_cfg.get("first_conv"),
        },
    }


def save(
    model: nn.Module, recipe: Recipe, calibration: dict[str, Any], figures: dict[str, Any],
    history: History, out: Path, data: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write `config.json`, `model.safetensors` (float16) and, last, `report.json` into `out`.

    Each is there whole or not at all, and without a report the folder is not complete. `data`
    tells which pictures were learnt.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").unlink(missing_ok=True)
    halved = {name for name, _ in model.named_parameters()}
    weights = {
        name: (value.half() if name in halved else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, out / "model.part", metadata={"format": "pt"})
    config = described(model, recipe) | {
        "dermaflux": {name: calibration[name] for name in ("temperature", "threshold", "abstain")}
    }
    told = history.document()
    document = {"recipe": asdict(recipe), "steps": told["steps"], "saw": told["saw"],
                "started_from": told["started_from"], "calibration": calibration,
                "test": figures}  # fmt: skip
    if data is not None:
        document["data"] = dict(data)
    if history.made_of:
        document["ingredients"] = told["ingredients"]
    if history.validation:
        document["validation"] = told["validation"]
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
        local(config["architecture"], config["model_args"])
        model: nn.Module = timm.create_model(
            config["architecture"], num_classes=config["num_classes"], **config["model_args"]
        )
        weights = load_file(folder / "model.safetensors")
        # Copied into the model's own tensors, so in their types.
        model.load_state_dict(weights)
        model.pretrained_cfg = {  # type: ignore[assignment]
            **model.pretrained_cfg,  # type: ignore[dict-item]
            **config["pretrained_cfg"],
        }
        normalized(torch.zeros(1, 3, 1, 1), model)  # what it needs of them is there
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        AttributeError,
        SafetensorError,
        RecipeError,
    ) as error:
        raise DatasetError(
            f"{folder} holds no classifier that can be read ({error}); "
            f"make one with: python -m training.vit --data DATASET --out {folder}"
        ) from error
    return model.eval()
