"""What a service's own metrics say of a stretch of time: `/metrics` before it and after it.

Histograms become counts and means, those of batch sizes also how often each size occurred; counters
become what was added. So a result says beside the callers' waiting where the service spent it.

    >>> gained(before, after)
    {'dermaflux_stage_seconds{stage="wait"}': {'count': 40, 'mean': 1.31}, ...}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

PREFIXES: Final = ("dermaflux_", "bentoml_service_adaptive_batch_size")
_SIZES: Final = "batch"


def gauges(text: str) -> dict[str, float]:
    """The gauges of ours by name and labels, as they are."""
    return {name: value for kind, name, _, value in _samples(text) if kind == "gauge"}


def gained(before: str, after: str) -> dict[str, Any]:
    """What happened between two readings, by name and labels; what did not move is left out.

    A counter that fell was begun anew, as by a service that was started again: then what it holds
    is what was gained.
    """
    old = {(name, bound): value for _, name, bound, value in _samples(before)}
    found: dict[str, Any] = {}
    sums: dict[str, float] = {}
    bounds: dict[str, list[tuple[float, float]]] = {}
    for kind, name, bound, value in _samples(after):
        if kind == "gauge":
            continue
        was = old.get((name, bound), 0.0)
        gain = value - was if value >= was else value
        if not gain:
            continue
        if kind == "counter":
            found[name] = gain
        elif bound == "count":
            found[name] = {"count": gain}
        elif bound == "sum":
            sums[name] = gain
        else:
            bounds.setdefault(name, []).append((float(bound), gain))
    for name, figures in found.items():
        if isinstance(figures, dict):
            figures["mean"] = round(sums.get(name, 0.0) / figures["count"], 5)
            if _SIZES in name:
                figures["by_size"] = _apart(bounds.get(name, []))
    return found


def _apart(below: list[tuple[float, float]]) -> dict[str, float]:
    """Cumulative counts of buckets -> how many fell into each, by its upper bound."""
    found: dict[str, float] = {}
    before = 0.0
    for bound, count in sorted(below):
        if count > before:
            found[f"{bound:g}"] = count - before
        before = count
    return found


def _samples(text: str) -> Iterator[tuple[str, str, str, float]]:
    """Kind, name with labels, part of a histogram (`count`, `sum` or an upper bound), value."""
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(text):
        if not family.name.startswith(PREFIXES) or family.type not in (
            "counter", "gauge", "histogram",
        ):  # fmt: skip
            continue
        for sample in family.samples:
            part = sample.name.removeprefix(family.name).lstrip("_")
            if part == "created":
                continue
            labels = ",".join(
                f'{key}="{value}"' for key, value in sorted(sample.labels.items()) if key != "le"
            )
            name = f"{family.name}{{{labels}}}" if labels else family.name
            bound = sample.labels.get("le", part) if family.type == "histogram" else ""
            yield family.type, name, bound, float(sample.value)
