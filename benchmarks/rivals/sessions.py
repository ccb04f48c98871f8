"""Plain ONNX Runtime: the bundle's fp32 graphs in sessions as `InferenceSession(file)` makes them.

    >>> pipeline = pipeline_of(Bundle.open("bundles/mini"), threads=2)
    >>> session = classifier_of(Bundle.open("bundles/mini"), threads=2)
    >>> session(pixels)                 # float32 [n, classes]

Only the number of threads is set, to that of all other sides. The loop around the generator's
graphs is ours, since ONNX Runtime has none; the classifier is the session alone, on a graph that
ends at the logits, as an export for it alone would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from dermaflux.bundle import GENERATOR_PARTS, Bundle
from dermaflux.engines import Array, Arrays
from dermaflux.errors import BundleError, EngineError, translated
from dermaflux.flow import Floats, Schedule
from dermaflux.pipeline import Pipeline
from dermaflux.tokens import Tokens

PROVIDERS: Final = ["CPUExecutionProvider"]


class Session:
    """An engine of the pipeline's that is one session with default options, and nothing else."""

    name = "onnxruntime"
    precision = "fp32"

    def __init__(self, graph: Path | bytes, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        given = graph if isinstance(graph, bytes) else str(graph)
        with translated(EngineError, "ONNX Runtime cannot open a graph of the bundle"):
            self._session = onnxruntime.InferenceSession(given, options, providers=PROVIDERS)
        self._outputs = [one.name for one in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Named arrays in, named arrays out."""
        return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """Nothing is handed over once: everything is given at every step."""
        return lambda varying: self.run({**constant, **varying})

    def told(self) -> Mapping[str, Any]:
        """For evidence: who computes."""
        return {"providers": self._session.get_providers(), "options": "defaults"}


def pipeline_of(bundle: Bundle, threads: int) -> Pipeline:
    """A pipeline whose every part is such a session.

    Raises:
        EngineError: ONNX Runtime is not installed or refuses a graph.
    """
    model = bundle.model
    lengths = {"tokenizer": model.clip_length, "tokenizer_2": model.text_length}
    return Pipeline(
        model,
        Schedule.from_config(bundle.scheduler),
        bundle.limits,
        bundle.defaults,
        {
            name: Tokens.open(bundle.file(f"{name}/tokenizer.json"), length)
            for name, length in lengths.items()
        },
        {part: Session(_graph(bundle, part), threads) for part in GENERATOR_PARTS},
        {"bundle": bundle.id, "model": bundle.name},
    )


def classifier_of(bundle: Bundle, threads: int) -> Callable[[Floats], Floats]:
    """float32 [n, 3, H, W], normalised -> logits [n, classes].

    Raises:
        BundleError: the bundle has no classifier.
        EngineError: see `pipeline_of`.
    """
    if bundle.classifier is None:
        raise BundleError(f"the bundle {bundle.name} has no classifier to compare with")
    session = Session(logits_alone(_graph(bundle, "classifier")), threads)

    def judge(pixels: Floats) -> Floats:
        return np.asarray(session.run({"pixel_values": pixels})["logits"])

    return judge


def logits_alone(graph: Path) -> bytes:
    """The graph without its other outputs: ONNX Runtime computes all that a graph has, asked for or
    not, and drops what leads to no output when it opens it."""
    import onnx

    model = onnx.load(str(graph))
    kept = [one for one in model.graph.output if one.name == "logits"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    return bytes(model.SerializeToString())


def _graph(bundle: Bundle, part: str) -> Path:
    return bundle.file(bundle.parts[part].files["fp32"].path)
