"""What the classifier's gate is fitted by: pictures seen, densities, limits, and rates of errors.

>>> train = look(pictures, classifier)          # measured once, by the code that will serve
>>> density = fitted(train.looks, axes=25, components=12, seed=0)
>>> limit = lowest(density.score_all(validation.looks), weights, 0.01)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.special import ndtri
from scipy.stats import beta
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from dermaflux.appearance import LENGTH, Quality, describe, measure, square
from dermaflux.classifier import preprocess
from dermaflux.density import Density
from dermaflux.engines import Engine
from dermaflux.flow import Floats
from dermaflux.manifest import ClassifierSpec, IntakeSpec

_KNOTS: Final = 33
_RIDGE: Final = 0.05
"""Added to the variances of a component, of which all axes together have 1."""
_BATCH: Final = 32


@dataclass(frozen=True)
class Seen:
    """Measures of N pictures: shorter sides [N], qualities [N, 6] in the order of `Quality`,
    descriptions [N, D] and the classifier's features [N, F]."""

    sides: NDArray[np.int64]
    qualities: NDArray[np.float64]
    looks: Floats
    features: Floats

    @property
    def both(self) -> Floats:
        """What the second density is of: descriptions and features, [N, D + F]."""
        return np.concatenate([self.looks, self.features], axis=1)

    def __len__(self) -> int:
        return len(self.sides)


def look(pictures: Iterable[Image.Image], spec: ClassifierSpec, engine: Engine) -> Seen:
    """Measure pictures as `dermaflux.intake` does."""
    sides, qualities, looks, features = [], [], [], []
    waiting: list[Floats] = []

    def run() -> None:
        if waiting:
            features.append(engine.run({"pixel_values": np.stack(waiting)})["features"])
            waiting.clear()

    for picture in pictures:
        pixels = square(picture)
        sides.append(min(picture.size))
        qualities.append(list(vars(measure(pixels)).values()))
        looks.append(describe(pixels))
        waiting.append(preprocess(picture, spec))
        if len(waiting) == _BATCH:
            run()
    run()
    if not sides:
        blank = np.zeros((0, LENGTH), np.float32)
        return Seen(np.zeros(0, np.int64), np.zeros((0, len(fields(Quality)))), blank, blank[:, :0])
    return Seen(np.array(sides), np.array(qualities), np.stack(looks), np.concatenate(features))


