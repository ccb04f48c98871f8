"""A ladder: one technique a row, all rows measured in turn, each beside the first and one before.

    >>> rungs = [Rung("diffusers eager", "what a user has", draw_eager),
    ...          Rung("ours", "its graphs on OpenVINO", draw_ours, ours=True)]
    >>> rows = climb(rungs, Effort(rounds=15, seconds=120), floor, alike)
    >>> rows[1]["times_baseline"]
    {'median': 2.46, 'low': 2.41, 'high': 2.52}

What a rung makes is compared with what the first made in the same round: a row that is fast since
it made something else is told as wrong, unless it is labelled lossy. How many rounds are measured
depends on how long one takes, so that a busy machine gives wider intervals and not a lost evening.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from benchmarks.measuring import Ratio, alternate, ratio, spread
from dermaflux.errors import DermaFluxError

LEAST_ROUNDS: Final = 3


@dataclass(frozen=True)
class Made:
    """What a call made, seconds by stage, and its own clock where that is what counts."""

    output: Any
    stages: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None


def _nothing() -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Rung:
    """One row: `make` gets the number of the round.

    `precision` is that of the floor it is held against, `fp32`, `bf16` or `int8`; `lossy` says that
    what it makes may differ; `images` are those of one call. `before` is the rung that it adds one
    technique to, the one above it if not given; `reference` the one that made the same, the first
    if not given; `evidence` is asked after it was measured, and says what really ran.
    """

    name: str
    technique: str
    make: Callable[[int], Made]
    ours: bool = False
    precision: str = "fp32"
    lossy: bool = False
    images: int = 1
    before: str | None = None
    reference: str | None = None
    opened_s: float | None = None
    evidence: Callable[[], Mapping[str, Any]] = _nothing


@dataclass(frozen=True)
class Effort:
    """Rounds at most, and seconds that a ladder may take; never under `LEAST_ROUNDS` rounds."""

    rounds: int
    seconds: float

    def fits(self, one_round: float) -> int:
        """Rounds, where one takes so many seconds."""
        most = math.floor(self.seconds / max(one_round, 1e-9))
        return max(min(LEAST_ROUNDS, self.rounds), min(self.rounds, most))


Floors = Callable[[Rung], Mapping[str, Any] | None]
"""A rung -> `{"ms": ..., "precision": ...}`: the floor of one call of it; None if unknown."""
Alike = Callable[[Any, Any], Mapping[str, float]]
"""What its reference and a rung made -> figures; `wrong` above 0: they differ too much."""


@dataclass
class Ladder:
    """Rungs, their floor, and what was left out and why."""

    rungs: list[Rung]
    floor: Floors
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], Rung]) -> None:
        """A rung that may not be had here."""
        try:
            self.rungs.append(make())
        except (DermaFluxError, ImportError) as error:
            self.left_out[name] = str(error)

    def try_out(self) -> None:
        """Call every rung but the first once, and leave out who fails: a rival that can be opened
        and not run takes nobody else's figures along."""
        for rung in self.rungs[1:]:
            try:
                rung.make(0)
            except (DermaFluxError, RuntimeError, OSError, MemoryError) as error:
                self.left_out[rung.name] = f"it failed: {str(error) or type(error).__name__}"
                self.rungs.remove(rung)


