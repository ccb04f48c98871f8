"""From what was seen over the rounds to a table, ratios and goals.

>>> goals(rounds, ours, callers=16)["ratios"]["of in process"]
{'median': 0.93, 'low': 0.92, 'high': 0.95}
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, Protocol

import numpy as np

from benchmarks.arrivals import poisson
from benchmarks.http_contenders import RIVALS
from benchmarks.http_ours import Kind
from benchmarks.http_rounds import SAMPLE, Found
from benchmarks.measuring import ratio

OF_IN_PROCESS: Final = 0.9
TIMES_RIVALS: Final = 3.5
P99_OVER_P50: Final = 2.0
TOLERANCE: Final = 1e-3
"""Of a probability, between programs that run the same weights in fp32."""


class Seen(Protocol):
    """What `benchmarks.http_rounds.Rounds` gathered."""

    found: dict[str, Found]
    alone: dict[str, list[dict[str, Any]]]


def table(
    found: Mapping[str, Found],
    alone: Mapping[str, Sequence[Mapping[str, Any]]],
    ours: Sequence[Kind],
    counts: Sequence[int],
) -> dict[str, Any]:
    """By side: its settings, images a second by callers, waits, processor time and memory; of ours
    also whether it is `lossy`."""
    told: dict[str, Any] = {}
    lossy = {name: one.lossy for one in ours for name in (one.side, one.alone)}
    for name, seen in found.items():
        told[name] = {
            "settings": seen.side.name,
            "tried": {key: round(value, 4) for key, value in seen.tried.items()},
            "images_per_s": round(statistics.median(seen.rates), 4),
            "closed": {str(count): seen.closed[count] for count in counts if count in seen.closed},
            "open": _with_share(seen.open),
            "start_s": seen.start_s,
            "cpu_s_per_1000": statistics.median(seen.cpu_s_per_1000),
            "peak_rss_bytes": seen.peak_rss_bytes,
        }
    for name, rounds in alone.items():
        told[name] = {
            **{key: rounds[0][key] for key in ("engine", "precision", "batch")},
            "images_per_s": statistics.median(one["decoded_per_s"] for one in rounds),
            "from_files_per_s": statistics.median(one["from_files_per_s"] for one in rounds),
            "cpu_s_per_1000": statistics.median(one["cpu_s_per_1000"] for one in rounds),
            "peak_rss_bytes": max(one["rss_bytes"] for one in rounds),
        }
    return {name: {**one, "lossy": lossy[name]} if name in lossy else one
            for name, one in told.items()}  # fmt: skip


def goals(seen: Seen, ours: Sequence[Kind], callers: int) -> dict[str, Any]:
    """Ratios within rounds with intervals, and which goals they meet, of each of ours; None was not
    measured."""
    ratios: dict[str, dict[str, float]] = {}
    told: list[dict[str, Any]] = []
    for kind in ours:
        own = _ratios(seen, kind)
        of = f"{kind.name}, " if kind.name else ""
        ratios |= {f"{of}{name}": one for name, one in own.items()}
        told += _goals(seen.found[kind.side], own, kind.goal, callers)
    return {
        "ratios": {
            name: {key: round(value, 3) for key, value in one.items()}
            for name, one in ratios.items()
        },
        "goals": told,
        "queue_theory": {
            "p99_over_p50": round(single_server_tail(0.5), 2),
            "of": "Poisson arrivals at half of what one server of equal times can do, first come, "
            "first served (M/D/1): what is left of a tail when nothing but queueing makes it. A "
            "smaller ratio at half load means a longer median, not a shorter tail",
        },
    }


def _ratios(seen: Seen, kind: Kind) -> dict[str, dict[str, float]]:
    """Of one of ours to what its classifier does without a service, and to rivals."""
    alone = seen.alone[kind.alone]
    spent = [1 / rate for rate in seen.found[kind.side].rates]
    others = {
        "of in process": [one["decoded_per_s"] for one in alone],
        "of in process with files": [one["from_files_per_s"] for one in alone],
        **{f"times {name}": seen.found[name].rates for name in RIVALS if name in seen.found},
    }
    return {
        name: asdict(ratio([1 / rate for rate in rates], spent)) for name, rates in others.items()
    }


def _goals(
    ours: Found, ratios: Mapping[str, Mapping[str, float]], whose: str, callers: int
) -> list[dict[str, Any]]:
    waits = _with_share(ours.open)
    tail = None if waits is None else waits["p99_over_p50"]
    return [
        _goal(
            f"{whose}at {callers} callers, of the rate in process without reading files",
            ratios["of in process"]["median"], least=OF_IN_PROCESS,
        ),
        *(
            _goal(
                f"{whose}at {callers} callers, times {name}",
                ratios.get(f"times {name}", {}).get("median"), least=TIMES_RIVALS,
            )
            for name in RIVALS
        ),
        _goal(f"{whose}p99 over p50 at half load, Poisson arrivals", tail, most=P99_OVER_P50),
        _goal(
            f"{whose}p99 over p50 with half as many callers ({callers // 2}, closed loop)",
            _closed_tail(ours.closed.get(callers // 2, ())), most=P99_OVER_P50,
        ),
    ]  # fmt: skip


def single_server_tail(load: float, count: int = 200_000, seed: int = 0) -> float:
    """p99 over p50 of the time in an M/D/1 queue, by Lindley's recursion over `count` arrivals."""
    arrivals = np.array(poisson(load, count / load, seed))
    # Work ahead of each arrival: what came, less what time took, since it was last nothing.
    walk = np.arange(len(arrivals)) - arrivals
    waits = walk - np.minimum.accumulate(walk)
    middle, far = np.quantile(waits + 1, (0.5, 0.99))
    return float(far / middle)


