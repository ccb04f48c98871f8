"""TensorRT's own plans on an NVIDIA GPU, without torch; CUDA graphs where a plan has one shape.

`python -m export.compile BUNDLE` builds the plans; this opens them, and only where hardware, graph
and plan are those of the sidecar. Arrays are copied to buffers that stay at one address, so what is
bound once is copied once, and a plan of one shape is captured after its first run and from then on
launched as one CUDA graph.

What has run: every line against a stand-in for TensorRT and for CUDA (`tests/fake_tensorrt.py`),
whose names and parameters are compared with those of the real bindings 10.15, 10.16 and 11.4. What
has not: TensorRT itself, and a GPU.

A plan of one shape is faster at its shape than one for all shapes, so where both are built each
call takes the one that fits it; every plan in use holds weights of its own.

    >>> engine = load(bundle, "transformer", "fp8")
    >>> engine.run({"hidden_states": tokens, ...})["out_hidden_states"]
"""

from __future__ import annotations

import logging
import mmap
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

import numpy as np

from dermaflux.bundle import Bundle
from dermaflux.engines import TENSORRT, Array, Arrays
from dermaflux.engines.cuda import Cuda
from dermaflux.engines.trt_api import ICudaEngine, TensorRT, import_tensorrt, logger
from dermaflux.engines.trt_plan import (
    DYNAMIC,
    Hardware,
    Plan,
    Range,
    command,
    open_plan,
    plan_path,
    read_sidecar,
    variants,
)
from dermaflux.engines.trt_slot import Slot
from dermaflux.errors import EngineError

log = logging.getLogger(__name__)


_DTYPES: Final[Mapping[str, type[np.generic]]] = {"FLOAT": np.float32, "INT64": np.int64}
"""What our graphs take and give, by TensorRT's names; bundles know no other."""


def load(
    bundle: Bundle,
    part: str,
    precision: str,
    *,
    variant: str | None = None,
    trt: TensorRT | None = None,
    cuda: Cuda | None = None,
) -> TrtEngine | TrtPlans:
    """The engine of a part's plans for this machine.

    `variant` is `dynamic` or a static `<height>x<width>x<batch>`, and all that are there without
    it; `trt` and `cuda` stand in for the real ones in tests.

    Raises:
        EngineError: no TensorRT or GPU here, or no plan that may be opened here; with the command.
    """
    api: TensorRT = trt if trt is not None else import_tensorrt()
    device = cuda if cuda is not None else Cuda()
    hardware = Hardware.of(api.__version__, device)

    def opened(which: str) -> TrtEngine:
        plan = open_plan(bundle, part, precision, hardware, which)
        return TrtEngine(plan, command(bundle, part, precision, which), api, device)

    if variant is not None:
        return opened(variant)
    built = variants(bundle, hardware, part, precision)
    if built in ([], [DYNAMIC]):
        return opened(DYNAMIC)
    profiles = {
        which: read_sidecar(plan_path(bundle, hardware, part, precision, which)).profile
        for which in built
    }
    return TrtPlans(precision, profiles, opened, command(bundle, part, precision))


