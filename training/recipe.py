"""The settings of one training of a classifier.

    >>> recipe = Recipe(steps=400, size=64, model_args={"img_size": 64, "patch_size": 8, ...})

The defaults make the embedded default's classifier, from random weights and to a time. `fine` gives
those that pretrained weights of timm want: lower rates towards the input, cosine, AdamW.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from dermaflux.errors import DermaFluxError

AUGMENTS: Final = ("none", "classic", "dermoscopy")
SAMPLINGS: Final = ("balanced", "labels", "shuffled")
OPTIMIZERS: Final = ("muon", "adamw")
SCHEDULES: Final = ("trapezoid", "cosine")
WATCHED: Final = ("loss", "auc")
PRECISIONS: Final = ("bf16", "fp32")
DEVICES: Final = ("auto", "cpu", "cuda")

FREE: Final = ("hours", "threads", "save_minutes", "device")
"""What a resumed run may change: none of it changes what a step computes, but for rounding."""


class RecipeError(DermaFluxError):
    """A setting of a training is out of range, or fits no model of timm's."""


@dataclass(frozen=True)
class Recipe:
    """A training run; the defaults make the embedded default's classifier (2.0 M parameters).

    The budget is `steps`, else `epochs`, else `hours` of wall clock. Equal steps and seed give
    equal weights on a CPU, to the bit; hours do not.

    Attributes:
        architecture: timm's name of the model; `model_args` are what it is built with.
        size: pixels a side of what the model is given. Pictures are kept `margin` pixels larger
            in training, to be cropped from.
        crop_pct: the share of a whole picture's side that the model is given in evaluation.
        steps: of the optimizer. epochs: pictures drawn, over those that there are.
        batch: pictures of a step, over all processes and all `accumulate` parts of the step.
        warmup: steps in which the rate rises. schedule: how it falls to 0; "trapezoid" stays at
            `rate` for the first 30 % of the budget.
        optimizer: "muon" is Muon for the matrices of transformer blocks and AdamW for the rest.
        layer_decay: factor of the rate from one layer to the one before it; 1 is none
            (`timm.optim.param_groups_layer_decay`).
        ema: decay of the averaged weights, which are the result; 0 is none.
        sampling: "balanced" draws by (source, how the label is known, label), "labels" half of
            each label, with replacement; "shuffled" shows every picture once an epoch.
        class_weights: "none", "balanced" (1 / share of the label, mean 1), or two numbers of
            benign and malignant, as "1,4".
        augment: "classic" is flips, mild crops and light (what a textbook does), "dermoscopy" any
            turn, crops and zoom to the lesion, and stronger light. See `training.views`.
        blur, cutout, vignette: shares of the pictures that are blurred, lose a square to their
            mean colour, or darken towards the corners.
        mixup, cutmix: alphas of the Beta distributions, 0 for none; with both, each batch takes
            one of them at even odds, as `timm.data.Mixup` does.
        auxiliary: whether the heads for mask, diagnosis and structures learn beside the label's.
        mask_loss, diagnosis_loss, structure_loss: their weights beside the label's cross-entropy.
        zoom: share of the draws that are cropped to the lesion ("dermoscopy" alone).
        evaluate: steps from one look at the validation pictures to the next, 0 for none; the best
            averaged weights by `watch` are kept. patience: looks without a better one after which
            the run ends, 0 for never.
        sensitivity: the threshold keeps this share of validation's malignant lesions.
        coverage: share of validation images that get an answer, the rest abstains.
    """

    architecture: str = "vit_tiny_patch16_224"
    model_args: dict[str, Any] = field(
        default_factory=lambda: {"img_size": 128, "patch_size": 16, "embed_dim": 160,
                                 "depth": 6, "num_heads": 5, "drop_path_rate": 0.1}
    )  # fmt: skip
    size: int = 128
    margin: int = 16
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    hours: float = 1.0
    steps: int | None = None
    epochs: float | None = None
    batch: int = 64
    accumulate: int = 1
    rate: float = 1e-3
    warmup: int = 50
    schedule: str = "trapezoid"
    optimizer: str = "muon"
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    label_smoothing: float = 0.05
    ema: float = 0.998
    sampling: str = "balanced"
    class_weights: str = "none"
    augment: str = "dermoscopy"
    blur: float = 0.0
    cutout: float = 0.0
    vignette: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    auxiliary: bool = True
    mask_loss: float = 0.5
    diagnosis_loss: float = 0.5
    structure_loss: float = 0.3
    zoom: float = 0.35
    evaluate: int = 0
    patience: int = 0
    watch: str = "loss"
    sensitivity: float = 0.95
    coverage: float = 0.8
    precision: str = "bf16"
    device: str = "auto"
    seed: int = 0
    threads: int = 2
    save_minutes: float = 3.0

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            if (word := getattr(self, name)) not in words:
                raise RecipeError(f"{name} {word!r} is not known; use {', '.join(words)}")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise RecipeError(f"{name} {value} is out of range; use {least:g} to {most:g}")
        if self.class_weights not in ("none", "balanced"):
            _two_weights(self.class_weights)
        if self.batch % self.accumulate:
            raise RecipeError(
                f"batch {self.batch} has no {self.accumulate} equal parts; accumulate needs one "
                "that divides it"
            )
        if (self.mixup or self.cutmix) and self.batch // self.accumulate % 2:
            raise RecipeError(
                f"mixup and cutmix mix pairs, and {self.batch // self.accumulate} pictures at "
                "once are no pairs; give an even batch"
            )
        if self.patience and not self.evaluate:
            raise RecipeError("patience counts looks at the validation pictures; give evaluate")

    @property
    def kept(self) -> int:
        """Pixels a side at which training pictures are kept."""
        return self.size + self.margin

    @property
    def whole(self) -> int:
        """Pixels a side of a whole picture in evaluation, whose middle the model is given."""
        return int(self.size / self.crop_pct)

    def total(self, pictures: int) -> int | None:
        """Optimizer steps of a run over `pictures`, or None where the clock decides."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return max(1, round(self.epochs * pictures / self.batch))
        return None

    def fixed(self) -> dict[str, Any]:
        """What a resumed run may not change."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


