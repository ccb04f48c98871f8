"""OpenVINO on a CPU, or on Intel's GPU or NPU: one compiled model per part, one request per call.

>>> OpenVinoEngine(Path("bundles/mini/transformer/model_int8.onnx"), "int8").run({...})

A CPU computes in fp32, and in int8 where the graph says so. Its hint for bf16 is left alone in the
generator: it was 1.8 times as fast on the embedded default's transformer (AVX-512 BF16), and 24 %
of the largest output off in a single step, where eager torch in bf16 is 0.7 % off: the hint takes
positions and times down with it. A classifier has neither, so its int8 and bf16 files are computed
in bf16 where the processor has it, if what comes out is near
fp32's on the engine's own trial. GPU and NPU compute files below fp32 in fp16. An NPU compiles for
one shape, so there a part takes the bundle's default size, one image at a time. What has run: the
CPU. GPU and NPU have not; their settings are tested with a stand-in for OpenVINO.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
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
from dermaflux.engines.ov_decoder import Decoder, rewrite
from dermaflux.engines.ov_denoiser import STEPPING, Denoiser
from dermaflux.engines.ov_graph import read
from dermaflux.engines.ov_library import core as core
from dermaflux.engines.ov_library import openvino
from dermaflux.engines.ov_rewrite import attentions, joined
from dermaflux.engines.ov_shapes import MOST_FIXED_BYTES
from dermaflux.engines.ov_split import split
from dermaflux.engines.ov_streams import MOST, Streams
from dermaflux.engines.sizes import shape_of, sizes
from dermaflux.errors import EngineError, translated

_DEVICES: Final[Mapping[str, str]] = {OPENVINO: "CPU", OPENVINO_GPU: "GPU", OPENVINO_NPU: "NPU"}

Shapes = Mapping[str, tuple[int, ...]]

log = logging.getLogger(__name__)

LOW: Final = ("int8", "int8-pruned", "bf16")
"""Precisions of a classifier that a CPU may compute in bf16 what is not in 8 bits."""
_TOLERANCE: Final = 0.1
"""Share of the largest output by which bf16 may be off where the bundle does not tell: the export's
bound for bf16 (`export.parity`)."""


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
        device = _DEVICES[name]
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
        self._check(inputs)
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


def told(device: str, precision: str, threads: int | None = None) -> dict[str, str]:
    """What a device is told when it compiles a file of a precision."""
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        # A compiled cache is a second artifact that can be stale; opening is fast without.
        "CACHE_DIR": "",
        # Without it a CPU with bf16 computes everything in bf16, and nobody is told.
        "INFERENCE_PRECISION_HINT": computes(device, precision),
    }
    if device == "CPU":
        settings |= {
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads or usable_cores()),
            # Threads tied to cores wait there for whoever else runs on them: on two busy cores
            # the same steps took 1.6 times as long, and a third more work for the spinning.
            "ENABLE_CPU_PINNING": "NO",
        }
    return settings


def opened(graph: Path, precision: str, threads: int | None = None) -> OpenVinoEngine | Denoiser:
    """A graph on the CPU: a Flux transformer with what does not change from step to step taken out
    of the step (`dermaflux.engines.ov_denoiser`), and any other as it is.

    Raises:
        EngineError: the file is not a graph that this OpenVINO reads.
    """
    with translated(EngineError, f"OpenVINO cannot open {graph}"):
        model = read(core(), graph)
        names = {port.get_any_name() for port in model.inputs}
        found = None
        if set(STEPPING) <= names:
            kinds = {
                port.get_any_name(): port.get_element_type().to_dtype() for port in model.inputs
            }
            attentions(model)
            joined(model)
            found = split(model)
    if found is None:
        # As `load` has it: what is compared is what will run.
        rewrites = rewrite if names == {"latent_sample"} else None
        return OpenVinoEngine(graph, precision, threads, rewrites=rewrites)
    settings = told("CPU", precision, threads)
    return Denoiser(
        graph,
        OPENVINO,
        precision,
        found,
        kinds,
        lambda one: core().compile_model(one, "CPU", settings),
        _bytes(graph) <= MOST_FIXED_BYTES,
    )


def _bytes(graph: Path) -> int:
    """Of a graph and of the weights beside it."""
    beside = graph.with_name(f"{graph.name}.data")
    return graph.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def computes(device: str, precision: str) -> str:
    """What a file of a precision is computed in on a device: `f32` or `f16`.

    int8 and fp8 are operators of the graph; this is for all others.
    """
    return "f32" if device == "CPU" or precision == "fp32" else "f16"


def has_bf16() -> bool:
    """Whether the processor has instructions for bf16, and does not only know the numbers."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


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


def load(
    bundle: Bundle,
    choice: Choice,
    threads: int | None = None,
    outputs: Collection[str] | None = None,
) -> OpenVinoEngine | Denoiser | Decoder:
    """The engine of a choice of one of OpenVINO's devices; `outputs` as in `OpenVinoEngine`.

    Raises:
        EngineError: see `OpenVinoEngine`.
    """
    part = bundle.parts[choice.part]
    file = part.files[choice.precision]
    if choice.part == "transformer" and choice.engine == OPENVINO:
        made = opened(bundle.file(file.path), choice.precision, threads)
        if isinstance(made, Denoiser):
            made.prepare(_usual(bundle, choice.part))
        return made
    if choice.part == "vae_decoder" and choice.engine == OPENVINO:
        graph = bundle.file(file.path)
        return Decoder(
            lambda shapes: OpenVinoEngine(
                graph, choice.precision, threads, shapes=shapes, rewrites=rewrite
            ),
            _usual(bundle, choice.part),
        )
    shapes = _usual(bundle, choice.part) if choice.engine == OPENVINO_NPU else None
    bf16 = None
    if choice.part == "classifier" and choice.precision in LOW:
        bf16 = _TOLERANCE if file.parity is None else file.parity.tolerance
    return OpenVinoEngine(
        bundle.file(file.path),
        choice.precision,
        threads,
        name=choice.engine,
        shapes=shapes,
        outputs=outputs,
        bf16=bf16,
        batches=choice.part == "classifier",
    )


def _usual(bundle: Bundle, part: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a part's inputs for one picture of the bundle's usual size."""
    defaults = bundle.defaults
    free = sizes(bundle.model.scale, 1, defaults.height, defaults.width)
    return {tensor.name: shape_of(tensor, free) for tensor in bundle.parts[part].inputs}
