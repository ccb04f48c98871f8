"""How many pictures each group of a plan has: as many as it counts, or its share of the total.

>>> sizes(Path("plan.yaml"), 4375, [{"share": 0.5}, {"share": 0.5}])
[2188, 2187]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from serving.batch import quotas
from serving.batch.choices import refuse, weight
from serving.batch.documents import written

MAX_PICTURES: Final = 1_000_000
"""Months on one GPU; what is more is a slip of the finger, or several jobs."""
ROUNDING: Final = Fraction(1, 1000)
"""How far the sum of shares may be from 1: a third is written as 0.333."""


def sizes(file: Path, total: object, groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """Every group's number of pictures, above 0.

    Raises:
        DatasetError: counts and shares are mixed, do not come to the total, or are none.
    """
    if total is not None:
        total = _count(f"{file}: total", total)
    kinds = []
    for number, one in enumerate(groups):
        given = [kind for kind in ("count", "share") if one.get(kind) is not None]
        if len(given) != 1:
            refuse(f"{file}: groups[{number}]", "needs one of count and share")
        kinds += given
    if len(set(kinds)) > 1:
        other = next(n for n, kind in enumerate(kinds) if kind != kinds[0])
        refuse(
            f"{file}: groups[{other}].{kinds[other]}",
            f"stands beside groups[0].{kinds[0]}; use count in all groups, or share in all",
        )
    values = [one[kinds[0]] for one in groups]
    if kinds[0] == "count":
        found = [_count(f"{file}: groups[{n}].count", value) for n, value in enumerate(values)]
        if total is not None and sum(found) != total:
            refuse(f"{file}: total", f"is {total}, but the groups count {sum(found)}; mend one")
        _count(f"{file}: the sum of all counts", sum(found))
        return found
    if total is None:
        refuse(f"{file}: total", "is missing, of which groups ask for a share")
    shares = [weight(f"{file}: groups[{n}].share", value) for n, value in enumerate(values)]
    whole = sum(shares, Fraction(0))
    if abs(whole - 1) > ROUNDING:
        refuse(f"{file}: groups", f"have shares that sum to {float(whole):g}; they need 1")
    found = quotas.counts(shares, total)
    if 0 in found:
        empty = found.index(0)
        refuse(
            f"{file}: groups[{empty}].share",
            f"{values[empty]!r} of {total} is no picture; raise one, or leave it out",
        )
    return found


def _count(where: str, given: object) -> int:
    if type(given) is not int or not 1 <= given <= MAX_PICTURES:
        refuse(where, f"{written(given)} is no number of pictures; use 1 to {MAX_PICTURES}")
    return given
