"""What we call of TensorRT's Python package to run a plan, as types; `export.trt_api` adds the
building of one.

The package itself is untyped, and installed only where there is a GPU. So it is imported in one
place and seen through these protocols: mypy refuses a call that is not in them, and a test compares
them with the names that the real bindings export (`export/trt_names.json`).

    >>> trt = import_tensorrt()
    >>> trt.Runtime(logger(trt, log)).deserialize_cuda_engine(plan)
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from dermaflux.errors import EngineError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger(__name__)

INSTALL: Final = "install the package `tensorrt` 10.15 or newer from NVIDIA's package index"


class Member(Protocol):
    """A member of one of TensorRT's enumerations."""

    @property
    def name(self) -> str: ...


class IExecutionContext(Protocol):
    """One inference at a time over the weights of an engine, with activation memory of its own."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def infer_shapes(self) -> list[str]: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class EngineInspector(Protocol):
    """Tells what the builder made of a network."""

    def get_engine_information(self, format: Any) -> str: ...


class ICudaEngine(Protocol):
    """A deserialized plan: weights on the device."""

    @property
    def num_io_tensors(self) -> int: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Member: ...
    def get_tensor_dtype(self, name: str) -> Member: ...
    def get_tensor_location(self, name: str) -> Member: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def create_execution_context(self) -> IExecutionContext | None: ...
    def create_engine_inspector(self) -> EngineInspector: ...


class Runtime(Protocol):
    """Opens plans."""

    def deserialize_cuda_engine(self, serialized_engine: ReadableBuffer) -> ICudaEngine | None: ...


class LayerInformationFormat(Protocol):
    """Forms of what the inspector says."""

    JSON: Member


class TensorRT(Protocol):
    """The module `tensorrt`."""

    __version__: str
    ILogger: type[Any]
    LayerInformationFormat: LayerInformationFormat

    def Runtime(self, logger: Any) -> Runtime: ...


def import_tensorrt() -> Any:
    """The module `tensorrt`, untyped, for the caller to see through its protocol.

    Raises:
        EngineError: it is not installed, or its libraries cannot be loaded.
    """
    try:
        return importlib.import_module("tensorrt")
    except ModuleNotFoundError:
        raise EngineError(f"TensorRT is not installed; {INSTALL}") from None
    except ImportError as error:
        raise EngineError(f"TensorRT cannot be loaded ({error}); {INSTALL}") from error


def logger(trt: TensorRT, to: logging.Logger = log, said: list[str] | None = None) -> Any:
    """A logger for TensorRT that hands on to Python's; errors are appended to `said` too.

    TensorRT returns None or False where others raise, and says why to its logger alone.
    """
    levels = {
        "INTERNAL_ERROR": logging.ERROR,
        "ERROR": logging.ERROR,
        "WARNING": logging.WARNING,
        "INFO": logging.INFO,
    }

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Member, msg: str) -> None:
            level = levels.get(severity.name, logging.DEBUG)
            to.log(level, "%s", msg)
            if level == logging.ERROR and said is not None:
                said.append(msg)

    return cast(Any, Log())
