"""A graph in one of OpenVINO's plugins: one compiled model, one request per call.

>>> OpenVinoEngine(Path("bundles/mini/classifier/model_int8.onnx"), "int8").run({...})
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from dermaflux.engines import OPENVINO, Array, Arrays, usable_cores
from dermaflux.engines.ov_graph import read
from dermaflux.engines.ov_inputs import require_inputs
from dermaflux.engines.ov_library import core, openvino
from dermaflux.engines.ov_settings import DEVICES, computes, has_bf16, told
from dermaflux.engines.ov_streams import MOST, Streams
from dermaflux.errors import EngineError, translated

Shapes = Mapping[str, tuple[int, ...]]

log = logging.getLogger(__name__)


class OpenVinoEngine:
    """A graph in one of OpenVINO's plugins. With `shapes` it takes inputs of these shapes only.

    With `outputs` it gives these alone, and computes no others. `bf16` is the share of the largest
    output by which bf16 may be off fp32, where a CPU has it; without it no bf16 is tried. `note`
    is a sentence on what came of that, or empty. With `batches` those of `run` are cut over the
    cores of a CPU (`dermaflux.engines.ov_streams`); all inputs must begin with the batch's axis.
    `rewrites` changes the model before it is compiled.

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
        outputs: Collection[str] | None = None,
        bf16: float | None = None,
        batches: bool = False,
        rewrites: Callable[[Any], object] | None = None,
    ) -> None:
        self.name = name
        self.precision = precision
        self.note = ""
        self._graph = graph
        device = DEVICES[name]
        settings = told(device, precision, threads)
        with translated(EngineError, f"OpenVINO cannot open {graph}"):
            self.computes = computes(device, precision)
            """OpenVINO's name of the numbers it computes in."""
            model = read(core(), graph, outputs, device)
            if rewrites is not None:
                rewrites(model)
            if shapes is not None:
                model.reshape({key: list(shape) for key, shape in shapes.items()})
            self._model = core().compile_model(model, device, settings)
            if bf16 is not None and device == "CPU" and has_bf16():
                lower = core().compile_model(
                    model, device, {**settings, "INFERENCE_PRECISION_HINT": "bf16"}
                )
                off = _difference(self._model, lower)
                # Not `>`: what is no number is not near either.
                if off <= bf16:
                    self._model, self.computes = lower, "bf16"
                    self.note = f"what is not in 8 bits is in bf16, {off:.1e} from fp32"
                else:
                    self.note = f"fp32, for bf16 is {off:.1e} of the largest output off here"
                log.info("%s: %s", graph, self.note)
        self._inputs = {
            port.get_any_name(): port.get_element_type().to_dtype() for port in self._model.inputs
        }
        self._outputs = [port.get_any_name() for port in self._model.outputs]
        settings["INFERENCE_PRECISION_HINT"] = self.computes
        cores = threads or usable_cores()
        self._streams: Streams | None = None
        if batches and device == "CPU" and cores > 1:
            count = min(cores, MOST)
            beside = {**settings, "NUM_STREAMS": str(count), "PERFORMANCE_HINT": "THROUGHPUT"}
            # Read anew: a model that is kept until a batch comes would hold its weights twice.
            self._streams = Streams(
                lambda: core().compile_model(read(core(), graph, outputs, device), device, beside),
                count,
            )
        self._idle: SimpleQueue[Any] = SimpleQueue()

    def compiled(self) -> tuple[Any, ...]:
        """What is compiled: one model."""
        return (self._model,)

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`; a request is one thread's, so that idle ones are kept for the next."""
        require_inputs(self._graph, self._inputs, inputs)
        if self._streams is not None and self._streams.take(inputs):
            with translated(EngineError, f"OpenVINO cannot run {self._graph}"):
                return self._streams.run(inputs, self._outputs)
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
            require_inputs(self._graph, self._inputs, {**held, **varying})
            return self._infer(request, varying)

        return step

    def _infer(self, request: Any, inputs: Arrays) -> dict[str, Array]:
        ordered = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        with translated(EngineError, f"OpenVINO cannot run {self._graph}"):
            results = request.infer(ordered, share_inputs=True, share_outputs=False)
        return {name: results[index] for index, name in enumerate(self._outputs)}


def _difference(model: Any, other: Any) -> float:
    """The largest difference of any output of two compiled models, relative to that output's
    largest, on one item of noise: equal on every machine and at every start."""
    random = np.random.default_rng(0)
    inputs = {}
    for port in model.inputs:
        axes = port.get_partial_shape()
        shape = [1 if axis.is_dynamic else axis.get_length() for axis in axes]
        inputs[port.get_any_name()] = random.standard_normal(shape, dtype=np.float32)
    one, two = (list(compiled(inputs).values()) for compiled in (model, other))
    # Not Python's max, which drops what is no number unless it is the first.
    return float(
        np.max(
            [
                np.abs(a - b).max() / max(np.abs(a).max(), 1e-12)
                for a, b in zip(one, two, strict=True)
            ]
        )
    )