def same_answers(seen: Seen, ours: Sequence[Kind]) -> dict[str, Any]:
    """Largest differences of probabilities, over the same photographs, from torch in fp32; and
    whether each of our services says what its file of the bundle says in process."""
    compared = {name: one.answers for name, one in seen.found.items()}
    compared |= {name: rounds[0]["answers"][:SAMPLE] for name, rounds in seen.alone.items()}
    told: dict[str, Any] = {
        "photographs": SAMPLE,
        "from_in_process": {
            one.side: _apart(compared[one.side], compared[one.alone]) for one in ours
        },
    }
    reference = next((name for name in reversed(RIVALS) if name in compared), None)
    if reference is None:
        return told
    told["reference"] = reference
    told["from_reference"] = {
        name: _apart(answers, compared[reference])
        for name, answers in compared.items()
        if name != reference
    }
    told["rivals_agree"] = all(
        apart is None or apart <= TOLERANCE
        for name, apart in told["from_reference"].items()
        if name in RIVALS
    )
    return told


def _apart(some: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> float | None:
    """Where both have one: a picture that the gate refuses has none over HTTP."""
    both = [
        (one["probability"], other["probability"])
        for one, other in zip(some, others, strict=True)
        if one["probability"] is not None and other["probability"] is not None
    ]
    return round(max(abs(one - other) for one, other in both), 6) if both else None


def _closed_tail(levels: Sequence[Mapping[str, Any]]) -> float | None:
    found = [one["latency_ms"] for one in levels if one["latency_ms"]]
    return statistics.median(one["p99"] / one["p50"] for one in found) if found else None


def _with_share(waits: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if waits is None or not waits["latency_ms"]:
        return None
    latency = waits["latency_ms"]
    return {**waits, "p99_over_p50": round(latency["p99"] / latency["p50"], 3)}


def _goal(
    words: str, found: float | None, least: float | None = None, most: float | None = None
) -> dict[str, Any]:
    met = None
    if found is not None:
        met = (least is None or found >= least) and (most is None or found <= most)
    bounds = {"at_least": least, "at_most": most}
    return {
        "goal": words,
        **{name: value for name, value in bounds.items() if value is not None},
        "found": None if found is None else round(found, 3),
        "met": met,
    }