_WORDS: Final = {
    "sampling": SAMPLINGS, "augment": AUGMENTS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES,
    "watch": WATCHED, "precision": PRECISIONS, "device": DEVICES,
}  # fmt: skip
_MOST: Final = 1e9
_RANGES: Final = {
    **dict.fromkeys(("size", "steps", "batch", "accumulate", "threads"), (1, _MOST)),
    **dict.fromkeys(("hours", "epochs", "rate", "save_minutes"), (1e-12, _MOST)),
    **dict.fromkeys(("margin", "warmup", "weight_decay", "evaluate", "patience"), (0, _MOST)),
    **dict.fromkeys(("mask_loss", "diagnosis_loss", "structure_loss", "mixup", "cutmix"), (0, 100)),
    **dict.fromkeys(("blur", "cutout", "vignette", "zoom", "sensitivity", "coverage"), (0, 1)),
    **dict.fromkeys(("label_smoothing", "ema"), (0, 0.999_999)),
    **dict.fromkeys(("layer_decay", "crop_pct"), (0.05, 1)),
    "seed": (0, 2**63 - 1),
}


def _two_weights(text: str) -> None:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 2 or not all(0 < value < _MOST for value in values):
        raise RecipeError(
            f"class_weights {text!r} is neither none, nor balanced, nor two numbers above 0 of "
            "benign and malignant, as 1,4"
        )


def fine(recipe: Recipe) -> Recipe:
    """The defaults for pretrained weights.

    AdamW, cosine and a layer decay of 0.75 are those of BEiT's and MAE's fine-tuning (Bao et al.,
    arXiv 2106.08254; He et al., arXiv 2111.06377); the rate is MAE's 5e-4 for a batch of 256,
    scaled to 64 by the root.
    """
    return replace(
        recipe, rate=2.5e-4, schedule="cosine", optimizer="adamw", layer_decay=0.75,
        blur=0.1, cutout=0.1, vignette=0.1,
    )  # fmt: skip


def defaults() -> dict[str, Any]:
    """Every field's default, for states that were saved before a field was there."""
    made = Recipe()
    return {one.name: getattr(made, one.name) for one in fields(Recipe)}
