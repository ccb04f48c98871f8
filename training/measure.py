"""How well lesions are found and measured: `dermaflux.attributes` against experts' masks.

    python -m training.measure --data DATASET                  # Dice, agreement; JSON
    python -m training.measure --data DATASET --split train --fit     # the models' weights

Two questions are kept apart: what the measures say with the experts' masks (against the words that
the dataset itself carries), and what they say with the masks that `segment` finds (against the
same measures from the experts' masks). Generated pictures are only ever measured the second way.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from dermaflux import attributes, files
from dermaflux.command import ended
from dermaflux.prompt import COLORS
from training import data

NUMBERS = ("area", "diameter", "asymmetry", "compactness", "touch", "contrast")
PIXELS = 250  # of each picture that the models are fitted to; neighbours say the same
SIZES = (32, 1024)  # pixels a side: below, a lesion is a few of them; above, nothing is gained
_STEPS = (0.8, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99)
_CLEAR = 0.03  # of the picture; experts' outlines leave some of the lesion's colour outside
_SKIN_SIDE = 0.3  # of the picture; smaller squares of bare skin are left out of the check


@dataclass(frozen=True)
class Measure:
    """Options of the command."""

    data: Path  # dataset folder whose samples have masks
    split: str = "test"
    size: int = 128  # pixels a side
    out: Path | None = None  # JSON file to write
    fit: bool = False  # fit the models of `segment` to the split instead, and give their weights


def compare(
    samples: Sequence[data.Sample], images: NDArray[np.uint8], masks: Sequence[attributes.Mask]
) -> dict[str, Any]:
    """Dice of `segment`, and how numbers and words agree; plain numbers for JSON.

    Rank correlations are Spearman's; `colors` counts the share of colour words, over all pictures,
    on which both sides agree, and `colors_all` the share of pictures where every word does.
    """
    true, found, overlap = [], [], []
    for image, mask in tqdm(zip(images, masks, strict=True), total=len(images), unit="picture"):
        mine = attributes.segment(image)
        overlap.append(attributes.dice(mine, mask))
        true.append(attributes.measure(image, mask))
        found.append(attributes.measure(image, mine))
    both = [(a, b) for a, b in zip(true, found, strict=True) if a.found and b.found]
    told = [
        (_words(sample), _words(measured)) for sample, measured in zip(samples, true, strict=True)
    ]
    return {
        "pictures": len(images),
        "dice": {
            "mean": float(np.mean(overlap)),
            "median": float(np.median(overlap)),
            "under_half": float(np.mean(np.asarray(overlap) < 0.5)),
            "nothing_found": float(np.mean([not one.found for one in found])),
        },
        "segmented_against_masks": {
            "rank_correlation": {
                name: rank_correlation([(getattr(a, name), getattr(b, name)) for a, b in both])
                for name in NUMBERS
            },
            "words": agreement([(_words(a), _words(b)) for a, b in both]),
        },
        "masks_against_dataset_words": {"words": agreement(told)},
    }


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation of pairs, -1..1; None where a side does not vary."""
    ranks = rankdata(np.asarray(pairs).reshape(-1, 2), axis=0)
    if len(pairs) < 2 or (ranks == ranks[0]).all(axis=0).any():
        return None
    return float(np.corrcoef(ranks.T)[0, 1])


Words = dict[str, str | None | tuple[str, ...]]


def agreement(pairs: Sequence[tuple[Words, Words]]) -> dict[str, float | None]:
    """Word -> share of pairs that agree on it, among those where both sides say something."""
    shares: dict[str, float | None] = {}
    for name in ("size", "asymmetry", "border"):
        said = [(a[name], b[name]) for a, b in pairs if a[name] and b[name]]
        shares[name] = float(np.mean([a == b for a, b in said])) if said else None
    colours = [(set(a["colors"] or ()), set(b["colors"] or ())) for a, b in pairs]
    colours = [(a, b) for a, b in colours if a and b]
    different = [len(a ^ b) for a, b in colours]
    words = len(COLORS)
    shares["colors"] = float(1 - np.mean(different) / words) if colours else None
    shares["colors_all"] = float(np.mean(np.asarray(different) == 0)) if colours else None
    return shares


def _words(one: data.Sample | attributes.Measured) -> Words:
    if isinstance(one, attributes.Measured):
        shape: Words = {"asymmetry": one.asymmetry_word, "border": one.border_word}
        return {"size": one.size, "colors": one.colors, **shape}
    lesion = one.lesion
    shape = {"asymmetry": lesion.asymmetry, "border": lesion.border}
    return {"size": lesion.size, "colors": lesion.colors, **shape}


