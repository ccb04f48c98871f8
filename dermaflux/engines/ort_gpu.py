"""ONNX Runtime on an NVIDIA GPU: its CUDA and TensorRT providers, over memory that stays there.

Inputs and outputs are bound to memory of the device, which is kept per set of shapes: what is bound
once is copied once, and with the CUDA provider a step is captured as a CUDA graph at its third run
and launched as one from then on.

    >>> load(bundle, choose(bundle, "transformer", "onnxruntime-cuda", "fp16"))

What has run: the binding of memory, on the CPU provider; all else against a stand-in for ONNX
Runtime. What has not: a GPU.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from dermaflux.bundle import Bundle
from dermaflux.engines import ORT_CUDA, ORT_TENSORRT, Array, Arrays, Choice, ort_trt
from dermaflux.engines.ort_trt import Provider
from dermaflux.errors import EngineError, translated

log = logging.getLogger(__name__)

CUDA: Final = "CUDAExecutionProvider"
_MOST_SHAPES: Final = 8
"""Sets of shapes whose memory is kept; a service that offers more sizes copies again."""
_MOST_GRAPHS: Final = 32
"""CUDA graphs of a session, which keeps each for as long as it lives."""


class OrtGpuEngine:
    """A graph in ONNX Runtime over bound memory. Calls from several threads take turns.

    `device` is where ONNX Runtime has its memory: `cuda`, or `cpu` in tests.

    Raises:
        EngineError: the file cannot be opened, or the provider cannot be had (ONNX Runtime itself
            would go on with the CPU); at `run`, inputs that the graph does not take.
    """

    def __init__(
        self,
        graph: Path,
        precision: str,
        providers: Sequence[Provider],
        *,
        name: str = ORT_CUDA,
        device: str = "cuda",
    ) -> None:
        self.name = name
        self.precision = precision
        self.graphs = False
        """Whether CUDA graphs are captured."""
        self._graph = graph
        self._device = device
        self._session = self._open(graph, list(providers))
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._slots: OrderedDict[tuple[Any, ...], _Slot] = OrderedDict()
        self._ids = itertools.count(1)
        # One device computes one call at a time, and a session that captures must not share runs.
        self._lock = threading.Lock()

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`."""
        return self.bind({})(inputs)

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`: constant inputs are copied to the device at the first step.

        Another call with the same shapes may take the memory over in between; then they are copied
        once more.
        """
        held = {name: np.ascontiguousarray(value) for name, value in constant.items()}
        owner = object()

        def step(varying: Arrays) -> dict[str, Array]:
            moving = {name: np.ascontiguousarray(value) for name, value in varying.items()}
            everything = {**held, **moving}
            with self._lock:
                done = False
                try:
                    with translated(EngineError, f"{self.name} cannot run {self._graph}"):
                        slot = self._slot(everything)
                        slot.put(moving if slot.owner is owner else everything)
                        slot.owner = owner
                        outputs = slot.run()
                    done = True
                    return outputs
                finally:
                    if not done:
                        self._slots.clear()

        return step

    def _open(self, graph: Path, providers: list[Provider]) -> Any:
        options = onnxruntime.SessionOptions()
        options.use_deterministic_compute = True
        options.log_severity_level = 3

        def opened(providers: list[Provider]) -> Any:
            with translated(EngineError, f"{self.name} cannot open {graph}"):
                return onnxruntime.InferenceSession(str(graph), options, providers=providers)

        try:
            session = opened(providers)
            self.graphs = any(o.get("enable_cuda_graph") == "1" for _, o in providers)
        except EngineError as error:
            # A graph with work for the CPU in it cannot be captured. That is no reason not to run
            # it, and none to keep quiet.
            if [name for name, _ in providers] != [CUDA]:
                raise
            session = opened([(name, {**o, "enable_cuda_graph": "0"}) for name, o in providers])
            log.warning("%s runs without CUDA graphs: %s", graph, error.__cause__)
        first = providers[0][0]
        if first not in session.get_providers():
            raise EngineError(
                f"ONNX Runtime has no {first} here, and would run {graph} on the CPU. Libraries of "
                "CUDA or cuDNN are missing or of another version: pip install "
                "'onnxruntime-gpu[cuda,cudnn]'"
            )
        return session

    def _slot(self, arrays: Arrays) -> _Slot:
        """The memory for arrays of these shapes; the one not used for longest makes room."""
        key = tuple(sorted((n, a.shape, a.dtype.str) for n, a in arrays.items()))
        if key not in self._slots:
            while len(self._slots) >= _MOST_SHAPES:
                self._slots.popitem(last=False)
            number = next(self._ids) if self.graphs else _MOST_GRAPHS + 1
            graph_id = number if number <= _MOST_GRAPHS else -1
            self._slots[key] = _Slot(self._session, arrays, self._outputs, self._device, graph_id)
        self._slots.move_to_end(key)
        return self._slots[key]


class _Slot:
    """Memory of the device for one set of shapes, at addresses that a CUDA graph may hold."""

    def __init__(
        self, session: Any, arrays: Arrays, outputs: list[str], device: str, graph_id: int
    ) -> None:
        self.owner: object = None
        self._session = session
        self._device = device
        self._names = outputs
        self._graph_id = graph_id
        self._binding = session.io_binding()
        # A copy: in the CPU's memory ONNX Runtime writes later inputs into the caller's array.
        self._inputs = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array.copy(), device, 0)
            for name, array in arrays.items()
        }
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name in outputs:
            self._binding.bind_output(name, device, 0)
        self._held: list[Any] = []

    def put(self, arrays: Arrays) -> None:
        """Copy arrays to where their inputs are."""
        for name, array in arrays.items():
            self._inputs[name].update_inplace(array)

    def run(self) -> dict[str, Array]:
        """Compute; outputs are copied to memory of the caller's."""
        options = onnxruntime.RunOptions()
        # The first run finds the outputs' shapes, so nothing is captured yet: -1.
        options.add_run_config_entry("gpu_graph_id", str(self._graph_id if self._held else -1))
        self._session.run_with_iobinding(self._binding, options)
        found = self._held or self._binding.get_outputs()
        arrays = {n: np.array(v.numpy()) for n, v in zip(self._names, found, strict=True)}
        if not self._held:
            self._held = [
                onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    array.shape, array.dtype, self._device, 0
                )
                for array in arrays.values()
            ]
            for name, value in zip(self._names, self._held, strict=True):
                self._binding.bind_ortvalue_output(name, value)
        return arrays


def load(bundle: Bundle, choice: Choice) -> OrtGpuEngine:
    """The engine of a choice of `onnxruntime-cuda` or `onnxruntime-tensorrt`.

    Raises:
        EngineError: see `OrtGpuEngine`.
    """
    if hasattr(onnxruntime, "preload_dlls"):
        # CUDA and cuDNN as Python packages are on no search path of the system's.
        onnxruntime.preload_dlls()
    graph = bundle.file(bundle.parts[choice.part].files[choice.precision].path)
    providers = [cuda_provider(graphs=choice.engine == ORT_CUDA)]
    if choice.engine == ORT_TENSORRT:
        ort_trt.preload()
        cache = ort_trt.cache_folder(bundle)
        providers = [ort_trt.provider(bundle, choice, cache), *providers]
    return OrtGpuEngine(graph, choice.precision, providers, name=choice.engine)


def cuda_provider(graphs: bool) -> Provider:
    """CUDA, so that fp32 means fp32 and memory is taken as needed."""
    return CUDA, {
        "device_id": "0",
        # On by default: products of fp32 with 10 bits of mantissa, and nobody is told.
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        # Trying all kernels takes seconds per shape, and picks others from run to run.
        "cudnn_conv_algo_search": "HEURISTIC",
        "enable_cuda_graph": "1" if graphs else "0",
    }


def missing(provider: str) -> str | None:
    """Why a provider of ONNX Runtime cannot be had, or None."""
    if provider not in onnxruntime.get_available_providers():
        return (
            f"this build of ONNX Runtime has no {provider}; pip uninstall onnxruntime, then "
            "pip install onnxruntime-gpu"
        )
    return ort_trt.missing() if provider == ort_trt.TENSORRT else None
