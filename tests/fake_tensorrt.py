"""TensorRT and CUDA for a machine without a GPU: the same calls, the same rules, numbers by ONNX
Runtime.

Device memory is host memory that only its address names; a plan is a JSON text that points at its
ONNX file. What the real ones punish with wrong numbers or a crash is an assertion here: a buffer
that is too small or freed, a thread without a device, a copy while a graph is captured, a shape
outside of the profile, a logger or parser that is gone while it is needed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import threading
import weakref
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNotPermitted = 800
    cudaErrorStreamCaptureUnsupported = 900


class FakeRuntime:
    """`cuda.bindings.runtime`."""

    class cudaMemcpyKind(IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    class cudaStreamCaptureMode(IntEnum):
        cudaStreamCaptureModeThreadLocal = 1

    class cudaDeviceAttr(IntEnum):
        cudaDevAttrComputeCapabilityMajor = 75
        cudaDevAttrComputeCapabilityMinor = 76

    def __init__(self, capability: tuple[int, int] = (9, 0), memory: int = 1 << 30) -> None:
        self.memory, self.capability = memory, capability
        self.allocations: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.graphs: set[int] = set()
        self.capturing: dict[int, list[Callable[[], None]]] = {}
        self.work: dict[int, list[Callable[[], None]]] = {}
        self.uploads = 0
        self._numbers = iter(range(1000, 10**9))
        self._thread = threading.local()

    def _device(self) -> None:
        assert getattr(self._thread, "device", None) is not None, "no device on this thread"

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        if device != 0:
            return (Error.cudaErrorNotPermitted,)
        self._thread.device = device
        return (Error.cudaSuccess,)

    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, self.capability[attr - 75]

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        used = sum(len(block) for block in self.allocations.values())
        return Error.cudaSuccess, self.memory - used, self.memory

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        self._device()
        if size > self.cudaMemGetInfo()[1]:
            return Error.cudaErrorMemoryAllocation, 0
        block = ctypes.create_string_buffer(size)
        self.allocations[ctypes.addressof(block)] = block
        return Error.cudaSuccess, ctypes.addressof(block)

    def cudaFree(self, devPtr: int) -> tuple[Any, ...]:
        self._device()
        del self.allocations[devPtr]
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: Any, stream: int
    ) -> tuple[Any, ...]:
        self._device()
        assert stream not in self.capturing, "a copy from pageable memory cannot be captured"
        device = dst if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else src
        assert len(self.allocations[device]) >= count
        self.uploads += kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice
        # Not now: the host's memory has to live until the stream was waited for.
        self.work[stream].append(lambda: ctypes.memmove(dst, src, count))
        return (Error.cudaSuccess,)

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        self._device()
        stream = next(self._numbers)
        self.streams.add(stream)
        self.work[stream] = []
        return Error.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.streams.remove(stream)
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        for task in self.work[stream]:
            task()
        self.work[stream].clear()
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any, ...]:
        assert mode == self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.capturing[stream] = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, self.capturing.pop(stream)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        number = next(self._numbers)
        self.graphs.add(number)
        self.work[number] = list(graph)
        return Error.cudaSuccess, number

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[Any, ...]:
        assert graphExec in self.graphs
        self.work[stream] += self.work[graphExec]
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[Any, ...]:
        self.graphs.remove(graphExec)
        return (Error.cudaSuccess,)

    def enqueue(self, stream: int, task: Callable[[], None]) -> None:
        """For the fake context: now into a graph, or into the queue."""
        self._device()
        assert stream in self.streams
        self.capturing.get(stream, self.work[stream]).append(task)

    def array(self, pointer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The memory at an address, which must be large enough."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        block = self.allocations[pointer]
        assert len(block) >= size
        return np.frombuffer(block, dtype, count=int(np.prod(shape))).reshape(shape)


class FakeNvml:
    """`cuda.bindings.nvml`."""

    def __init__(self, driver: str = "580.65.06") -> None:
        self.driver = driver

    def init_v2(self) -> None: ...

    def system_get_driver_version(self) -> str:
        return self.driver

    def shutdown(self) -> None: ...


class Type(IntEnum):
    FLOAT = 0
    INT64 = 6
    BF16 = 7


class Mode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class Location(IntEnum):
    DEVICE = 0


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._runtime = engine.trt.runtime
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._memory: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.plan["profile"][name]
        if len(shape) != len(low) or not all(
            a <= b <= c for a, b, c in zip(low, shape, high, strict=True)
        ):
            return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._memory[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return sorted(set(self._engine.inputs) - set(self._shapes))

    def get_tensor_shape(self, name: str) -> list[int]:
        zeros = {n: np.zeros(self._shapes[n], self._engine.dtype(n)) for n in self._engine.inputs}
        return list(self._engine.session.run([name], zeros)[0].shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, trt = self._engine, self._engine.trt
        assert engine.runtime() is not None, "the runtime is gone"
        if trt.fails == "run" or (trt.fails == "capture" and self._runtime.capturing):
            trt.say("ERROR", "something about Myelin")
            return False
        assert set(self._memory) == {*engine.inputs, *engine.outputs}
        memory, shapes = dict(self._memory), dict(self._shapes)

        def task() -> None:
            given = {
                n: self._runtime.array(memory[n], shapes[n], engine.dtype(n)).copy()
                for n in engine.inputs
            }
            for name, value in zip(
                engine.outputs, engine.session.run(engine.outputs, given), strict=True
            ):
                self._runtime.array(memory[name], value.shape, value.dtype)[...] = value

        self._runtime.enqueue(stream_handle, task)
        return True


class FakeEngine:
    def __init__(self, trt: FakeTensorRT, runtime: Any, plan: dict[str, Any]) -> None:
        self.trt, self.plan, self.runtime = trt, plan, weakref.ref(runtime)
        self.session = onnxruntime.InferenceSession(
            plan["onnx"], providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self._types = {
            value.name: Type.INT64 if "int64" in value.type else Type.FLOAT
            for value in (*self.session.get_inputs(), *self.session.get_outputs())
        }

    def dtype(self, name: str) -> type:
        return np.int64 if self._types[name] == Type.INT64 else np.float32

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.outputs, *self.inputs][index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Type:
        return Type.BF16 if self.trt.fails == "bf16" else self._types[name]

    def get_tensor_location(self, name: str) -> Location:
        return Location.DEVICE

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1 if isinstance(n, str) else n for n in self.session.get_inputs()[0].shape]

    def create_execution_context(self) -> FakeContext | None:
        if self.trt.fails == "context":
            self.trt.say("ERROR", "out of memory")
            return None
        return FakeContext(self)

    def create_engine_inspector(self) -> FakeInspector:
        return FakeInspector(self)


class FakeInspector:
    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:
        assert format == FakeTensorRT.LayerInformationFormat.JSON
        return json.dumps({"Layers": self._engine.plan["layers"]})


class FakeConfig:
    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt
        self.builder_optimization_level = 3
        self.profiling_verbosity: Any = None
        self.progress_monitor: Any = None
        self.flags = {FakeTensorRT.BuilderFlag.TF32}
        self.pools: dict[Any, int] = {}
        self.profiles: list[FakeProfile] = []
        self.cache: FakeCache | None = None

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.pools[pool] = pool_size

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: FakeProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> FakeCache:
        return FakeCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache if cache.content in (b"", b"timings of this GPU") else None
        return self.cache is not None

    def get_timing_cache(self) -> FakeCache | None:
        return self.cache


class FakeCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return b"timings of this GPU"


class FakeProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = (list(min), list(opt), list(max))


class FakeNetwork:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.onnx = ""
        self.parser: Any = None
        self.num_layers = 0


class FakeParser:
    def __init__(self, trt: FakeTensorRT, network: FakeNetwork) -> None:
        self.trt, self._network = trt, network
        self.num_errors = 0
        network.parser = weakref.ref(self)

    def parse_from_file(self, model: str) -> bool:
        if self.trt.fails == "parse":
            self.num_errors = 1
            return False
        onnx.load(model)
        self._network.onnx = str(Path(model).resolve())
        return True

    def get_error(self, index: int) -> Any:
        class ParserError:
            def desc(self) -> str:
                return "no importer registered"

            def node_name(self) -> str:
                return "node_1"

            def node_operator(self) -> str:
                return "Mystery"

        return ParserError()


class FakeBuilder:
    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt

    def create_network(self, flags: int) -> FakeNetwork:
        return FakeNetwork(flags)

    def create_builder_config(self) -> FakeConfig:
        self.trt.config = FakeConfig(self.trt)
        return self.trt.config

    def create_optimization_profile(self) -> FakeProfile:
        return FakeProfile()

    def build_serialized_network(self, network: FakeNetwork, config: FakeConfig) -> Any:
        gc.collect()
        assert network.flags & 1 << FakeTensorRT.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        assert network.parser() is not None, "the parser, which holds the weights, is gone"
        assert self.trt.logger() is not None, "the logger is gone"
        self.trt.builds += 1
        self.trt.say("WARNING", "a warning of the build")
        monitor = config.progress_monitor
        monitor.phase_start("Building Engine", "", 20)
        for step in range(20):
            self.trt.on_step()
            if not monitor.step_complete("Building Engine", step):
                return None
        monitor.phase_finish("Building Engine")
        if self.trt.fails == "build":
            self.trt.say("ERROR", "could not find any implementation for node")
            return None
        quantized = [n.op_type == "DequantizeLinear" for n in onnx.load(network.onnx).graph.node]
        kind = "FP32" if self.trt.fails == "quantize" or not any(quantized) else "Int8"
        formats = (
            {"Format/Datatype": f"Row major linear {kind} format"}
            if self.trt.__version__.startswith("10.")
            else {"Format": "Row major linear format", "DataType": kind}
        )
        layer = {"Name": "a", "Inputs": [{"Name": "x", **formats}], "Outputs": []}
        plan = {
            "onnx": network.onnx,
            "profile": config.profiles[0].shapes,
            "layers": [layer, {**layer, "Inputs": []}],
        }
        return json.dumps(plan).encode()


class FakeTensorRT:
    """The module `tensorrt`. `fails` names what goes wrong."""

    class ILogger:
        def __init__(self) -> None: ...

    class IProgressMonitor:
        def __init__(self) -> None: ...

    class LayerInformationFormat(IntEnum):
        JSON = 1

    class NetworkDefinitionCreationFlag(IntEnum):
        STRONGLY_TYPED = 1

    class BuilderFlag(IntEnum):
        TF32 = 7

    class MemoryPoolType(IntEnum):
        WORKSPACE = 0

    class ProfilingVerbosity(IntEnum):
        DETAILED = 2

    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self, runtime: FakeRuntime, version: str = "11.4.0.106") -> None:
        self.__version__ = version
        self.runtime = runtime
        self.fails = ""
        self.builds = 0
        self.on_step: Callable[[], None] = lambda: None
        self.config: FakeConfig | None = None
        self.logger: Any = lambda: None

    def say(self, severity: str, message: str) -> None:
        self.logger().log(self.Severity[severity], message)

    def Runtime(self, logger: Any) -> Any:
        trt = self
        trt.logger = weakref.ref(logger)

        class Runtime:
            def deserialize_cuda_engine(self, serialized_engine: Any) -> FakeEngine | None:
                try:
                    return FakeEngine(trt, self, json.loads(bytes(serialized_engine)))
                except ValueError:
                    trt.say("ERROR", "magic tag does not match")
                    return None

        return Runtime()

    def Builder(self, logger: Any) -> FakeBuilder:
        self.logger = weakref.ref(logger)
        return FakeBuilder(self)

    def OnnxParser(self, network: FakeNetwork, logger: Any) -> FakeParser:
        return FakeParser(self, network)
