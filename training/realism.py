"""How near generated images are to real ones: to their distribution, and to any one of them.

The first should be near (kernel inception distance), the second should not: an image nearer to a
training image than real held-out images are would be a copy. Features are those of a classifier
of real images, the judge; distances to single images are taken in pixels too. Arrays in, figures
out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from PIL import Image

from training.figures import DRAWS, Figure, Floats, Pixels, interval, resampled
from training.latents import orientations

THUMBNAIL: Final = 32
"""Pixels a side: what is the same picture at this size is the same picture to people."""
NEIGHBOURS: Final = 50
FIRST: Final = "KID of images of the first weights to real test images"


def kernel(x: Floats, y: Floats) -> Floats:
    """(x . y / D + 1)^3 of features [X, D] and [Y, D]: [X, Y] (Binkowski et al., 2018)."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def kid(x: Floats, y: Floats, of_x: Floats | None = None, of_y: Floats | None = None) -> Floats:
    """Squared maximum mean discrepancy of features [X, D] and [Y, D], unbiased: [draws].

    The kernel inception distance (Binkowski et al., arXiv 1801.01401) with features of any network.
    Around 0, and as often below it, for two samples of one distribution. A bootstrap sample holds
    an item several times; pairs of an item with itself never count, or every draw would be too
    large.
    """
    of_x = np.ones((1, len(x))) if of_x is None else of_x
    of_y = np.ones((1, len(y))) if of_y is None else of_y

    def within(items: Floats, counts: Floats) -> Floats:
        matrix = kernel(items, items)
        np.fill_diagonal(matrix, 0)
        pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
        return np.asarray(((counts @ matrix) * counts).sum(1) / pairs)

    across = ((of_x @ kernel(x, y)) * of_y).sum(1) / (of_x.sum(1) * of_y.sum(1))
    return np.asarray(within(x, of_x) + within(y, of_y) - 2 * across)


def standardized(features: Floats, reference: Floats) -> Floats:
    """Features [N, D] in the units of `reference` [M, D]: mean 0, deviation 1 in every column.

    Without it the distance would depend on the scale that a network happens to give its features.
    """
    spread = reference.std(0)
    return np.asarray((features - reference.mean(0)) / np.where(spread > 0, spread, 1))


def thumbnails(images: Pixels) -> Floats:
    """[N, S, S, 3] uint8 -> float64 [N, 3072]: 32 x 32 pixels in colour, 0 to 255."""
    side = (THUMBNAIL, THUMBNAIL)
    small = [Image.fromarray(i).resize(side, Image.Resampling.BOX) for i in images]
    return np.stack([np.asarray(i, dtype=np.float64).ravel() for i in small])


def unit(features: Floats) -> Floats:
    """Every row at length 1, so that the distance of two rows tells their angle."""
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12))


def distances(turned: list[Floats], references: Floats) -> Floats:
    """Root mean square difference [N, M] between queries and references [M, D].

    `turned` holds the queries [N, D] in every orientation; the nearest one counts, for a picture
    and its mirror image are one.
    """
    best = np.full((len(turned[0]), len(references)), np.inf)
    norms = np.square(references).sum(1)
    for queries in turned:
        squares = np.square(queries).sum(1)[:, None] + norms - 2 * queries @ references.T
        np.minimum(best, squares, out=best)
    return np.asarray(np.sqrt(best.clip(0) / references.shape[1]))


def nearest(matrix: Floats) -> tuple[Floats, Floats]:
    """Of `distances` [N, M]: the least of each query, and its share of the 50 least's mean.

    A copy is far nearer to one reference than to all others, so its share is near 0. A bland
    picture is near to many, and its share is near 1 (Carlini et al., arXiv 2301.13188).
    """
    some = np.sort(matrix, axis=1)[:, :NEIGHBOURS]
    return some[:, 0], np.asarray(some[:, 0] / some.mean(1).clip(1e-12))


def others(matrix: Floats) -> Floats:
    """Of `distances` [N, N] of a set to itself: those between different items, [N, N - 1]."""
    count = len(matrix)
    return matrix[~np.eye(count, dtype=bool)].reshape(count, count - 1)


