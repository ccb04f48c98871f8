"""The text of `/metrics`, of all processes of the service together.

Each process writes its numbers into files of a folder that BentoML makes and names; whichever is
asked adds them up. Without that folder, as in tests, one registry is all there is. What is true at
the time of asking alone, such as the memory of a GPU, belongs into no file: its collectors are
given here.

    >>> data, kind = exposition(registry)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric
    from prometheus_client.samples import Sample

FOLDER = "PROMETHEUS_MULTIPROC_DIR"


class Collector(Protocol):
    """What prometheus_client takes as a collector."""

    def collect(self) -> Iterable[Metric]:
        """Figures of now."""


def exposition(registry: CollectorRegistry, now: Iterable[Collector] = ()) -> tuple[bytes, str]:
    """The metrics of all processes, or of `registry` where there is one alone, and their type.

    `now` are collectors of what is read at this moment; with several processes they are not among
    what `registry` gives.
    """
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST
    from prometheus_client.multiprocess import MultiProcessCollector

    sources: list[Collector] = [registry, *now]
    if FOLDER in os.environ:
        sources[0] = MultiProcessCollector(CollectorRegistry())  # type: ignore[no-untyped-call]
    whole = CollectorRegistry()
    whole.register(_Ordered(sources))
    return generate_latest(whole), CONTENT_TYPE_LATEST


class _Ordered:
    """Collectors as one, whose histograms are in the order that the format asks for.

    Of several processes their parts come the other way round, which strict readers refuse.
    """

    def __init__(self, sources: Iterable[Collector]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            for metric in source.collect():
                if metric.type == "histogram":
                    metric.samples.sort(key=_order)
                yield metric


def _order(sample: Sample) -> tuple[object, ...]:
    """Buckets of one histogram from the least up, then its sum and count."""
    labels = sorted((name, text) for name, text in sample.labels.items() if name != "le")
    return labels, not sample.name.endswith("_bucket"), float(sample.labels.get("le", "inf"))