def climb(
    rungs: Sequence[Rung], effort: Effort, floor: Floors, alike: Alike
) -> list[dict[str, Any]]:
    """One row a rung, in order. Ratios are of the seconds of one image.

    Raises:
        DermaFluxError: there is no rung; or two have one name.
    """
    names = [rung.name for rung in rungs]
    if not names or len(set(names)) != len(names):
        raise DermaFluxError(f"a ladder needs rungs of different names, not {names}")
    made: dict[str, list[Made]] = {name: [] for name in names}

    def kept(rung: Rung) -> Callable[[int], object]:
        return lambda number: made[rung.name].append(rung.make(number))

    sides = {rung.name: kept(rung) for rung in rungs}
    one_round = _once(sides)
    # The first call of all is the slowest, and says little of how many rounds fit.
    if one_round < effort.seconds / LEAST_ROUNDS:
        one_round = _once(sides)
    rounds = effort.fits(one_round)
    told = f"{len(names)} sides, {one_round:.1f} s a round, {rounds} rounds: {', '.join(names)}"
    print(told, file=sys.stderr)
    seconds = alternate(sides, rounds, warm_up=0)
    for rung in rungs:
        made[rung.name] = made[rung.name][-rounds:]
        own = [one.seconds for one in made[rung.name]]
        seconds[rung.name] = [
            (outside if inside is None else inside) / rung.images
            for inside, outside in zip(own, seconds[rung.name], strict=True)
        ]
    rows = []
    for number, rung in enumerate(rungs):
        before = rung.before if rung.before in seconds else names[max(0, number - 1)]
        reference = rung.reference if rung.reference in seconds else names[0]
        row = _row(rung, seconds[rung.name], made[rung.name], floor(rung))
        row |= {
            "times_baseline": rounded(ratio(seconds[names[0]], seconds[rung.name])),
            "before": before,
            "times_before": rounded(ratio(seconds[before], seconds[rung.name])),
        }
        figures = _alike(made[reference], made[rung.name], alike)
        wrong = bool(figures.pop("wrong", 0)) and not rung.lossy
        rows.append({**row, "alike": figures, "wrong": wrong, "evidence": dict(rung.evidence())})
    return rows


def _once(sides: Mapping[str, Callable[[int], object]]) -> float:
    began = time.perf_counter()
    for side in sides.values():
        side(0)
    return time.perf_counter() - began


def _row(
    rung: Rung, seconds: Sequence[float], made: Sequence[Made], floor: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a rung's own seconds say, those of one image."""
    row: dict[str, Any] = {
        "name": rung.name,
        "technique": rung.technique,
        "ours": rung.ours,
        "lossy": rung.lossy,
        "images": rung.images,
        "rounds": len(seconds),
        **spread(seconds),
        "per_second": round(1 / float(np.median(seconds)), 4),
        "stages_ms": stages(made, rung.images),
    }
    if rung.opened_s is not None:
        row["opened_s"] = round(rung.opened_s, 2)
    if floor is not None:
        row["floor"] = {**floor, "ms": round(floor["ms"] / rung.images, 4)}
        row["floor_reached"] = round(row["floor"]["ms"] / row["p50_ms"], 4)
    return row


def stages(made: Sequence[Made], images: int = 1) -> dict[str, float]:
    """Medians in ms an image, of the stages that a side can tell."""
    names = list(dict.fromkeys(name for one in made for name in one.stages))
    return {
        name: round(1e3 * float(np.median([one.stages.get(name, 0.0) for one in made])) / images, 3)
        for name in names
    }


def rounded(found: Ratio) -> dict[str, float]:
    """A ratio for a result."""
    return {name: round(value, 3) for name, value in asdict(found).items()}


def _alike(base: Sequence[Made], own: Sequence[Made], alike: Alike) -> dict[str, float]:
    """Over rounds: the median of each figure, and under `worst_` its least favourable."""
    figures = [alike(a.output, b.output) for a, b in zip(base, own, strict=True)]
    found: dict[str, float] = {}
    for name in figures[0]:
        values = [one[name] for one in figures]
        if name == "wrong":
            found[name] = max(values)
            continue
        worst = min(values) if name == "psnr_db" else max(values)
        found[name] = round(float(np.median(values)), 6)
        found[f"worst_{name}"] = round(float(worst), 6)
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The ladder for a terminal."""
    lines = [f"{'':34} {'p50 ms':>10} {'times':>7} {'95 %':>15} {'step':>6} {'floor':>6}  alike"]
    for row in rows:
        times = row["times_baseline"]
        between = f"{times['low']:.2f} to {times['high']:.2f}"
        reached = f"{100 * row['floor_reached']:.0f} %" if "floor_reached" in row else ""
        figures = ", ".join(f"{key} {value:.4g}" for key, value in row["alike"].items())
        label = " (lossy)" if row["lossy"] else " WRONG" if row["wrong"] else ""
        lines.append(
            f"{row['name'] + label:34} {row['p50_ms']:10.1f} {times['median']:7.2f} {between:>15} "
            f"{row['times_before']['median']:6.2f} {reached:>6}  {figures}"
        )
    return "\n".join(lines)