class TrtPlans:
    """Plans of one graph for several shapes: each call runs on the first that takes its shapes,
    static ones before the one for all. A plan is opened at its first call, and stays."""

    name = TENSORRT

    def __init__(
        self,
        precision: str,
        profiles: Mapping[str, Mapping[str, Range]],
        opened: Callable[[str], TrtEngine],
        rebuild: str,
    ) -> None:
        self.precision = precision
        self._profiles = dict(sorted(profiles.items(), key=lambda item: item[0] == DYNAMIC))
        self._opened = opened
        self._rebuild = rebuild
        self._engines: dict[str, TrtEngine] = {}
        self._lock = threading.Lock()

    @property
    def replays(self) -> int:
        """See `TrtEngine.replays`."""
        return sum(engine.replays for engine in list(self._engines.values()))

    @property
    def open_variants(self) -> tuple[str, ...]:
        """The plans that are in use."""
        return tuple(self._engines)

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`."""
        return self._fitting(inputs).run(inputs)

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`: what stays the same tells the shape of the rest."""
        return self._fitting(constant).bind(constant, timesteps)

    def _fitting(self, inputs: Arrays) -> TrtEngine:
        for variant, profile in self._profiles.items():
            if all(name in profile and profile[name].takes(v.shape) for name, v in inputs.items()):
                with self._lock:
                    if variant not in self._engines:
                        self._engines[variant] = self._opened(variant)
                    return self._engines[variant]
        shapes = {name: value.shape for name, value in inputs.items()}
        raise EngineError(
            f"none of the plans ({', '.join(self._profiles)}) takes {shapes}. {self._rebuild}"
        )


class TrtEngine:
    """A plan in TensorRT. Weights are on the device once; every call in flight has a context.

    Raises:
        EngineError: TensorRT refuses the plan; at `run`, inputs that it does not take, no memory
            left, or an error of CUDA.
    """

    name = TENSORRT

    def __init__(self, plan: Plan, rebuild: str, trt: TensorRT, cuda: Cuda) -> None:
        self.precision = plan.sidecar.precision
        self.plan = plan
        self._rebuild = rebuild
        self._cuda = cuda
        self._said: list[str] = []
        # TensorRT keeps no reference of its own to these two.
        self._logger = logger(trt, log, self._said)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._open(plan.path)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._dtypes = {name: self._dtype(name) for name in names}
        modes = {name: self._engine.get_tensor_mode(name).name for name in names}
        self._inputs = [name for name in names if modes[name] == "INPUT"]
        self._outputs = [name for name in names if modes[name] == "OUTPUT"]
        if set(self._inputs) != set(plan.sidecar.profile):
            raise EngineError(
                f"{plan.path} takes {sorted(self._inputs)}, its sidecar says "
                f"{sorted(plan.sidecar.profile)}. {rebuild}"
            )
        self._idle: SimpleQueue[Slot] = SimpleQueue()
        self._slots: weakref.WeakSet[Slot] = weakref.WeakSet()

    @property
    def replays(self) -> int:
        """How often a CUDA graph was launched: proof that graphs are in use."""
        return sum(slot.replays for slot in list(self._slots))

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`; a context is one thread's, so that idle ones are kept for the next."""
        self._check(inputs)
        slot = self._take()
        try:
            return slot.run(inputs)
        finally:
            self._idle.put(slot)

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`: the constant inputs are copied to a context's buffers now.

        The context is the caller's until what came back is dropped.
        """
        self._check(constant, partly=True)
        slot = self._take()
        try:
            slot.hold(constant)
        except BaseException:
            self._idle.put(slot)
            raise

        def step(varying: Arrays) -> dict[str, Array]:
            self._check(varying, partly=True)
            given = {*constant, *varying}
            if given != set(self._inputs) or len(given) != len(constant) + len(varying):
                raise EngineError(
                    f"{self.plan.path} takes {sorted(self._inputs)}; bound are "
                    f"{sorted(constant)}, handed over {sorted(varying)}"
                )
            return slot.run(varying)

        weakref.finalize(step, self._idle.put, slot).atexit = False
        return step

    def _take(self) -> Slot:
        try:
            return self._idle.get_nowait()
        except Empty:
            slot = Slot(
                self._engine, self._cuda, self.plan, self._dtypes, self._outputs, self._said
            )
            self._slots.add(slot)
            return slot

    def _open(self, path: Path) -> ICudaEngine:
        # Mapped, not read: a plan may be larger than what is left of the memory.
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            engine = self._runtime.deserialize_cuda_engine(m)
        if engine is None:
            raise EngineError(f"TensorRT cannot open {path}: {self._reason()}. {self._rebuild}")
        return engine

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind = self._engine.get_tensor_dtype(name).name
        place = self._engine.get_tensor_location(name).name
        if kind not in _DTYPES or place != "DEVICE":
            raise EngineError(
                f"{self.plan.path}: tensor {name} is {kind} in {place} memory; plans of ours take "
                f"{' and '.join(_DTYPES)} in DEVICE memory. {self._rebuild}"
            )
        return np.dtype(_DTYPES[kind])

    def _check(self, inputs: Arrays, partly: bool = False) -> None:
        """Names, types and shapes against the plan: TensorRT reads whatever lies at an address."""
        profile = self.plan.sidecar.profile
        if not (inputs.keys() <= profile.keys() if partly else inputs.keys() == profile.keys()):
            raise EngineError(f"{self.plan.path} takes {sorted(profile)}, not {sorted(inputs)}")
        for name, value in inputs.items():
            if value.dtype != self._dtypes[name]:
                raise EngineError(f"input {name} needs {self._dtypes[name]}, not {value.dtype}")
            if not profile[name].takes(value.shape):
                raise EngineError(
                    f"input {name} has the shape {value.shape}; {self.plan.path} takes "
                    f"{profile[name].min} to {profile[name].max}. {self._rebuild} and the bundle's "
                    "limits, or another --static"
                )

    def _reason(self) -> str:
        return self._said[-1] if self._said else "it gives no reason"
