"""Fine-tune (or train) a timm ViT to tell benign from malignant lesions, and calibrate it.

    python -m training.vit --data ISIC2017 --data HAM10000 --out models/mini/classifier

Writes timm's own layout, `config.json` and `model.safetensors`, with the calibration beside them
(temperature, threshold for 95 % sensitivity on the validation split, abstention band), and
`report.json`. Batches are balanced over (source, how the label is known, label), since follow-up
images are all benign and come from other cameras: unbalanced, a model learns the camera.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from tqdm import tqdm

from dermaflux.errors import DermaFluxError
from dermaflux.prompt import LABELS
from training import data
from training.checkpoint import add_classifier

log = logging.getLogger(__name__)

_MEAN = _STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Recipe:
    """A training run; the defaults make the embedded default's classifier (2.0 M parameters)."""

    architecture: str = "vit_tiny_patch16_224"
    model_args: dict[str, Any] = field(
        default_factory=lambda: {"img_size": 128, "patch_size": 16, "embed_dim": 160,
                                 "depth": 6, "num_heads": 5, "drop_path_rate": 0.1}
    )  # fmt: skip
    size: int = 128  # pixels a side
    hours: float = 0.25
    batch: int = 64
    rate: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    ema: float = 0.998
    sensitivity: float = 0.95  # the threshold keeps this share of validation's malignant lesions
    coverage: float = 0.8  # share of validation images that get an answer, the rest abstains
    seed: int = 0
    threads: int = 2


def draw_weights(samples: list[data.Sample]) -> Tensor:
    """float64 [N]: a group (source, confirmed, label) is drawn by the square root of its size.

    Full balance would show the few consensus images hundreds of times; the root is the usual
    middle. Half of all draws are malignant.
    """
    groups = [(s.source, s.confirmed, s.lesion.label) for s in samples]
    sizes = {group: groups.count(group) for group in set(groups)}
    labels = {label: sum(sizes[g] ** 0.5 for g in sizes if g[2] == label) for label in LABELS}
    return torch.tensor([sizes[g] ** -0.5 / labels[str(g[2])] for g in groups], dtype=torch.float64)


def _normalized(images: Tensor) -> Tensor:
    mean = torch.tensor(_MEAN)[:, None, None]
    std = torch.tensor(_STD)[:, None, None]
    return (images - mean) / std


def _augmentation(size: int) -> v2.Transform:
    """Dermoscopy has no upright; light and camera vary; lesions stay whole."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.6, 1.0), ratio=(0.85, 1.18), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.RandomApply([v2.RandomRotation((90, 90))], p=0.5),
            v2.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25, hue=0.03),
        ]
    )


def train(samples: list[data.Sample], recipe: Recipe) -> nn.Module:
    """Train for `recipe.hours` of wall-clock; returns the averaged model in eval mode."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    images = torch.from_numpy(data.load_images(samples, recipe.size)).permute(0, 3, 1, 2)
    labels = torch.tensor([LABELS.index(str(s.lesion.label)) for s in samples])
    weights = draw_weights(samples)
    model, average = (build(recipe) for _ in range(2))
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    # Muon for the matrices of the blocks, AdamW for the rest, at one rate, as in the generator.
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices, lr=recipe.rate, weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=recipe.rate, weight_decay=recipe.weight_decay),
    ]  # fmt: skip
    augment = _augmentation(recipe.size)
    budget, started, step = recipe.hours * 3600, time.monotonic(), 0
    losses: list[float] = []
    with tqdm(total=round(budget), unit="s", desc="vit") as bar:
        while (seconds := time.monotonic() - started) < budget:
            left = 1 - seconds / budget
            rows = torch.multinomial(weights, recipe.batch, replacement=True)
            # One draw of the augmentation for every eight images: it costs as much as the network.
            batch = torch.cat([augment(some) for some in images[rows].split(8)]).float() / 255
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(_normalized(batch))
            loss = F.cross_entropy(
                logits.float(), labels[rows], label_smoothing=recipe.label_smoothing
            )
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate * min(1.0, (step + 1) / 50, left / 0.7)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            decay = min(recipe.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(average.parameters()), list(model.parameters()), 1 - decay
                )
            losses.append(float(loss.detach()))
            bar.update(round(seconds) - bar.n)
            if step % 25 == 0:
                bar.set_postfix(step=step, loss=f"{np.mean(losses[-100:]):.4f}")
    log.info("%d steps of %d images, loss %.4f", step, recipe.batch, np.mean(losses[-100:]))
    return average.eval()


