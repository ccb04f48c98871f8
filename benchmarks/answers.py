"""What came of requests under load, and the figures that are read from many of them.

A latency counts from the moment at which a request was *due*, not from the one at which it could be
sent: a service that stalls keeps the load generator from sending, and whoever counts from the
sending leaves out just the requests that waited longest (Gil Tene's "coordinated omission").

    >>> summary(answers, Window(begin=12.0, end=42.0), slo_ms=2000)["latency_ms"]["p99"]
    1874.2
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

OK: Final = 200
NO_ANSWER: Final = 0
"""The status of a request to which no whole answer came; `fault` says why."""
SHARES: Final = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Answer:
    """One request from the moment it was due to the end of its answer; times are `monotonic`.

    Attributes:
        due: when it was to be sent.
        sent: when it was, which is later where the load generator could not keep up.
        ended: when the last byte was here.
        status: of HTTP, or `NO_ANSWER`.
        fault: why an answer of 200 is none, the error's code, or what broke the connection.
        caller: who asked, from 0.
        retries: times that it came back after a 429.
        first: seconds from `due` to the first step of a stream.
        retry_after: seconds after which a refused one may come back.
    """

    due: float
    sent: float
    ended: float
    status: int
    fault: str = ""
    caller: int = 0
    retries: int = 0
    first: float | None = None
    retry_after: float | None = None

    @property
    def seconds(self) -> float:
        """What the caller waited."""
        return self.ended - self.due

    @property
    def good(self) -> bool:
        """Whether it is a result."""
        return self.status == OK and not self.fault


@dataclass(frozen=True)
class Window:
    """The part of a run that counts, `monotonic`; what was due before it warmed up."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def holds(self, moment: float) -> bool:
        return self.begin <= moment < self.end


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum, each percentile a value that occurred (the smallest that at
    least that share does not pass); None of nothing."""
    if not values:
        return None
    found = np.quantile(values, list(SHARES.values()), method="inverted_cdf")
    figures = {"mean": float(np.mean(values)), **dict(zip(SHARES, found.tolist(), strict=True))}
    return {name: round(value, 2) for name, value in {**figures, "max": max(values)}.items()}


def summary(answers: Iterable[Answer], window: Window, slo_ms: float | None) -> dict[str, Any]:
    """Figures of the requests that were due within the window.

    `latency_ms` is of results alone. Throughput counts the results that *ended* within the window,
    whenever they were due, so that what was under way at both its edges evens out. `goodput` is the
    share of all requests, refused and lost ones included, that were results within `slo_ms`.
    """
    everything = list(answers)
    counted = [one for one in everything if window.holds(one.due)]
    good = [one for one in counted if one.good]
    ended = sum(1 for one in everything if one.good and window.holds(one.ended))
    figures: dict[str, Any] = {
        "requests": len(counted),
        "results": len(good),
        "seconds": round(window.seconds, 2),
        "statuses": _counts(str(one.status) for one in counted if one.status != NO_ANSWER),
        "faults": _counts(one.fault for one in counted if one.fault),
        "retries": sum(one.retries for one in counted),
        "throughput_per_s": round(ended / window.seconds, 4),
        "latency_ms": percentiles([1e3 * one.seconds for one in good]),
        "sent_late_ms": percentiles([1e3 * (one.sent - one.due) for one in counted]),
    }
    firsts = [1e3 * one.first for one in good if one.first is not None]
    if firsts:
        figures["first_step_ms"] = percentiles(firsts)
    if slo_ms is not None:
        met = sum(1 for one in good if 1e3 * one.seconds <= slo_ms)
        figures["goodput"] = {
            "slo_ms": slo_ms,
            "share": round(met / len(counted), 4) if counted else 0.0,
            "per_s": round(met / window.seconds, 4),
        }
    callers = sorted({one.caller for one in counted})
    if len(callers) > 1:
        figures["callers"] = [
            {
                "requests": sum(1 for one in counted if one.caller == caller),
                "results": len(own),
                "latency_ms": percentiles([1e3 * one.seconds for one in own]),
            }
            for caller in callers
            for own in [[one for one in good if one.caller == caller]]
        ]
    return figures


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
