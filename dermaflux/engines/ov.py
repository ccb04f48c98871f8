"""OpenVINO on a CPU, or on Intel's GPU or NPU: one compiled model per part, one request per call.

>>> OpenVinoEngine(Path("bundles/mini/transformer/model_int8.onnx"), "int8").run({...})

A CPU computes in fp32, and in int8 where the graph says so. Its hint for bf16 is left alone: it was
1.8 times as fast on the embedded default's transformer (AVX-512 BF16), and 24 % of the largest
output off in a single step, where eager torch in bf16 is 0.7 % off: the hint takes positions and
times down with it. GPU and NPU compute files below fp32 in fp16. An NPU compiles for one shape, so
there a part takes the bundle's default size, one image at a time. What has run: the CPU. GPU and
NPU have not; their settings are tested with a stand-in for OpenVINO.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

import numpy as np

from dermaflux.bundle import Bundle
from dermaflux.engines import (
    OPENVINO,
    OPENVINO_GPU,
    OPENVINO_NPU,
    Array,
    Arrays,
    Choice,
    usable_cores,
)
from dermaflux.engines.sizes import shape_of, sizes
from dermaflux.errors import EngineError, translated

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

# The binding makes its table of types at the first question, under a lock of its own and without
# letting Python's go: two threads that ask first at once wait for each other for ever.
openvino.Type.f32.to_dtype()

_DEVICES: Final[Mapping[str, str]] = {OPENVINO: "CPU", OPENVINO_GPU: "GPU", OPENVINO_NPU: "NPU"}

Shapes = Mapping[str, tuple[int, ...]]


class OpenVinoEngine:
    """A graph in one of OpenVINO's plugins. With `shapes` it takes inputs of these shapes only.

    Raises:
        EngineError: the file is not a graph that this OpenVINO reads; at `run`, inputs that the
            graph does not take.
    """

    def __init__(
        self,
        graph: Path,
        precision: str,
        threads: int | None = None,
        *,
        name: str = OPENVINO,
        shapes: Shapes | None = None,
    ) -> None:
        self.name = name
        self.precision = precision
        self._graph = graph
        device = _DEVICES[name]
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            # A compiled cache is a second artifact that can be stale; opening is fast without.
            "CACHE_DIR": "",
        }
        if device == "CPU":
            settings |= {
                "NUM_STREAMS": "1",
                "INFERENCE_NUM_THREADS": str(threads or usable_cores()),
                # Threads tied to cores wait there for whoever else runs on them: on two busy cores
                # the same steps took 1.6 times as long, and a third more work for the spinning.
                "ENABLE_CPU_PINNING": "NO",
            }
        with translated(EngineError, f"OpenVINO cannot open {graph}"):
            core = openvino.Core()
            # Without it a CPU with bf16 computes everything in bf16, and nobody is told.
            self.computes = computes(device, precision)
            """OpenVINO's name of the numbers it computes in."""
            settings["INFERENCE_PRECISION_HINT"] = self.computes
            model = core.read_model(str(graph))
            if shapes is not None:
                model.reshape({key: list(shape) for key, shape in shapes.items()})
            self._model = core.compile_model(model, device, settings)
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

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`: the constant inputs are set on a request of its own."""
        request = self._model.create_infer_request()
        held = {name: np.ascontiguousarray(value) for name, value in constant.items()}
        with translated(EngineError, f"OpenVINO cannot run {self._graph}"):
            for name, value in held.items():
                request.set_tensor(name, openvino.Tensor(value, shared_memory=True))

        def step(varying: Arrays) -> dict[str, Array]:
            # `held` is the memory that the request reads, so it must live as long as this.
            self._check({**held, **varying})
            return self._infer(request, varying)

        return step

    def _infer(self, request: Any, inputs: Arrays) -> dict[str, Array]:
        ordered = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        with translated(EngineError, f"OpenVINO cannot run {self._graph}"):
            results = request.infer(ordered, share_inputs=True, share_outputs=False)
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


def computes(device: str, precision: str) -> str:
    """What a file of a precision is computed in on a device: `f32` or `f16`.

    int8 and fp8 are operators of the graph; this is for all others.
    """
    return "f32" if device == "CPU" or precision == "fp32" else "f16"


def load(bundle: Bundle, choice: Choice, threads: int | None = None) -> OpenVinoEngine:
    """The engine of a choice of one of OpenVINO's devices.

    Raises:
        EngineError: see `OpenVinoEngine`.
    """
    part = bundle.parts[choice.part]
    shapes = None
    if choice.engine == OPENVINO_NPU:
        defaults = bundle.defaults
        free = sizes(bundle.model.scale, 1, defaults.height, defaults.width)
        shapes = {tensor.name: shape_of(tensor, free) for tensor in part.inputs}
    graph = bundle.file(part.files[choice.precision].path)
    return OpenVinoEngine(graph, choice.precision, threads, name=choice.engine, shapes=shapes)