def kid_figures(synthetic: Floats, test: Floats, others: Floats) -> list[Figure]:
    """KID of features [N, D] to those of real test images, beside that of `others`, real as well.

    The goal is three times real to real, in the units of the real test images' features. Those
    others are of other splits, which need not be one distribution with the test split: how far
    random halves of the test split alone are apart stands beside.
    """
    random = np.random.default_rng(0)
    mine, real, rest = (standardized(some, test) for some in (synthetic, test, others))
    of_mine, of_real, of_rest = (resampled(len(some), random) for some in (mine, real, rest))
    among_real = float(kid(rest, real)[0])
    halves = []
    for _ in range(200):
        order = random.permutation(len(real))
        halves.append(float(kid(real[order[::2]], real[order[1::2]])[0]))
    value = float(kid(mine, real)[0])
    draws, real_draws = kid(mine, real, of_mine, of_real), kid(rest, real, of_rest, of_real)
    between = {"between random halves of the real test images": float(np.mean(halves))}
    return [
        Figure(
            "kid",
            "KID to real test images (goal: 3 times that of real images of other splits)",
            value,
            len(mine),
            interval(draws),
            3 * among_real,
            "at most",
            # An unbiased estimate near 0 may be negative; then there is no ratio.
            {"times real to real": value / among_real if among_real > 0 else None, **between},
        ),
        Figure(
            "kid.real",
            "KID of real images of other splits to real test images; the splits differ",
            among_real,
            len(rest),
            interval(real_draws),
            beside=between,
        ),
        Figure(
            "kid.halves",
            "KID between random halves of the real test images, mean and range",
            float(np.mean(halves)),
            len(real) // 2,
            interval(np.array(halves)),
        ),
        _ratio(value, among_real, draws, real_draws, len(mine), between),
    ]


def _ratio(
    value: float, reference: float, draws: Floats, reference_draws: Floats, count: int,
    beside: Mapping[str, float | None],
) -> Figure:  # fmt: skip
    """KID over that of a reference, both drawn with the same test images."""
    what = "KID to real test images, over that of a reference whose splits differ"
    # A draw at or below 0 has no ratio; many of them, and the interval has no upper end.
    clear = reference > 0 and float(np.mean(reference_draws <= 0)) < 0.025
    if not clear:
        note = "the reference is within its own error of 0: no ratio"
        return Figure("kid.ratio", what, None, count, beside=beside, note=note)
    ratios = draws / np.where(reference_draws > 0, reference_draws, np.nan)
    return Figure("kid.ratio", what, value / reference, count, interval(ratios), beside=beside)


def first_figure(older: Floats, test: Floats) -> Figure:
    """KID of features of images that older weights drew."""
    random = np.random.default_rng(0)
    mine, real = standardized(older, test), standardized(test, test)
    draws = kid(mine, real, resampled(len(mine), random), resampled(len(real), random))
    return Figure("kid.first", FIRST, float(kid(mine, real)[0]), len(mine), interval(draws))


def single_figures(
    space: str, of: Callable[[Pixels], Floats], drawn: Pixels, test: Pixels, train: Pixels
) -> list[Figure]:
    """Nearness of drawn images to single training images and to each other, as `of` sees them.

    All are [N, S, S, 3]; the queries are turned into all eight orientations.
    """
    references = of(train)
    mine, real = (
        [of(np.ascontiguousarray(turned)) for turned in orientations(images)]
        for images in (drawn, test)
    )
    return [
        *nearest_figures(space, distances(mine, references), distances(real, references)),
        diversity_figure(space, distances(mine, mine[0]), distances(real, real[0])),
    ]


def nearest_figures(space: str, synthetic: Floats, test: Floats) -> list[Figure]:
    """Distance to the nearest training image: of generated images, over that of real test images.

    Both are `distances` to the training images, [N, M] and [T, M].
    """
    random = np.random.default_rng(0)
    (mine, mine_share), (real, real_share) = (nearest(matrix) for matrix in (synthetic, test))
    drawn = [random.choice(some, (DRAWS, len(some))) for some in (mine, real)]
    lines = []
    for name, quantile in (("median", 0.5), ("5th percentile", 0.05)):
        own, other = (float(np.quantile(some, quantile)) for some in (mine, real))
        above, below = (np.quantile(some, quantile, axis=1) for some in drawn)
        lines.append(
            Figure(
                f"nearest.{space}.{name}",
                f"nearest training image in {space}, {name} over that of real test images",
                own / other if other > 0 else None,
                len(mine),
                interval(above / np.where(below > 0, below, np.nan)) if other > 0 else None,
                1.0,
                beside={
                    "generated": own,
                    "real": other,
                    "nearest over mean of the 50 nearest, generated": float(
                        np.quantile(mine_share, quantile)
                    ),
                    "the same, real": float(np.quantile(real_share, quantile)),
                },
                note="" if other > 0 else "real test images are in the training split as well",
            )
        )
    return lines


def diversity_figure(space: str, drawn: Floats, real: Floats) -> Figure:
    """How far images of a set are from each other, from its `distances` to itself, [N, N].

    A near duplicate has another of its set nearer than 99 % of the real images have.
    """
    mine, theirs = others(drawn), others(real)
    limit = float(np.quantile(theirs.min(1), 0.01))
    return Figure(
        f"diversity.{space}",
        f"mean distance between generated images in {space}, over that between real ones",
        float(mine.mean() / theirs.mean()),
        len(drawn),
        beside={
            "near duplicates, share": float(np.mean(mine.min(1) < limit)),
            "of real ones": float(np.mean(theirs.min(1) < limit)),
        },
    )
