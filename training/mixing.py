"""Which pictures a classifier learns: a part of the real ones, and synthetic ones beside them.

    >>> real = limited(train, 500, seed=0)          # the 250 of `limited(train, 250, 0)` too
    >>> both = [*real, *synthetic(made, real, 1.75, seed=0)]

All choices follow from the seed, and smaller ones are within larger ones, so that what a curve
shows is more pictures and not others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import numpy as np

from dermaflux.prompt import LABELS
from training.data import DatasetError, Sample

log = logging.getLogger(__name__)

RATIO_BY: Final = ("real", "label")
SYNTHETIC: Final = "synthetic"
"""How the label of a generated picture is known, as the batch generator writes it."""


def limited(real: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """At most `count` of the training pictures `real`, in their order: labels as in all of them.

    Groups (patients or lesions) are taken whole, so there may be a few less than `count`.

    Raises:
        DatasetError: there are not that many, or a label would have none.
    """
    if count > len(real):
        raise DatasetError(f"--limit {count} is more than the {len(real)} real training pictures")
    groups: dict[tuple[str, str], list[int]] = {}
    for number, sample in enumerate(real):
        groups.setdefault((sample.source, sample.group), []).append(number)
    taken: list[int] = []
    strata: dict[str, list[list[int]]] = {label: [] for label in LABELS}
    for rows in groups.values():
        labels = [_label(real[row]) for row in rows]
        strata[max(LABELS, key=labels.count)].append(rows)
    shares = [sum(map(len, strata[label])) / len(real) for label in LABELS]
    for number, (label, quota) in enumerate(zip(LABELS, _quotas(count, shares), strict=True)):
        random = np.random.default_rng((seed, number))
        before = len(taken)
        for place in random.permutation(len(strata[label])):
            rows = strata[label][place]
            # The first that does not fit ends it: a smaller group after it would be in this choice
            # and not in a larger one.
            if len(taken) - before + len(rows) > quota:
                break
            taken += rows
        if len(taken) == before and strata[label]:
            raise DatasetError(
                f"--limit {count} leaves no {label} lesion ({len(real)} training pictures, "
                f"{sum(map(len, strata[label]))} of them {label}); give more"
            )
    return [real[row] for row in sorted(taken)]


def synthetic(
    pool: Sequence[Sample], real: Sequence[Sample], ratio: float, seed: int, by: str = "real"
) -> list[Sample]:
    """`ratio` times as many pictures of `pool` as there are `real` ones.

    Labels are shared out as among the real ones (`by` "real"), or half and half (`by` "label").

    Raises:
        DatasetError: the pool has too few of a label; with how many are needed.
    """
    count = round(ratio * len(real))
    labels = [_label(sample) for sample in real]
    shares = [1 / len(LABELS) if by == "label" else labels.count(one) / len(real) for one in LABELS]
    taken: list[int] = []
    for number, (label, quota) in enumerate(zip(LABELS, _quotas(count, shares), strict=True)):
        places = [row for row, sample in enumerate(pool) if _label(sample) == label]
        if len(places) < quota:
            raise DatasetError(
                f"--ratio {ratio:g} of {len(real)} real pictures needs {quota} synthetic {label} "
                f"lesions, and there are {len(places)}; make more, or give a smaller ratio"
            )
        order = np.random.default_rng((seed, len(LABELS) + number)).permutation(len(places))
        taken += [places[place] for place in order[:quota]]
    return [pool[row] for row in sorted(taken)]


def only_training(pool: Sequence[Sample], real: Sequence[Sample]) -> list[Sample]:
    """The synthetic pictures that may be learnt: those of the training split.

    Raises:
        DatasetError: none is left, or one is given as real too, or a `real` one is generated.
    """
    if made := [sample for sample in real if sample.confirmed == SYNTHETIC]:
        raise DatasetError(
            f"{made[0].file} and {len(made) - 1} more of --data are generated pictures; a test on "
            "them is none: give them as --synthetic"
        )
    files = {sample.file.resolve() for sample in real}
    if twice := [sample for sample in pool if sample.file.resolve() in files]:
        raise DatasetError(
            f"{twice[0].file} is given as --data and as --synthetic; give generated pictures as "
            "--synthetic alone"
        )
    kept = [sample for sample in pool if sample.split == "train"]
    if len(kept) < len(pool):
        log.info(
            "%d synthetic pictures of other splits than train are left out: validation and test "
            "are real", len(pool) - len(kept),
        )  # fmt: skip
    if pool and not kept:
        raise DatasetError("no synthetic picture is in the split train")
    return kept


def _label(sample: Sample) -> str:
    return str(sample.lesion.label)


def _quotas(count: int, shares: Sequence[float]) -> list[int]:
    """`count` in two parts. Rounding one of them keeps both from falling as `count` grows."""
    first, _ = shares
    benign = int(np.floor(count * first + 0.5))
    return [benign, count - benign]
