"""ONNX Runtime on the CPU: one session per part, shared by all threads.

>>> OrtEngine(Path("bundles/mini/transformer/model.onnx"), "fp32").run({...})
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from dermaflux.engines import ORT, Array, Arrays, usable_cores
from dermaflux.errors import EngineError, translated


class OrtEngine:
    """A graph in ONNX Runtime's CPU provider.

    Raises:
        EngineError: the file is not a graph that this ONNX Runtime reads; at `run`, inputs that
            the graph does not take.
    """

    name = ORT

    def __init__(self, graph: Path, precision: str, threads: int | None = None) -> None:
        self.precision = precision
        self._graph = graph
        options = onnxruntime.SessionOptions()
        # Named, because with 0 ONNX Runtime pins threads to cores that a container may not use.
        options.intra_op_num_threads = threads or usable_cores()
        options.inter_op_num_threads = 1
        # The same bits for the same input, whatever else runs.
        options.use_deterministic_compute = True
        # Idle threads that spin take the core away from the next part's session.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        with translated(EngineError, f"ONNX Runtime cannot open {graph}"):
            self._session = onnxruntime.InferenceSession(
                str(graph), options, providers=["CPUExecutionProvider"]
            )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`; a session is safe to share between threads."""
        # ONNX Runtime reads the memory of an array, and wants it in C order.
        ordered = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        with translated(EngineError, f"ONNX Runtime cannot run {self._graph}"):
            outputs = self._session.run(self._outputs, ordered)
        return dict(zip(self._outputs, outputs, strict=True))

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`. On the CPU arrays are read in place: there is nothing to hand over."""
        held = {name: np.ascontiguousarray(value) for name, value in constant.items()}
        return lambda varying: self.run({**held, **varying})
