"""The few verbs of CUDA's runtime that an engine needs, over NVIDIA's `cuda-bindings`; no torch.

Every call of CUDA returns an error code beside its values; here it raises. Memory is named by its
address, as TensorRT wants it.

    >>> cuda = Cuda()
    >>> pointer, stream = cuda.allocate(array.nbytes), cuda.stream()
    >>> cuda.upload(array, pointer, stream)
    >>> cuda.wait(stream)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from dermaflux.errors import EngineError, translated

INSTALL: Final = "pip install cuda-bindings"


class Runtime(Protocol):
    """What we call of `cuda.bindings.runtime`; each call returns its error, then its values."""

    cudaMemcpyKind: Any
    cudaStreamCaptureMode: Any
    cudaDeviceAttr: Any

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]: ...
    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> tuple[Any, ...]: ...
    def cudaMemGetInfo(self) -> tuple[Any, ...]: ...
    def cudaMalloc(self, size: int) -> tuple[Any, ...]: ...
    def cudaFree(self, devPtr: int) -> tuple[Any, ...]: ...
    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: Any, stream: Any
    ) -> tuple[Any, ...]: ...
    def cudaStreamCreate(self) -> tuple[Any, ...]: ...
    def cudaStreamDestroy(self, stream: Any) -> tuple[Any, ...]: ...
    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]: ...
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any, ...]: ...
    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]: ...
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]: ...
    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]: ...
    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> tuple[Any, ...]: ...
    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[Any, ...]: ...


class Nvml(Protocol):
    """What we call of `cuda.bindings.nvml`."""

    def init_v2(self) -> None: ...
    def system_get_driver_version(self) -> str: ...
    def shutdown(self) -> None: ...


class Cuda:
    """One device. Its verbs may be called from any thread.

    Raises:
        EngineError: the bindings are not installed, there is no such device, or, at any verb, CUDA
            refused; with CUDA's own name of the error.
    """

    def __init__(
        self, device: int = 0, runtime: Runtime | None = None, nvml: Nvml | None = None
    ) -> None:
        self._runtime: Runtime = runtime or _import("runtime")
        self._nvml = nvml
        self.device = device
        self.activate()

    def activate(self) -> None:
        """Make the device this thread's own: CUDA keeps that per thread."""
        self._call("choose the device", self._runtime.cudaSetDevice(self.device))

    def capability(self) -> str:
        """The device's compute capability: `9.0`."""
        names = self._runtime.cudaDeviceAttr
        return ".".join(
            str(
                self._call(
                    "ask for the compute capability",
                    self._runtime.cudaDeviceGetAttribute(
                        getattr(names, f"cudaDevAttrComputeCapability{half}"), self.device
                    ),
                )
            )
            for half in ("Major", "Minor")
        )

    def driver(self) -> str:
        """The version of the display driver: `580.65.06`."""
        nvml: Nvml = self._nvml or _import("nvml")
        with translated(EngineError, "the display driver does not say its version"):
            nvml.init_v2()
            try:
                return nvml.system_get_driver_version()
            finally:
                nvml.shutdown()

    def allocate(self, size: int) -> int:
        """The address of `size` bytes on the device."""
        error, *values = self._runtime.cudaMalloc(size)
        if int(error) != 0:
            free, total = self._call("ask for free memory", self._runtime.cudaMemGetInfo())
            raise EngineError(
                f"the GPU has no {size / 1e9:.2f} GB left: {free / 1e9:.2f} of {total / 1e9:.2f} GB"
                " are free. Stop what else runs on it, or use a smaller batch or size"
            )
        return int(values[0])

    def free(self, pointer: int) -> None:
        self._call("free memory", self._runtime.cudaFree(pointer))

    def upload(self, array: NDArray[Any], pointer: int, stream: Any) -> None:
        """Enqueue a copy to the device. The array, in C order, must live until `wait`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(pointer, array.ctypes.data, array, kind, stream)

    def download(self, pointer: int, array: NDArray[Any], stream: Any) -> None:
        """Enqueue a copy from the device into an array in C order; it is there after `wait`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, pointer, array, kind, stream)

    def stream(self) -> Any:
        """A new queue of work; `int()` of it is its handle."""
        return self._call("make a stream", self._runtime.cudaStreamCreate())

    def wait(self, stream: Any) -> None:
        """Until all that was enqueued is done."""
        self._call("run what was enqueued", self._runtime.cudaStreamSynchronize(stream))

    def drop_stream(self, stream: Any) -> None:
        self._call("drop a stream", self._runtime.cudaStreamDestroy(stream))

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """What `work` enqueues, as a graph that one call launches; nothing of it runs now."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("begin a capture", self._runtime.cudaStreamBeginCapture(stream, mode))
        try:
            work()
        except BaseException:
            # Ended all the same: a stream that is left capturing takes no other work.
            self._runtime.cudaStreamEndCapture(stream)
            raise
        graph = self._call("end a capture", self._runtime.cudaStreamEndCapture(stream))
        try:
            return self._call("make a graph", self._runtime.cudaGraphInstantiate(graph, 0))
        finally:
            self._call("drop a graph", self._runtime.cudaGraphDestroy(graph))

    def launch(self, graph: Any, stream: Any) -> None:
        self._call("launch a graph", self._runtime.cudaGraphLaunch(graph, stream))

    def drop_graph(self, graph: Any) -> None:
        self._call("drop a graph", self._runtime.cudaGraphExecDestroy(graph))

    def _copy(self, to: int, source: int, array: NDArray[Any], kind: Any, stream: Any) -> None:
        assert array.flags.c_contiguous
        size = int(np.prod(array.shape)) * array.itemsize
        self._call("copy", self._runtime.cudaMemcpyAsync(to, source, size, kind, stream))

    def _call(self, what: str, result: tuple[Any, ...]) -> Any:
        """The value, or values, of a call; `what` completes "CUDA cannot"."""
        error, *values = result
        if int(error) != 0:
            name = getattr(error, "name", str(error))
            raise EngineError(f"CUDA cannot {what} on device {self.device}: {name}")
        return values[0] if len(values) == 1 else tuple(values)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{module}")
    except ImportError:
        raise EngineError(f"TensorRT's engine needs cuda-bindings; {INSTALL}") from None
