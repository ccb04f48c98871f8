"""Does the generator draw what it is asked for? Pairs that differ in one word, seeds that do not.

Every pair starts from a held-out lesion's own description, so that captions are those of real
lesions. Both of its images have the same seed, and are measured as the training captions were
(`dermaflux.attributes`); the area under the ROC curve tells how well the measure separates images
asked for with the word from images asked for without it. An image in which no lesion is found
counts, as a lesion of size 0 without colour.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from dermaflux import attributes
from dermaflux.prompt import Lesion, caption
from training import data
from training.figures import Figure, Floats, Pixels, auc, comparison, interval, resampled

Changes = Mapping[str, Any]

_BROWN: Final = ("light brown", "dark brown")
ASKED: Final[Mapping[str, Changes]] = {
    "small": {"size": "small"},
    "large": {"size": "large"},
    "light brown": {"colors": ("light brown",)},
    "dark brown": {"colors": ("dark brown",)},
    "both browns": {"colors": _BROWN},
    "browns and black": {"colors": (*_BROWN, "black")},
    "browns and blue gray": {"colors": (*_BROWN, "blue gray")},
}
"""What is changed in a lesion's description; a colour is never asked for alone but among others."""


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A pair of `ASKED`, and the goal of its AUC (None: too rare in the training images).

    `alone` and `instead` are a second pair to stand beside: the word alone, and another alone.
    """

    present: str
    absent: str
    goal: float | None
    alone: str | None = None
    instead: str | None = None


ATTRIBUTES: Final[Mapping[str, Attribute]] = {
    "size": Attribute("large", "small", 0.95),
    "black": Attribute("browns and black", "both browns", 0.85),
    "dark brown": Attribute("both browns", "light brown", 0.80),
    "light brown": Attribute("both browns", "dark brown", 0.75, "light brown", "dark brown"),
    "blue gray": Attribute("browns and blue gray", "both browns", None),
}
GUIDED: Final = ("size", "black", "dark brown")
"""Attributes that are measured at several guidances: the three with the highest goals."""


def bases(samples: Sequence[data.Sample], count: int) -> list[Lesion]:
    """`count` described lesions drawn without order from `samples`; again and again if too few.

    Raises:
        DatasetError: no sample has both a size and a colour.
    """
    whole = [s.lesion for s in samples if s.lesion.size and s.lesion.colors]
    if not whole:
        raise data.DatasetError("the test split describes no lesion by size and colours")
    order = np.random.default_rng(0).permutation(len(whole))
    return [whole[order[i % len(whole)]] for i in range(count)]


def prompts(lesions: Sequence[Lesion], changes: Changes) -> list[tuple[str, int]]:
    """(caption with the change, seed) for every lesion; seeds are 0, 1, 2, ..."""
    return [(caption(dataclasses.replace(le, **changes)), seed) for seed, le in enumerate(lesions)]


def quantity(attribute: str, measured: attributes.Measured) -> float:
    """What stands for an attribute: the diameter, or a colour's share of the lesion's pixels."""
    if not measured.found:
        return 0.0
    return float(measured.diameter if attribute == "size" else measured.shares[attribute])


def quantities(attribute: str, measured: Sequence[attributes.Measured]) -> Floats:
    """`quantity` of every image, [N]."""
    return np.array([quantity(attribute, one) for one in measured])


def on_real(attribute: str, samples: Sequence[data.Sample],
            found: Sequence[attributes.Measured]) -> float | None:  # fmt: skip
    """The same AUC over real images, told apart by their captions: what the measure itself can do.

    Those captions come from the masks, the measure from its own segmentation. None where the
    samples do not hold both kinds.
    """
    values = quantities(attribute, found)
    if attribute == "size":
        present = np.array([s.lesion.size == "large" for s in samples])
        absent = np.array([s.lesion.size == "small" for s in samples])
    else:
        present = np.array([attribute in s.lesion.colors for s in samples])
        absent = np.array([bool(s.lesion.colors) for s in samples]) & ~present
    if not present.any() or not absent.any():
        return None
    return float(auc(comparison(values[present], values[absent]))[0])


def segmentation(
    test: Sequence[data.Sample], real: Pixels, found: Sequence[attributes.Measured],
    generated: Sequence[attributes.Measured],
) -> list[Figure]:  # fmt: skip
    """How well the measure finds lesions: Dice on real masks, and how often it finds none."""
    masks = [data.load_mask(sample, real.shape[1]) for sample in test]
    scores = np.array(
        [
            attributes.dice(attributes.segment(image), mask)
            for image, mask in zip(real, masks, strict=True)
            if mask is not None
        ]
    )
    what = "segmentation against the masks of real test images, mean Dice"
    if not len(scores):
        first = Figure("dice", what, None, 0, note="the test split has no masks")
    else:
        draws = resampled(len(scores), np.random.default_rng(0)) @ scores / len(scores)
        first = Figure("dice", what, float(scores.mean()), len(scores), interval(draws),
                       beside={"median": float(np.median(scores))})  # fmt: skip
    return [
        first,
        Figure(
            "no lesion",
            "share of generated images in which no lesion is found",
            float(np.mean([not one.found for one in generated])),
            len(generated),
            beside={"of real test images": float(np.mean([not one.found for one in found]))},
        ),
    ]


def pairs(found: Mapping[str, Sequence[attributes.Measured]],
          real: Mapping[str, float | None]) -> list[Figure]:  # fmt: skip
    """One figure per attribute from the measured images of every entry of `ASKED`."""
    lines = []
    for name, attribute in ATTRIBUTES.items():
        present = quantities(name, found[attribute.present])
        absent = quantities(name, found[attribute.absent])
        wins = comparison(present, absent)
        counts = resampled(len(present), np.random.default_rng(0))
        beside = {
            "right order within a pair": float(np.diag(wins).mean()),
            "the measure on real images, AUC": real[name],
        }
        if attribute.alone and attribute.instead:
            sides = (quantities(name, found[s]) for s in (attribute.alone, attribute.instead))
            beside[f"alone, against {attribute.instead} alone, AUC"] = float(
                auc(comparison(*sides))[0]
            )
        lines.append(
            Figure(
                f"obedience.{name}",
                f"{name} asked for or not (same seed), AUC",
                float(auc(wins)[0]),
                len(present),
                interval(auc(wins, counts, counts)),
                attribute.goal,
                beside=beside,
            )
        )
    return lines


def rising(found: Mapping[float, Mapping[str, Sequence[attributes.Measured]]],
           default: float) -> Figure:  # fmt: skip
    """Mean AUC of `GUIDED` at `default` less that at the lowest guidance; levels beside."""
    counts: Floats | None = None
    means: dict[float, tuple[float, Floats]] = {}
    for level, sets in found.items():
        values, draws = [], []
        for name in GUIDED:
            pair = ATTRIBUTES[name]
            present, absent = (quantities(name, sets[side]) for side in (pair.present, pair.absent))
            if counts is None:
                counts = resampled(len(present), np.random.default_rng(0))
            wins = comparison(present, absent)
            values.append(float(auc(wins)[0]))
            draws.append(auc(wins, counts, counts))
        means[level] = (float(np.mean(values)), np.mean(draws, axis=0))
    lowest = min(means)
    return Figure(
        "guidance",
        f"mean AUC of {', '.join(GUIDED)} at guidance {default:g} less that at {lowest:g}",
        means[default][0] - means[lowest][0],
        0 if counts is None else counts.shape[1],
        interval(means[default][1] - means[lowest][1]),
        0.0,
        "above",
        {f"at {level:g}": mean for level, (mean, _) in sorted(means.items())},
    )
