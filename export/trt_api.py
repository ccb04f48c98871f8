"""What we call of TensorRT's Python package to build a plan, as types.

The same in 10.15 and newer and in 11.x: nothing here is of the weakly typed networks that 11
removed. A test compares names and parameters with those of the real bindings
(`export/trt_names.json`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dermaflux.engines import trt_api
from dermaflux.engines.trt_api import Member

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class IHostMemory(Protocol):
    """Bytes that TensorRT holds, read through Python's buffer protocol."""

    @property
    def nbytes(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...


class ITimingCache(Protocol):
    """How long kernels took in earlier builds."""

    def serialize(self) -> IHostMemory: ...


class IOptimizationProfile(Protocol):
    """Shapes a plan is built for."""

    def set_shape(
        self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]
    ) -> None: ...


class IBuilderConfig(Protocol):
    """How to build."""

    builder_optimization_level: int
    profiling_verbosity: Any
    progress_monitor: Any

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...
    def clear_flag(self, flag: Any) -> None: ...
    def set_flag(self, flag: Any) -> None: ...
    def add_optimization_profile(self, profile: IOptimizationProfile) -> int: ...
    def create_timing_cache(self, serialized_timing_cache: ReadableBuffer) -> ITimingCache: ...
    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> ITimingCache | None: ...


class INetworkDefinition(Protocol):
    """A parsed graph."""

    @property
    def num_layers(self) -> int: ...


class ParserError(Protocol):
    """Why the parser refused a node."""

    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    """ONNX -> network."""

    @property
    def num_errors(self) -> int: ...
    def parse_from_file(self, model: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class Builder(Protocol):
    """Network -> plan."""

    def create_network(self, flags: int) -> INetworkDefinition: ...
    def create_builder_config(self) -> IBuilderConfig: ...
    def create_optimization_profile(self) -> IOptimizationProfile: ...
    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None: ...


class NetworkDefinitionCreationFlag(Protocol):
    """Kinds of networks."""

    STRONGLY_TYPED: Any


class BuilderFlag(Protocol):
    """Switches of a build."""

    TF32: Member


class MemoryPoolType(Protocol):
    """Kinds of memory that a build may be kept within."""

    WORKSPACE: Member


class ProfilingVerbosity(Protocol):
    """How much a plan remembers of its layers."""

    DETAILED: Member


class TensorRT(trt_api.TensorRT, Protocol):
    """The module `tensorrt`, for building too."""

    IProgressMonitor: type[Any]
    NetworkDefinitionCreationFlag: NetworkDefinitionCreationFlag
    BuilderFlag: BuilderFlag
    MemoryPoolType: MemoryPoolType
    ProfilingVerbosity: ProfilingVerbosity

    def Builder(self, logger: Any) -> Builder: ...
    def OnnxParser(self, network: INetworkDefinition, logger: Any) -> OnnxParser: ...
