"""OpenVINO on the CPU: one compiled model per part, one infer request per call in flight.

>>> OpenVinoEngine(Path("bundles/mini/transformer/model_int8.onnx"), "int8").run({...})
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from dermaflux.engines import OPENVINO, Array, Arrays, usable_cores
from dermaflux.errors import EngineError

_CONVERTER = "openvino.tools.ovc"

# OpenVINO goes without its model converter where there is none. It is not needed to run a model,
# and importing it takes a third of the time of all and brings a telemetry client along.
_absent = _CONVERTER not in sys.modules
if _absent:
    sys.modules[_CONVERTER] = None  # type: ignore[assignment]
try:
    import openvino
finally:
    if _absent:
        del sys.modules[_CONVERTER]


class OpenVinoEngine:
    """A graph in OpenVINO's CPU plugin.

    Raises:
        EngineError: the file is not a graph that this OpenVINO reads; at `run`, inputs that the
            graph does not take.
    """

    name = OPENVINO

    def __init__(self, graph: Path, precision: str, threads: int | None = None) -> None:
        self.precision = precision
        self._graph = graph
        settings = {
            # Without it a CPU with bf16 computes everything in bf16, and nobody is told.
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads or usable_cores()),
            # Threads tied to cores wait there for whoever else runs on them: on two busy cores the
            # same steps took 1.6 times as long, and a third more work for the spinning.
            "ENABLE_CPU_PINNING": "NO",
            # A compiled cache is a second artifact that can be stale; opening is fast without.
            "CACHE_DIR": "",
        }
        try:
            core = openvino.Core()
            self._model = core.compile_model(core.read_model(str(graph)), "CPU", settings)
        except Exception as error:  # OpenVINO raises RuntimeError and kinds of its own.
            raise EngineError(f"OpenVINO cannot open {graph}: {error}") from error
        self._inputs = {
            port.get_any_name(): port.get_element_type().to_dtype() for port in self._model.inputs
        }
        self._outputs = [port.get_any_name() for port in self._model.outputs]
        self._idle: SimpleQueue[Any] = SimpleQueue()

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`; a request is one thread's, so that idle ones are kept for the next."""
        self._check(inputs)
        try:
            request = self._idle.get_nowait()
        except Empty:
            request = self._model.create_infer_request()
        try:
            return self._infer(request, inputs)
        finally:
            self._idle.put(request)

    def bind(self, constant: Arrays) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`: the constant inputs are set on a request of its own."""
        request = self._model.create_infer_request()
        held = {name: np.ascontiguousarray(value) for name, value in constant.items()}
        try:
            for name, value in held.items():
                request.set_tensor(name, openvino.Tensor(value, shared_memory=True))
        except Exception as error:
            raise EngineError(f"OpenVINO cannot run {self._graph}: {error}") from error

        def step(varying: Arrays) -> dict[str, Array]:
            # `held` is the memory that the request reads, so it must live as long as this.
            self._check({**held, **varying})
            return self._infer(request, varying)

        return step

    def _infer(self, request: Any, inputs: Arrays) -> dict[str, Array]:
        ordered = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        try:
            results = request.infer(ordered, share_inputs=True, share_outputs=False)
        except Exception as error:
            raise EngineError(f"OpenVINO cannot run {self._graph}: {error}") from error
        return {name: results[index] for index, name in enumerate(self._outputs)}

    def _check(self, inputs: Arrays) -> None:
        """OpenVINO runs on what an input held before where one is left out, so refuse that."""
        if inputs.keys() != self._inputs.keys():
            raise EngineError(
                f"{self._graph} takes the inputs {sorted(self._inputs)}, not {sorted(inputs)}"
            )
        for name, value in inputs.items():
            if value.dtype != self._inputs[name]:
                raise EngineError(f"input {name} needs {self._inputs[name]}, not {value.dtype}")
