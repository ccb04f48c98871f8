"""The settings of one training of a classifier.

    >>> recipe = Recipe(steps=400, size=64, model_args={"img_size": 64, "patch_size": 8, ...})

The defaults make the embedded default's classifier, from random weights and to a time. `fine` gives
those that pretrained weights of timm want: lower rates towards the input, cosine, AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from dermaflux.command import option
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


_FETCHING: Final = ("checkpoint_path", "cache_dir")


class RecipeError(DermaFluxError):
    """A setting of a training is out of range, or fits no model of timm's."""


def local(architecture: str, model_args: Mapping[str, Any]) -> None:
    """Nothing where timm builds the model from its own code alone, with fresh weights.

    A name with a colon (`hf-hub:`, `local-dir:`) is of a model elsewhere; of the arguments some
    have timm fetch weights, or unpickle them.

    Raises:
        RecipeError: a name or an argument is of that kind.
    """
    if ":" in architecture:
        raise RecipeError(
            f"the model {architecture!r} lies elsewhere, and nothing is downloaded; name a model "
            "of timm's own, and give its folder of weights as --pretrained"
        )
    if fetching := sorted(
        name for name in map(str, model_args) if name.startswith("pretrained") or name in _FETCHING
    ):
        raise RecipeError(
            f"the model's arguments have {', '.join(fetching)}, with which timm would fetch or "
            "open weights, and nothing is downloaded; take them out, and give a folder of weights "
            "as --pretrained"
        )


@dataclass(frozen=True)
class Recipe:
    """A training run; the defaults make the embedded default's classifier (2.0 M parameters).

    Equal steps (or epochs) and seed give equal weights on a CPU, to the bit; hours do not. What
    augmentation does is in `training.views`, what sampling does in `training.draws`.

    Raises:
        RecipeError: a setting is out of range, or settings do not go together.
    """

    architecture: str = option("timm's name of the model", "vit_tiny_patch16_224")
    model_args: dict[str, Any] = field(
        default_factory=lambda: {"img_size": 128, "patch_size": 16, "embed_dim": 160,
                                 "depth": 6, "num_heads": 5, "drop_path_rate": 0.1}
    )  # fmt: skip
    size: int = option("pixels a side of what the model is given", 128)
    margin: int = option("pixels that training pictures are kept larger, to be cropped from", 16)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop_pct: float = option("share of a picture's side that evaluation gives the model", 1.0)
    hours: float = option("budget of wall clock, where neither steps nor epochs are given", 1.0)
    steps: int | None = option("budget in steps of the optimizer; goes before epochs", None)
    epochs: float | None = option("budget in pictures drawn over pictures that there are", None)
    batch: int = option("pictures of a step, over all processes and parts", 64)
    accumulate: int = option(
        "parts in which a process does its share of a step; N processes are equal to N parts; "
        "batch normalisation sees its share", 1,
    )  # fmt: skip
    rate: float = option("learning rate, at its highest", 1e-3)
    warmup: int = option("steps in which the rate rises", 50)
    schedule: str = option("how the rate falls; trapezoid: in the last 70 per cent", "trapezoid")
    optimizer: str = option("muon: for matrices of blocks, and AdamW for the rest", "muon")
    weight_decay: float = option("of both optimizers", 0.05)
    layer_decay: float = option("factor of the rate from a layer to the one before; 1: none", 1.0)
    label_smoothing: float = option("share of the label that is spread over both", 0.05)
    ema: float = option("decay of the averaged weights, which are the result; 0: none", 0.998)
    sampling: str = option(
        "balanced: over source, how the label is known, and label; labels: half of each; "
        "shuffled: every picture once an epoch", "balanced",
    )  # fmt: skip
    class_weights: str = option("in the loss: none, balanced, or benign,malignant as 1,4", "none")
    augment: str = option(
        "classic: flips, small turns, mild crops and light; dermoscopy: any turn, crops, zoom to "
        "the lesion, light", "dermoscopy",
    )  # fmt: skip
    blur: float = option("share of the pictures that are blurred", 0.0)
    cutout: float = option("share of the pictures that lose a square", 0.0)
    vignette: float = option("share of the pictures with dark corners", 0.0)
    mixup: float = option("alpha, 0: none; with cutmix too, a batch takes either", 0.0)
    cutmix: float = option("alpha, 0: none", 0.0)
    auxiliary: bool = option("heads for mask, diagnosis and structures beside the label's", True)
    mask_loss: float = option("weight beside the label's cross-entropy", 0.5)
    diagnosis_loss: float = option("weight beside the label's cross-entropy", 0.5)
    structure_loss: float = option("weight beside the label's cross-entropy", 0.3)
    zoom: float = option("share of the views that are of the lesion (dermoscopy alone)", 0.35)
    evaluate: int = option("steps between looks at validation; the best weights are kept", 0)
    patience: int = option("looks without a better one that end the run; 0: none does", 0)
    watch: str = option("what is better in validation", "loss")
    sensitivity: float = option("share of malignant lesions that the threshold keeps", 0.95)
    coverage: float = option("share of validation that gets an answer, the rest abstains", 0.8)
    precision: str = option("bf16 is slow on a CPU without AMX", "bf16")
    device: str = option("auto: a GPU where there is one", "auto")
    seed: int = option("of weights, draws and views", 0)
    threads: int = option("of the CPU", 2)
    save_minutes: float = option("between states", 3.0)

    def __post_init__(self) -> None:
        local(self.architecture, self.model_args)
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