def fit(
    images: NDArray[np.uint8], masks: Sequence[attributes.Mask], seed: int = 0
) -> dict[str, Any]:
    """Fit the models of `attributes.segment`: the values of its FIRST and SECOND.

    `certainty` is what CERTAIN is chosen by: for several values, the share of lesions that would
    be kept and of squares of bare skin, cut from beside them, that would be taken for one.

    Raises:
        data.DatasetError: the masks, shrunk, are all empty or all full.
    """
    random = np.random.default_rng(seed)
    pixels = [random.choice(attributes.SIDE**2, PIXELS, replace=False) for _ in images]
    small = [_shrink(mask) for mask in masks]
    inside = np.concatenate([m.ravel()[chosen] for m, chosen in zip(small, pixels, strict=True)])
    if inside.all() or not inside.any():
        raise data.DatasetError(
            f"the {len(masks)} masks are all {'full' if inside.all() else 'empty'}; a fit needs "
            "pixels inside and outside of lesions: check the files of the column 'mask'"
        )
    views = [attributes.look(image) for image in tqdm(images, unit="picture")]

    def model(features: Iterator[attributes.Floats]) -> tuple[float, ...]:
        flat = (plane.reshape(attributes.SIDE**2, -1) for plane in features)
        table = np.concatenate([f[chosen] for f, chosen in zip(flat, pixels, strict=True)])
        mean, spread = table.mean(axis=0), table.std(axis=0) + 1e-6
        fitted = LogisticRegression(max_iter=500).fit((table - mean) / spread, inside)
        weights = fitted.coef_[0] / spread
        return (float(fitted.intercept_[0] - weights @ mean), *map(float, weights))

    first = model(attributes.first_features(view) for view in views)
    chances = (attributes.probability(attributes.first_features(v), first) for v in views)
    second = model(
        attributes.second_features(view, chance)
        for view, chance in zip(views, chances, strict=True)
    )

    def certainties(views: Iterable[attributes.View]) -> NDArray[np.float64]:
        values = []
        for view in views:
            chance = attributes.probability(attributes.first_features(view), first)
            chance = attributes.probability(attributes.second_features(view, chance), second)
            values.append(attributes.certainty(chance, attributes.region(view, chance)))
        return np.asarray(values)

    squares = (bare_skin(image, mask) for image, mask in zip(images, masks, strict=True))
    lesions = certainties(views)
    skin = certainties(attributes.look(square) for square in squares if square is not None)
    return {
        "first": first,
        "second": second,
        "certainty": [
            {
                "at_least": step,
                "lesions_kept": float(np.mean(lesions >= step)),
                "skin_taken": float(np.mean(skin >= step)) if skin.size else None,
            }
            for step in _STEPS
        ],
    }


def bare_skin(image: NDArray[np.uint8], mask: attributes.Mask) -> NDArray[np.uint8] | None:
    """The largest square of [H, W, 3] at an edge and clear of the lesion; None if all are small.

    It may hold hair, rulers, patches and marks: what stands beside lesions stands beside it.
    """
    side = min(mask.shape)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return None
    height, width = mask.shape
    gaps = (rows[0], height - 1 - rows[-1], columns[0], width - 1 - columns[-1])
    widest = int(np.argmax(gaps))
    length = int(gaps[widest]) - round(_CLEAR * side)
    if length < _SKIN_SIDE * side:
        return None
    row, column = (height - length) // 2, (width - length) // 2
    row = {0: 0, 1: height - length}.get(widest, row)
    column = {2: 0, 3: width - length}.get(widest, column)
    return np.ascontiguousarray(image[row : row + length, column : column + length])


def _shrink(mask: attributes.Mask) -> attributes.Mask:
    side = attributes.SIDE
    picture = Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side))
    return np.asarray(picture) > 127


def run(options: Measure) -> dict[str, Any]:
    """What the command prints.

    Raises:
        data.DatasetError: no such split, a file that cannot be read, or no sample with a mask.
    """
    samples = [s for s in data.read(options.data, options.split) if s.mask is not None]
    if not samples:
        raise data.DatasetError(
            f"{options.data} has no masks in split {options.split!r}; measuring needs experts' "
            "masks: give a dataset whose metadata.csv has the column 'mask'"
        )
    images = data.load_images(samples, options.size, threads=1)
    loaded = (data.load_mask(sample, options.size) for sample in samples)
    masks = [mask for mask in loaded if mask is not None]
    result = fit(images, masks) if options.fit else compare(samples, images, masks)
    asked = {**asdict(options), "data": options.data.name, "out": None}
    return {"options": asked, **result}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.measure", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, help="dataset folder with masks")
    parser.add_argument("--split", default=Measure.split)
    parser.add_argument("--size", type=int, default=Measure.size, help="pixels a side")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--fit", action="store_true", help="fit the models of segment instead")
    options = Measure(**vars(parser.parse_args(arguments)))

    def work() -> None:
        if not SIZES[0] <= options.size <= SIZES[1]:
            raise data.DatasetError(
                f"--size is {options.size}; use {SIZES[0]} to {SIZES[1]} pixels"
            )
        if options.out and (options.out.is_dir() or not os.access(options.out.parent, os.W_OK)):
            raise data.DatasetError(
                f"--out {options.out} cannot be written; give a file in an existing folder"
            )
        text = json.dumps(run(options), indent=2) + "\n"
        if options.out:
            files.write(options.out, text.encode())
        print(text, end="")

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