def build(recipe: Recipe) -> nn.Module:
    """The timm model of a recipe with fresh weights and two classes."""
    model: nn.Module = timm.create_model(
        recipe.architecture, num_classes=len(LABELS), **recipe.model_args
    )
    return model


@torch.no_grad()
def logits_of(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[N, S, S, 3] uint8 -> logits [N, 2]."""
    rows = []
    for start in range(0, len(images), 64):
        batch = torch.from_numpy(images[start : start + 64]).permute(0, 3, 1, 2).float() / 255
        rows.append(model(_normalized(batch)))
    return torch.cat(rows).double().numpy()


def platt(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Temperature and shift of the malignant logit that fit validation best (Platt, 1999).

    The shift matters as much as the temperature: half of every training batch is malignant, far
    more than among the pictures that will come.
    """
    difference = (logits[:, 1] - logits[:, 0])[:, None]
    fit = LogisticRegression(C=np.inf).fit(difference, labels)
    slope = max(float(fit.coef_[0, 0]), 0.05)  # a model that knows nothing has none
    return 1 / slope, float(fit.intercept_[0]) / slope


def shift_logit(model: nn.Module, shift: float) -> None:
    """Add to the malignant class's logit, in the bias of the model's last layer."""
    with torch.no_grad():
        model.get_classifier().bias[LABELS.index("malignant")] += shift  # type: ignore[operator]


def probabilities(logits: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """Probability of malignant, [N]."""
    difference = (logits[:, 1] - logits[:, 0]) / scale
    return np.asarray(1 / (1 + np.exp(-difference)))


def calibrate(
    logits: NDArray[np.float64], labels: NDArray[np.int64], scale: float, recipe: Recipe
) -> dict[str, Any]:
    """Threshold and abstention band from the validation split, with the temperature `scale`.

    The threshold is the highest that keeps `recipe.sensitivity` of the malignant lesions. The band
    holds the images nearest to it in rank, half on either side, so that `recipe.coverage` of the
    validation images get an answer.
    """
    p = probabilities(logits, scale)
    threshold = float(np.quantile(p[labels == 1], 1 - recipe.sensitivity, method="lower"))
    at = float(np.mean(p < threshold))
    half = (1 - recipe.coverage) / 2
    low = float(np.quantile(p, max(at - half, 0.0)))
    high = float(np.quantile(p, min(at + half, 1.0)))
    return {
        "temperature": round(scale, 4),
        "threshold": round(threshold, 4),
        "abstain": [round(min(low, threshold), 4), round(max(high, threshold), 4)],
    }


def calibration_error(p: NDArray[np.float64], labels: NDArray[np.int64], bins: int = 10) -> float:
    """Expected calibration error with equal-width bins."""
    index = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [
        abs(p[index == b].mean() - labels[index == b].mean()) * np.mean(index == b)
        for b in range(bins)
        if np.any(index == b)
    ]
    return float(sum(gaps))


def auc(p: NDArray[np.float64], labels: NDArray[np.int64], draws: int = 1000) -> dict[str, Any]:
    """ROC-AUC with a 95 % bootstrap interval."""
    random = np.random.default_rng(0)
    values: list[float] = []
    while len(values) < draws:
        rows = random.integers(len(p), size=len(p))
        if 0 < labels[rows].sum() < len(rows):
            values.append(roc_auc_score(labels[rows], p[rows]))
    return {
        "auc": round(float(roc_auc_score(labels, p)), 4),
        "interval": [round(float(v), 4) for v in np.quantile(values, (0.025, 0.975))],
        "images": len(p),
        "malignant": int(labels.sum()),
    }


def border_only(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep 3 / 32 of the picture at each edge, and paint the rest in that edge's mean colour.

    What is left is mostly the camera; nothing of it depends on what stood in the middle.
    """
    edge = 3 * images.shape[1] // 32
    rim = np.ones(images.shape[1:3], bool)
    rim[edge:-edge, edge:-edge] = False
    kept = images.copy()
    kept[:, ~rim] = images[:, rim].mean(axis=1, keepdims=True).astype(np.uint8)
    return kept


def lesion_masked(images: NDArray[np.uint8], samples: list[data.Sample]) -> NDArray[np.uint8]:
    """Paint every lesion, a little beyond its mask, in the colour of the skin around it."""
    from PIL import Image, ImageFilter

    painted = images.copy()
    for image, sample in zip(painted, samples, strict=True):
        if sample.mask is None:
            continue
        with Image.open(sample.mask) as mask:
            grown = mask.convert("L").resize(image.shape[1::-1]).filter(ImageFilter.MaxFilter(7))
        inside = np.asarray(grown) > 127
        if not inside.all():
            image[inside] = np.median(image[~inside], axis=0)
    return painted


def report(
    model: nn.Module, test: list[data.Sample], calibration: dict[str, Any], size: int
) -> dict[str, Any]:
    """Every figure of the test splits, with the controls that tell lesion from camera."""
    results: dict[str, Any] = {}
    for source in sorted({s.source for s in test}):
        chosen = [s for s in test if s.source == source]
        images = data.load_images(chosen, size)
        labels = np.array([LABELS.index(str(s.lesion.label)) for s in chosen])
        logits = logits_of(model, images)
        p = probabilities(logits, calibration["temperature"])
        low, high = calibration["abstain"]
        called = p >= calibration["threshold"]
        answered = (p < low) | (p >= high)
        figures: dict[str, Any] = {
            "whole": auc(p, labels),
            "sensitivity": round(float(called[labels == 1].mean()), 4),
            "specificity": round(float(1 - called[labels == 0].mean()), 4),
            "answered": round(float(answered.mean()), 4),
            "calibration_error_uncalibrated": round(
                calibration_error(probabilities(logits - [0, calibration["shift"]], 1.0), labels), 4
            ),
            "calibration_error": round(calibration_error(p, labels), 4),
        }
        subsets = {"": np.ones(len(chosen), bool)}
        if any(s.confirmed for s in chosen):
            subsets["histology_"] = np.array([s.confirmed == "histo" for s in chosen])
            figures["histology"] = auc(p[subsets["histology_"]], labels[subsets["histology_"]])
        for control, changed in (
            ("border_only", border_only(images)),
            ("lesion_masked", lesion_masked(images, chosen)),
        ):
            q = probabilities(logits_of(model, changed), 1.0)
            for name, rows in subsets.items():
                figures[name + control] = auc(q[rows], labels[rows])
        results[source] = figures
    return results


def save(
    model: nn.Module, recipe: Recipe, calibration: dict[str, Any], figures: dict[str, Any],
    seen: list[data.Sample], out: Path,
) -> None:  # fmt: skip
    """Write `config.json`, `model.safetensors` (float16) and `report.json` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
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
    licences = [{"source": s, "licence": licence} for s, licence in data.licences(seen)]
    document = {"recipe": asdict(recipe), "saw": licences, "calibration": calibration,
                "test": figures}  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "report.json").write_text(json.dumps(document, indent=2) + "\n")
    (out / "model.part").chmod(0o644)  # safetensors makes its files their owner's alone
    (out / "model.part").replace(out / "model.safetensors")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.vit", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", type=Path, action="append", required=True, help="repeatable")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=data.positive, default=Recipe.hours)
    parser.add_argument("--threads", type=int, default=Recipe.threads)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    recipe = Recipe(hours=options.hours, threads=options.threads)
    try:
        everything = [sample for folder in options.data for sample in data.read(folder)]
        splits = {
            name: [s for s in everything if s.split == name] for name in ("train", "val", "test")
        }
        if missing := [name for name, samples in splits.items() if not samples]:
            raise data.DatasetError(f"no sample in split {', '.join(missing)}")
        model = train(splits["train"], recipe)
        labels = np.array([LABELS.index(str(s.lesion.label)) for s in splits["val"]])
        validation = data.load_images(splits["val"], recipe.size)
        scale, shift = platt(logits_of(model, validation), labels)
        shift_logit(model, shift)
        calibration = calibrate(logits_of(model, validation), labels, scale, recipe)
        calibration["shift"] = round(shift, 4)
        figures = report(model, splits["test"], calibration, recipe.size)
        save(model, recipe, calibration, figures, splits["train"], options.out)
        # Weights that saw data for non-commercial use are for such use only.
        limited = [name for _, name in data.licences(splits["train"]) if "NC" in name]
        add_classifier(options.out.parent, splits["train"], (limited or ["Apache-2.0"])[0])
    except DermaFluxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"out": str(options.out), "calibration": calibration, "test": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
