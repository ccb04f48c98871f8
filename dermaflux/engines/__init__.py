"""Engines: named arrays in, named arrays out, whoever computes.

The pipeline cannot tell one engine from another. `choose` says which one runs a part and why;
`load` makes it. Only then is the engine's library imported.

    >>> choice = choose(bundle, "transformer")
    >>> choice.engine, choice.precision, choice.reason
    ('openvino-cpu', 'int8', 'int8 on OpenVINO is the fastest on a CPU')
    >>> load(bundle, choice).run({"hidden_states": tokens, ...})["out_hidden_states"]
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from dermaflux.bundle import Bundle
from dermaflux.errors import EngineError

Array = NDArray[Any]
Arrays = Mapping[str, Array]

ORT: Final = "onnxruntime-cpu"
OPENVINO: Final = "openvino-cpu"
EAGER: Final = "eager"

_ORDER: Final = (
    # Symmetric int8 was measured at 2.0 to 2.5 times eager fp32 on OpenVINO, and slower than fp32
    # on ONNX Runtime, whose kernels want unsigned activations: so int8 there comes last.
    (OPENVINO, "int8", "int8 on OpenVINO is the fastest on a CPU"),
    (OPENVINO, "fp32", "fp32 on OpenVINO is the fastest without int8"),
    (ORT, "fp32", "fp32 on ONNX Runtime runs everywhere"),
    (ORT, "int8", "int8 on ONNX Runtime, slower than fp32 there"),
)
_LIBRARIES: Final[Mapping[str, tuple[str, str]]] = {
    ORT: ("onnxruntime", "pip install onnxruntime"),
    OPENVINO: ("openvino", "pip install openvino"),
    EAGER: ("torch", "pip install 'dermaflux[export]'"),
}
"""Engine -> the module it needs, and the command that installs it."""


class Engine(Protocol):
    """Runs one part. Safe to call from several threads at once."""

    @property
    def name(self) -> str:
        """`onnxruntime-cpu`, `openvino-cpu` or `eager`."""
        ...

    @property
    def precision(self) -> str:
        """The precision of the file it runs: `fp32`, `int8`, ..."""
        ...

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """All inputs of the graph by name -> all its outputs by name, in arrays of their own."""
        ...

    def bind(self, constant: Arrays) -> Callable[[Arrays], dict[str, Array]]:
        """`run` with some inputs handed over once: those that stay the same over all steps.

        What comes back takes the others, and belongs to one thread.
        """
        ...


@dataclass(frozen=True)
class Choice:
    """Which engine runs which file of a part, and why; `rejected` are better ones, and why not."""

    part: str
    engine: str
    precision: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()


def choose(
    bundle: Bundle, part: str, engine: str | None = None, precision: str | None = None
) -> Choice:
    """The first of the order above that is installed, that the bundle allows, and that was asked.

    A forced precision that exists for other parts of the bundle only (int8 text encoders are not
    worth a file) falls back to fp32 for this part, and the reason says so.

    Raises:
        EngineError: an unknown, absent or forbidden engine, or an unknown precision.
    """
    if engine == EAGER:
        require(EAGER)
        return Choice(part, EAGER, "fp32", "asked for")
    if engine is not None:
        if engine not in _LIBRARIES:
            raise EngineError(f"engine {engine!r} is not known; use {', '.join(_LIBRARIES)}")
        require(engine)
    if part not in bundle.parts:
        raise EngineError(f"the bundle {bundle.name} has no part {part!r}")
    files = bundle.parts[part].files
    wanted = precision
    if precision is not None and precision not in files:
        everywhere = sorted({p for other in bundle.parts.values() for p in other.files})
        if precision not in everywhere or "fp32" not in files:
            raise EngineError(
                f"precision {precision!r} is not in {bundle.path}; it has {', '.join(everywhere)}"
            )
        wanted = "fp32"
    rejected: list[tuple[str, str]] = []
    for name, level, reason in _ORDER:
        if engine not in (None, name) or wanted not in (None, level):
            continue
        label = f"{name} {level}"
        if level not in files:
            rejected.append((label, f"the bundle has no {level} file of {part}"))
        elif name not in files[level].engines:
            rejected.append((label, f"the bundle does not allow {name} for its {level} file"))
        elif not installed(name):
            rejected.append((label, f"{_LIBRARIES[name][0]} is not installed"))
        else:
            if wanted != precision:
                reason = f"{part} has no {precision} file"
            elif engine is not None or precision is not None:
                reason = "asked for"
            return Choice(part, name, level, reason, tuple(rejected))
    tried = "; ".join(f"{label}: {why}" for label, why in rejected)
    installs = " or ".join(_LIBRARIES[name][1] for name in (OPENVINO, ORT))
    raise EngineError(f"no engine can run {part} ({tried}). Install one: {installs}")


def load(
    bundle: Bundle, choice: Choice, *, checkpoint: Path | None = None, threads: int | None = None
) -> Engine:
    """Make the engine of a choice; `threads` is per engine, all usable cores without it.

    Raises:
        EngineError: it cannot open the file, or `eager` has no checkpoint.
    """
    if choice.engine == EAGER:
        if checkpoint is None:
            raise EngineError("the eager engine runs a checkpoint; name its folder")
        from dermaflux.engines.eager import load as load_eager

        return load_eager(checkpoint, choice.part, threads=threads)
    graph = bundle.file(bundle.parts[choice.part].files[choice.precision].path)
    if choice.engine == OPENVINO:
        from dermaflux.engines.ov import OpenVinoEngine

        return OpenVinoEngine(graph, choice.precision, threads)
    from dermaflux.engines.ort import OrtEngine

    return OrtEngine(graph, choice.precision, threads)


def installed(engine: str) -> bool:
    """Whether the library of an engine is there; it is not imported."""
    return importlib.util.find_spec(_LIBRARIES[engine][0]) is not None


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the CPU quota of its container (cgroup v2).

    ONNX Runtime counts the host's cores, and then a container of 2 fights with 64 threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return cores or 1
    return max(1, min(cores or 1, allowed))


def require(engine: str) -> None:
    """Raise an EngineError with the command that installs the library of an engine, if absent."""
    if not installed(engine):
        module, command = _LIBRARIES[engine]
        raise EngineError(f"engine {engine} needs {module}, which is not installed; {command}")
