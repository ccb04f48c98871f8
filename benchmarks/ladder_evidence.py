"""What really ran, read from the engines after they were measured.

    >>> evidence_of(pipeline)["transformer"]
    {'engine': 'openvino-cpu', 'precision': 'int8', 'computes': {'FullyConnected': {'i8': 48}}}

A precision that is asked for and quietly not used gives the same time and the same picture as the
one before; only the executed graph shows it. So operations are counted in the graph that the engine
made, not in the file; and calls are counted (`benchmarks.counting`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, Protocol, runtime_checkable

from benchmarks.counting import Counted
from dermaflux.engines import Engine
from dermaflux.pipeline import Pipeline
from dermaflux.residency import InTurns

_COMPUTE: Final = ("FullyConnected", "MatMul", "Convolution", "GroupConvolution",
                   "ScaledDotProductAttention")  # fmt: skip
_EIGHT: Final = ("i8", "u8")


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
        if getattr(engine, "note", ""):
            told["note"] = getattr(engine, "note", "")
        if isinstance(engine, Proven):
            # Torch has two forwards under one name; ours counts what it made ready.
            told["made"] = engine.counts()
        if isinstance(given, Counted):
            told |= {"calls": given.calls, "items": given.items}
        found[part] = told
    return found


def operations(engine: Engine) -> dict[str, dict[str, int]]:
    """Products of matrices and convolutions by the type that they run in; nothing where the engine
    does not tell.

    OpenVINO names the kernel of each operation (`brgemm_avx512_i8`); its last word is the type it
    computes in, and `runtimePrecision` what its weights are held in.
    """
    compiled: Any = getattr(engine, "_model", None)
    if not hasattr(compiled, "get_runtime_model"):
        return {}
    counts: dict[str, Counter[str]] = {}
    for operation in compiled.get_runtime_model().get_ops():
        details: Any = operation.get_rt_info()
        kind = details["layerType"].astype(str)
        if kind not in _COMPUTE:
            continue
        computed = details["primitiveType"].astype(str).rsplit("_", 1)[-1].lower()
        held = details["runtimePrecision"].astype(str)
        small = held in _EIGHT and computed not in _EIGHT
        counts.setdefault(kind, Counter())[
            f"{computed} of 8-bit weights" if small else computed
        ] += 1
    return {kind: dict(sorted(found.items())) for kind, found in sorted(counts.items())}
