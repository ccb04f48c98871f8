"""Engines: named arrays in, named arrays out, whoever computes.

The pipeline cannot tell one engine from another. `choose` says which one runs a part and why;
`load` makes it. Only then is the engine's library imported. Engines open files of this machine and
nothing else.

    >>> choice = choose(bundle, "transformer")
    >>> choice.engine, choice.precision, choice.reason
    ('openvino-cpu', 'int8', 'int8 on OpenVINO is the fastest on a CPU')
    >>> load(bundle, choice).run({"hidden_states": tokens, ...})["out_hidden_states"]
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from dermaflux.bundle import Bundle
from dermaflux.errors import EngineError
from dermaflux.hardware import Machine, look, usable_cores
from dermaflux.tiers import Tier

__all__ = [
    "EAGER",
    "ENGINES",
    "OPENVINO",
    "OPENVINO_GPU",
    "OPENVINO_NPU",
    "ORT",
    "ORT_CUDA",
    "ORT_TENSORRT",
    "TENSORRT",
    "Array",
    "Arrays",
    "Choice",
    "Engine",
    "choose",
    "installed",
    "load",
    "require",
    "usable_cores",
]

Array = NDArray[Any]
Arrays = Mapping[str, Array]

ORT: Final = "onnxruntime-cpu"
ORT_CUDA: Final = "onnxruntime-cuda"
ORT_TENSORRT: Final = "onnxruntime-tensorrt"
OPENVINO: Final = "openvino-cpu"
OPENVINO_GPU: Final = "openvino-gpu"
OPENVINO_NPU: Final = "openvino-npu"
TENSORRT: Final = "tensorrt"
EAGER: Final = "eager"

_LIBRARIES: Final[Mapping[str, tuple[str, str]]] = {
    ORT: ("onnxruntime", "pip install onnxruntime"),
    OPENVINO: ("openvino", "pip install openvino"),
    EAGER: ("torch", "pip install 'dermaflux[export]'"),
    TENSORRT: ("tensorrt", "pip install 'dermaflux[tensorrt]', from NVIDIA's package index"),
    ORT_TENSORRT: ("onnxruntime", "pip install 'dermaflux[gpu]'"),
    ORT_CUDA: ("onnxruntime", "pip install 'dermaflux[gpu]'"),
    OPENVINO_GPU: ("openvino", "pip install openvino"),
    OPENVINO_NPU: ("openvino", "pip install openvino"),
}
"""Engine -> the module it needs, and the command that installs it."""

ENGINES: Final = tuple(_LIBRARIES)
"""All that may be asked for, by name."""


class Engine(Protocol):
    """Runs one part. Safe to call from several threads at once."""

    @property
    def name(self) -> str:
        """One of `ENGINES`."""
        ...

    @property
    def precision(self) -> str:
        """The precision of the file it runs: `fp32`, `int8`, ..."""
        ...

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """All inputs of the graph by name -> all its outputs by name, in arrays of their own."""
        ...

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """`run` with some inputs handed over once: those that stay the same over all steps.

        What comes back takes the others, and belongs to one thread. `timesteps`, float32 [B, K],
        has what the next calls will be given as `timestep`, bit for bit and in order, a row per
        item; a row that ends sooner repeats its last, and some may be passed over
        (`dermaflux.forecast`). An engine may compute ahead what depends on them and on `constant`
        alone, and may ignore them. A call with other timesteps is right too.
        """
        ...


@dataclass(frozen=True)
class Choice:
    """Which engine runs which file of a part, and why; `rejected` are better ones, and why not.

    `device` is torch's name of it (`cpu`, `cuda:0`), and says for other engines where they run.
    """

    part: str
    engine: str
    precision: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    device: str = "cpu"


def choose(
    bundle: Bundle,
    part: str,
    engine: str | None = None,
    precision: str | None = None,
    machine: Machine | None = None,
    *,
    device: str | None = None,
    tier: Tier | None = None,
) -> Choice:
    """The fastest that this machine has, that the bundle allows, and that was asked for.

    A forced precision that exists for other parts of the bundle only (int8 text encoders are not
    worth a file) leaves this part to the order of speed, and the reason says so. `machine` is this
    one if not given; `device` is for `eager` alone. A `tier` allows its own
    precisions, and of them the order of speed takes the first.

    Raises:
        EngineError: an unknown, absent or forbidden engine, an unknown precision, or one that
            contradicts the tier; with what was rejected, why, and what to install.
    """
    from dermaflux.engines.order import pick

    if engine is not None and engine not in ENGINES:
        raise EngineError(f"engine {engine!r} is not known; use {', '.join(ENGINES)}")
    if device is not None and engine != EAGER:
        raise EngineError(f"device {device!r} cannot be chosen for {engine or 'these engines'}; "
                          f"it is for {EAGER}. Others have it in their names")  # fmt: skip
    if engine is not None:
        require(engine)
    if engine == EAGER:
        place = device or "cpu"
        level = tier.of_torch(place, precision) if tier is not None else precision or "fp32"
        return Choice(part, EAGER, level, "asked for", (), place)
    return pick(bundle, part, engine, precision, machine or look(), tier)


def load(
    bundle: Bundle,
    choice: Choice,
    *,
    checkpoint: Path | None = None,
    threads: int | None = None,
    compile: bool = False,
    fast: bool = False,
    outputs: Collection[str] | None = None,
    size: tuple[int, int] | None = None,
) -> Engine:
    """Make the engine of a choice; `threads` is per engine, all usable cores without it. Where only
    some `outputs` are read, an engine may leave out the others. `size` is height and width in
    pixels of what will be drawn first, the bundle's default if not given: an engine may be ready
    for it sooner, and gives the same numbers.

    `checkpoint`, `compile` (torch.compile) and `fast` (our own forward, `dermaflux.engines.flux`,
    instead of diffusers') are for `eager` alone.

    Raises:
        EngineError: it cannot open the file, or `eager` has no checkpoint.
    """
    if choice.engine == EAGER:
        if checkpoint is None:
            raise EngineError(
                "the eager engine runs the weights of a checkpoint; name its folder with "
                "--checkpoint"
            )
        from dermaflux.engines import eager

        return eager.load(
            checkpoint,
            choice.part,
            precision=choice.precision,
            device=choice.device,
            compile=compile,
            threads=threads,
            fast=fast,
        )
    if choice.engine == TENSORRT:
        from dermaflux.engines import trt

        return trt.load(bundle, choice.part, choice.precision)
    graph = bundle.file(bundle.parts[choice.part].files[choice.precision].path)
    if choice.engine in (ORT_CUDA, ORT_TENSORRT):
        from dermaflux.engines import ort_gpu

        return ort_gpu.load(bundle, choice)
    if choice.engine == ORT:
        from dermaflux.engines.ort import OrtEngine

        return OrtEngine(graph, choice.precision, threads)
    from dermaflux.engines import ov

    return ov.load(bundle, choice, threads, outputs, size)


def installed(engine: str) -> bool:
    """Whether the library of an engine is there; it is not imported."""
    return importlib.util.find_spec(_LIBRARIES[engine][0]) is not None


def require(engine: str) -> None:
    """Raise an EngineError with the command that installs the library of an engine, if absent."""
    if not installed(engine):
        module, command = _LIBRARIES[engine]
        raise EngineError(f"engine {engine} needs {module}, which is not installed; {command}")


def library(engine: str) -> tuple[str, str]:
    """The module that an engine needs, and the command that installs it."""
    return _LIBRARIES[engine]