def fitted(vectors: Floats, axes: int, components: int, seed: int) -> Density:
    """A mixture fitted to [N, D]. Fewer axes or components where there are too few pictures: ten a
    component, and more pictures than axes.

    Each number is taken by its own quantiles as a normal one first, since a mixture of Gaussians
    says little of numbers with long tails.
    """
    count, width = vectors.shape
    steps = np.linspace(0.5 / count, 1 - 0.5 / count, _KNOTS)
    knots = np.quantile(vectors.astype(np.float64), steps, axis=0)
    # Equal quantiles (of a number that is often the same) would have no order to go by.
    knots = np.maximum.accumulate(knots + 1e-6 * np.arange(_KNOTS)[:, None] * (1 + abs(knots)), 0)
    quartiles = knots[3 * _KNOTS // 4] - knots[_KNOTS // 4]
    blank = Density(
        scores=_single(ndtri(steps)),
        knots=_single(knots),
        spread=_single(quartiles / 1.35 + 1e-6),
        **{name: np.zeros(1, np.float32) for name in _LATER},
    )
    normal = blank.normal(vectors)
    mean, deviation = normal.mean(0), normal.std(0) + 1e-6
    standard = (normal - mean) / deviation
    pca = PCA(min(axes, width, count - 1), whiten=True, random_state=seed).fit(standard)
    scale = 1 / np.sqrt(np.maximum(pca.explained_variance_, 1e-9))
    turned = pca.components_ * scale[:, None]
    origin = turned @ pca.mean_
    placed = Density(
        scores=blank.scores,
        knots=blank.knots,
        spread=blank.spread,
        mean=_single(mean),
        deviation=_single(deviation),
        axes=_single(turned),
        origin=_single(origin),
        **{name: np.zeros(1, np.float32) for name in _MIXTURE},
    )
    return mixed(placed, vectors, components, seed)


def mixed(density: Density, vectors: Floats, components: int, seed: int) -> Density:
    """Another mixture in the axes of a density, fitted to [N, D]: their scores can be compared."""
    mixture = GaussianMixture(
        max(1, min(components, len(vectors) // 10)),
        reg_covar=_RIDGE,
        random_state=seed,
        max_iter=60,
    ).fit(density.places(vectors))
    return replace(
        density,
        weights=_single(np.log(mixture.weights_)),
        means=_single(mixture.means_),
        factors=_single(mixture.precisions_cholesky_),
    )


_MIXTURE: Final = ("weights", "means", "factors")
_LATER: Final = tuple(
    f.name for f in fields(Density) if f.name not in ("scores", "knots", "spread")
)


def _single(values: Any) -> Floats:
    return np.ascontiguousarray(values, np.float32)


def balance(groups: Sequence[str]) -> NDArray[np.float64]:
    """Weights [N] that give every group the same share, together 1."""
    names, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return np.asarray(1 / counts[index] / len(names), np.float64)


def lowest(scores: NDArray[Any], weights: NDArray[np.float64], rate: float) -> float:
    """The limit that at most a weighted share `rate` of scores [N] is below.

    With a small rate and few pictures it is the smallest score.
    """
    order = np.argsort(scores)
    below = np.cumsum(weights[order]) - weights[order]
    # Sums of floats: a hundred hundredths are not quite 1.
    return float(scores[order[np.flatnonzero(below <= rate + 1e-9)[-1]]])


def limits(
    seen: Seen, weights: NDArray[np.float64], rate: float, darkest: float
) -> dict[str, float]:
    """Limits of the six measures of quality: each refuses a share of at most `rate` / 6.

    `light` is at most `darkest`: how bright skin is depends on whose it is, not on the camera
    alone, and validation pictures of light skin alone must not decide that brown skin is too dark.
    """
    found = {}
    for column, name in enumerate(f.name for f in fields(Quality)):
        values, sign = seen.qualities[:, column], 1.0 if name in _LEAST else -1.0
        value = sign * lowest(sign * values, weights, rate / 6)
        # Outwards, so that the picture that set it passes.
        found[name] = float(np.floor(value * 1000) if sign > 0 else np.ceil(value * 1000)) / 1000
    found["light"] = min(found["light"], darkest)
    return found


_LEAST: Final = ("light", "contrast", "sharpness")


def verdicts(
    seen: Seen, spec: IntakeSpec, densities: Sequence[Density]
) -> Mapping[str, NDArray[np.bool_]]:
    """Which of N pictures each rule refuses, by the code of its reason; densities in the order of
    `dermaflux.intake.PARTS`."""
    appearance, features, lesions, textures = densities
    quality = dict(zip((f.name for f in fields(Quality)), seen.qualities.T, strict=True))
    return {
        "too_small": seen.sides < spec.min_side,
        "too_dark": quality["light"] < spec.light,
        "too_bright": (quality["shade"] > spec.shade) | (quality["clipped"] > spec.clipped),
        "no_contrast": quality["contrast"] < spec.contrast,
        "blurred": quality["sharpness"] < spec.sharpness,
        "noisy": quality["grain"] > spec.grain,
        "unlike_training": appearance.score_all(seen.looks) < spec.appearance,
        "other_texture": odds(seen, lesions, textures) < spec.textures,
        "unlike_features": features.score_all(seen.both) < spec.features,
    }


def odds(seen: Seen, lesions: Density, textures: Density) -> NDArray[np.float64]:
    """Logarithms of the odds that a picture is a lesion's and no texture, [N]. Source: Ren et al.,
    Likelihood Ratios for Out-of-Distribution Detection (2019)."""
    return lesions.score_all(seen.looks) - textures.score_all(seen.looks)


def rate(refused: NDArray[np.bool_]) -> dict[str, Any]:
    """Refused of how many, the share, and its 95 % interval.

    Source: Clopper and Pearson, The use of confidence or fiducial limits (1934).
    """
    count, hits = len(refused), int(refused.sum())
    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
    return {
        "pictures": count,
        "refused": hits,
        "rate": round(hits / count, 4) if count else None,
        "interval": [round(low, 4), round(high, 4)] if count else None,
    }
