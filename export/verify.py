"""The exported files as the engines run them, compared with eager torch.

>>> verify.standard(graph)                                # refuses what some engine lacks
>>> found = verify.part(graph, "transformer", "fp32", reference.seen["transformer"])
>>> found.parity.relative
4.1e-06
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import TensorProto

from dermaflux.bundle import GENERATOR_PARTS, TOKENIZERS, PartParity
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import OPENVINO, ORT, Engine, installed, require
from dermaflux.errors import EngineError
from dermaflux.flow import Schedule
from dermaflux.pipeline import Pipeline
from dermaflux.tokens import Tokens
from export.parity import (
    PART_TOLERANCE,
    Case,
    ParityError,
    Recorder,
    Row,
    part_parity,
)

FILES: Final[Mapping[str, str]] = {"fp32": "model.onnx", "int8": "model_int8.onnx"}
"""Precision -> the name of its file; Optimum opens `model.onnx`."""

_MAY_RUN: Final[Mapping[str, tuple[str, ...]]] = {"fp32": (OPENVINO, ORT), "int8": (OPENVINO,)}
"""Symmetric int8 wins nothing on ONNX Runtime's CPU kernels, which want unsigned activations: a
step of the transformer took 0.9 to 1.1 times that of fp32 there, and on OpenVINO half."""

_COMPUTE: Final = ("FullyConnected", "MatMul", "Convolution")


@dataclass(frozen=True)
class Graph:
    """A file of the bundle, compared: the worst over the engines that may run it."""

    path: Path
    part: str
    precision: str
    engines: tuple[str, ...]
    operations: Mapping[str, Mapping[str, int]]
    parity: PartParity
    rows: tuple[Row, ...]


def engines(precision: str) -> tuple[str, ...]:
    """Engines that may run files of a precision and are installed: listed means compared.

    Raises:
        EngineError: none is installed.
    """
    found = tuple(name for name in _MAY_RUN[precision] if installed(name))
    if not found:
        require(_MAY_RUN[precision][0])
    return found


def open_graph(engine: str, graph: Path, precision: str) -> Engine:
    """Open a graph that no manifest names yet."""
    if engine == OPENVINO:
        from dermaflux.engines.ov import OpenVinoEngine

        return OpenVinoEngine(graph, precision)
    from dermaflux.engines.ort import OrtEngine

    return OrtEngine(graph, precision)


def pipeline(
    checkpoint: Checkpoint, folder: Path, engine: str, precision: str
) -> tuple[Pipeline, Recorder]:
    """A pipeline over the files in a bundle's folder, and the recorder of its transformer.

    A part without a file of the precision runs in fp32, as in a bundle.
    """
    opened: dict[str, Engine] = {}
    for part in GENERATOR_PARTS:
        level = precision if (folder / part / FILES[precision]).exists() else "fp32"
        opened[part] = open_graph(engine, folder / part / FILES[level], level)
    recorder = Recorder(opened["transformer"])
    lengths = (checkpoint.model.clip_length, checkpoint.model.text_length)
    made = Pipeline(
        checkpoint.model,
        Schedule.from_config(checkpoint.scheduler),
        checkpoint.limits,
        checkpoint.defaults,
        {
            name: Tokens.open(folder / name / "tokenizer.json", length)
            for name, length in zip(TOKENIZERS, lengths, strict=True)
        },
        {**opened, "transformer": recorder},
    )
    return made, recorder


def part(graph: Path, name: str, precision: str, cases: Sequence[Case]) -> Graph:
    """Compare a file with the cases of its part, on every engine that may run it."""
    tolerance = PART_TOLERANCE[precision]
    found = {
        engine: part_parity(open_graph(engine, graph, precision), cases, tolerance)
        for engine in engines(precision)
    }
    return Graph(
        path=graph,
        part=name,
        precision=precision,
        engines=tuple(sorted(found)),
        operations={} if precision == "fp32" else operations(graph),
        parity=max(found.values(), key=lambda parity: parity.relative),
        rows=tuple(
            Row(name, precision, engine, parity.relative, tolerance, "of the largest output")
            for engine, parity in found.items()
        ),
    )


def standard(graph: Path) -> None:
    """Check that a graph is what every engine takes.

    Raises:
        ParityError: an operator of no standard domain, a tensor of double precision, or an input
            or output that is neither float32 nor int64.
    """
    model = onnx.load(str(graph), load_external_data=False)
    foreign = {node.domain for node in model.graph.node} | {o.domain for o in model.opset_import}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {weight.data_type for weight in model.graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in inferred.value_info}
    borders = {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    problems = [f"operators of {domain}" for domain in sorted(foreign - {"", "ai.onnx"})]
    if TensorProto.DOUBLE in kinds:
        problems.append("double precision inside")
    if borders - {TensorProto.FLOAT, TensorProto.INT64}:
        problems.append("inputs or outputs that are neither float32 nor int64")
    if problems:
        raise ParityError(f"{graph.name} of {graph.parent.name} has {', '.join(problems)}")


def operations(graph: Path) -> dict[str, dict[str, int]]:
    """How many matrix products and convolutions OpenVINO's CPU plugin runs in which precision.

    Read from the compiled model, which is what runs, and not from the file, which is what was
    asked for: {"FullyConnected": {"i8": 48, "f32": 14}}.
    """
    import openvino

    core = openvino.Core()
    # The same settings as the engine's: another hint would compile to another precision.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "CACHE_DIR": ""}
    compiled = core.compile_model(core.read_model(str(graph)), "CPU", settings)
    counts: dict[str, Counter[str]] = {}
    for operation in compiled.get_runtime_model().get_ops():
        details: Any = operation.get_rt_info()
        kind = details["layerType"].astype(str)
        if kind in _COMPUTE:
            counts.setdefault(kind, Counter())[details["runtimePrecision"].astype(str)] += 1
    return {kind: dict(sorted(found.items())) for kind, found in sorted(counts.items())}


def require_active(graph: Graph, quantized: int) -> None:
    """Check that what the file asks for in int8 runs in int8.

    Raises:
        EngineError: fewer operations run in 8 bits than `quantized`.
    """
    active = sum(
        count
        for found in graph.operations.values()
        for precision, count in found.items()
        if precision in ("i8", "u8")
    )
    if active < quantized:
        raise EngineError(
            f"int8 is not active: of {quantized} quantized products of {graph.part} OpenVINO runs "
            f"{active} in int8 on this machine ({dict(graph.operations)}); use --precision fp32"
        )
