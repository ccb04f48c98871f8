"""One inference in flight of a TensorRT plan: a context, a stream, buffers, and a CUDA graph.

Buffers stay at one address, so that inputs which stay the same are copied once, and what a stream
does can be captured once and launched from then on as one graph.

    >>> slot = Slot(engine, cuda, plan, dtypes, outputs, said=[])
    >>> slot.hold({"img_ids": ids})
    >>> slot.run({"hidden_states": tokens})["out_hidden_states"]
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dermaflux.engines import Array, Arrays
from dermaflux.engines.cuda import Cuda
from dermaflux.engines.trt_api import ICudaEngine, IExecutionContext
from dermaflux.engines.trt_plan import Plan
from dermaflux.errors import EngineError

log = logging.getLogger(__name__)


class Slot:
    """Belongs to one thread at a time. `said` is where TensorRT's errors are read.

    Raises:
        EngineError: no memory is left for a context or a buffer, TensorRT refuses a shape or a
            step, or CUDA fails.
    """

    def __init__(
        self,
        engine: ICudaEngine,
        cuda: Cuda,
        plan: Plan,
        dtypes: Mapping[str, np.dtype[Any]],
        outputs: Sequence[str],
        said: Sequence[str],
    ) -> None:
        self.replays = 0
        """How often the CUDA graph was launched."""
        self._cuda = cuda
        self._path, self._dtypes, self._outputs, self._said = plan.path, dtypes, outputs, said
        self._buffers: dict[str, tuple[int, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._settled = False
        self._capturable = plan.sidecar.static
        self._graph: Any = None
        cuda.activate()
        self._stream = cuda.stream()
        context = engine.create_execution_context()
        if context is None:
            raise EngineError(
                f"TensorRT has no memory left for another call of {plan.path}: {self._reason()}. "
                "Stop what else runs on the GPU, or serve fewer at once"
            )
        self._context: IExecutionContext = context

    def hold(self, inputs: Arrays) -> None:
        """Copy inputs that stay the same over all runs to come."""
        self._cuda.activate()
        copied = self._put(inputs)
        self._cuda.wait(self._stream)
        del copied

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Copy in, compute, copy out."""
        self._cuda.activate()
        # The copies are read from until the stream has been waited for.
        copied = self._put(inputs)
        if not self._settled:
            self._settle()
        if self._graph is not None:
            self._cuda.launch(self._graph, self._stream)
            self.replays += 1
        else:
            self._enqueue()
        outputs = {name: np.empty(self._shapes[name], self._dtypes[name]) for name in self._outputs}
        for name, array in outputs.items():
            self._cuda.download(self._buffers[name][0], array, self._stream)
        self._cuda.wait(self._stream)
        del copied
        if self._capturable and self._graph is None:
            self._capture()
        return outputs

    def _put(self, inputs: Arrays) -> dict[str, Array]:
        """Enqueue copies to the device of what comes back."""
        # Our inputs have an axis of the batch at least, so that none becomes a vector here.
        ordered = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        for name, value in ordered.items():
            if self._shapes.get(name) != value.shape:
                if not self._context.set_input_shape(name, value.shape):
                    raise EngineError(
                        f"TensorRT refuses {name} of shape {value.shape}: {self._reason()}"
                    )
                self._shapes[name] = value.shape
                self._settled = False
            self._reserve(name, value.nbytes)
            self._cuda.upload(value, self._buffers[name][0], self._stream)
        return ordered

    def _settle(self) -> None:
        """Outputs' shapes and buffers, once all inputs have theirs."""
        missing = self._context.infer_shapes()
        if missing:
            raise EngineError(f"{self._path} does not know the shape of {', '.join(missing)}")
        for name in self._outputs:
            shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise EngineError(f"{self._path}: the shape of {name} depends on values: {shape}")
            self._shapes[name] = shape
            self._reserve(name, int(np.prod(shape)) * self._dtypes[name].itemsize)
        self._settled = True

    def _reserve(self, name: str, size: int) -> None:
        """A buffer of at least `size` bytes; it moves only to grow."""
        pointer, capacity = self._buffers.get(name, (0, 0))
        if size <= capacity:
            return
        self._drop_graph()
        if pointer:
            # Copies into the old one may still be on their way.
            self._cuda.wait(self._stream)
            del self._buffers[name]
            self._cuda.free(pointer)
        self._buffers[name] = (self._cuda.allocate(size), size)
        if not self._context.set_tensor_address(name, self._buffers[name][0]):
            raise EngineError(f"TensorRT refuses the memory of {name}: {self._reason()}")

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise EngineError(f"TensorRT cannot run {self._path}: {self._reason()}")

    def _capture(self) -> None:
        """The step as one graph, after a run in which TensorRT did what it does only once."""
        try:
            self._graph = self._cuda.capture(self._stream, self._enqueue)
        except EngineError as error:
            log.warning("%s runs without a CUDA graph: %s", self._path, error)
            self._capturable = False

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._cuda.drop_graph(self._graph)
            self._graph = None

    def _reason(self) -> str:
        return self._said[-1] if self._said else "it gives no reason"

    def __del__(self) -> None:
        # Where the interpreter ends, CUDA may have gone before; the memory goes with the process.
        try:
            self._cuda.activate()
            self._drop_graph()
            for pointer, _ in self._buffers.values():
                self._cuda.free(pointer)
            self._cuda.drop_stream(self._stream)
        except Exception as error:
            log.debug("what a plan held on the device was not freed: %s", error)
