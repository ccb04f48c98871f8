"""What really ran, read from the engines after they were measured.

    >>> evidence_of(pipeline)["transformer"]
    {'engine': 'openvino-cpu', 'precision': 'int8', 'computes': {'FullyConnected': {'i8': 48}}}

A precision that is asked for and quietly not used gives the same time and the same picture as the
one before; only the executed graph shows it. So operations are counted in the graph that the engine
made, not in the file; and calls are counted (`benchmarks.counting`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from benchmarks.counting import Counted
from dermaflux.engines import Engine
from dermaflux.engines.notes import note_of
from dermaflux.pipeline import Pipeline
from dermaflux.residency import InTurns


@runtime_checkable
class Compiled(Protocol):
    """An engine that shows what it compiled: the step's graphs first where there are several."""

    def compiled(self) -> tuple[Any, ...]: ...


@runtime_checkable
class Proven(Protocol):
    """An engine that counts itself: bytes of weights, compilations, graphs."""

    def counts(self) -> dict[str, int]: ...


def counted(pipeline: Pipeline) -> dict[str, Counted]:
    """Have a pipeline's engines counted from now on; none of those that take turns in memory,
    which know each other."""
    if isinstance(pipeline.engines, InTurns):
        return {}
    counters = {
        name: engine if isinstance(engine, Counted) else Counted(engine)
        for name, engine in pipeline.engines.items()
    }
    pipeline.engines = counters
    return counters


def evidence_of(engines: Mapping[str, Engine]) -> dict[str, Any]:
    """By part: engine, precision, what its executed graph computes in, calls where counted."""
    found: dict[str, Any] = {}
    for part, given in engines.items():
        engine: Engine = given.engine if isinstance(given, Counted) else given
        told: dict[str, Any] = {"engine": engine.name, "precision": engine.precision}
        computes = operations(engine)
        if computes:
            told["computes"] = computes
        if note := note_of(engine):
            told["note"] = note
        if isinstance(engine, Proven):
            # Torch has two forwards under one name; ours counts what it made ready.
            told["made"] = engine.counts()
        if isinstance(given, Counted):
            told |= {"calls": given.calls, "items": given.items}
        found[part] = told
    return found


def operations(engine: Engine) -> dict[str, dict[str, int]]:
    """Products of matrices and convolutions by the type that they run in; nothing where the engine
    does not tell. Of an engine that compiled several graphs those of the step that ran last
    (`dermaflux.engines.ov_denoiser`)."""
    models = engine.compiled() if isinstance(engine, Compiled) else ()
    if not models:
        return {}
    from dermaflux.engines.ov_evidence import computed_in

    counts = computed_in(models[0])
    return {kind: dict(sorted(found.items())) for kind, found in sorted(counts.items())}
