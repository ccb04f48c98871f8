"""The exported files as the engines run them, compared with eager torch.

>>> verify.standard(graph)                                # refuses what some engine lacks
>>> found = verify.part(graph, "transformer", "fp32", reference.seen["transformer"])
>>> found.parity.relative
4.1e-06
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

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
from export.quantized import PRODUCTS
from export.recipes import COMPARED, FILES, MAY_RUN
from export.shapes import AXES

_COMPUTE: Final = ("FullyConnected", "MatMul", "Convolution")
_EIGHT: Final = ("i8", "u8")
"""An engine takes the second for what a ReLU made."""
_INTEGER: Final = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm")


_JUNK: Final = (
    "SequenceAt",
    "SplitToSequence",
    "SequenceConstruct",
    "ConcatFromSequence",
    "CastLike",
)
"""What the exporter writes before its optimizer ran, and some engine or other has no kernel for."""


@dataclass(frozen=True)
class Graph:
    """A file of the bundle: the worst over the engines that it was compared on, if on any."""

    path: Path
    part: str
    precision: str
    compared: tuple[str, ...] = ()
    operations: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    parity: PartParity | None = None
    rows: tuple[Row, ...] = ()


def engines(precision: str) -> tuple[str, ...]:
    """Engines that may run files of a precision here, where they are compared.

    Raises:
        EngineError: none is installed.
    """
    able = [name for name in MAY_RUN[precision] if name in COMPARED]
    found = tuple(name for name in able if installed(name))
    if not found:
        require(able[0])
    return found


def open_graph(engine: str, graph: Path, precision: str) -> Engine:
    """Open a graph that no manifest names yet."""
    if engine == OPENVINO:
        from dermaflux.engines.ov import opened

        return opened(graph, precision)
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
    """Compare a file with the cases of its part, on every engine here that may run it."""
    tolerance = PART_TOLERANCE[precision]
    found = {
        engine: part_parity(open_graph(engine, graph, precision), cases, tolerance)
        for engine in engines(precision)
    }
    return Graph(
        path=graph,
        part=name,
        precision=precision,
        compared=tuple(sorted(found)),
        operations={} if precision == "fp32" else operations(graph, tuple(found)),
        parity=max(found.values(), key=lambda parity: parity.relative),
        rows=tuple(
            Row(name, precision, engine, parity.relative, tolerance, "of the largest output")
            for engine, parity in found.items()
        ),
    )


def standard(graph: Path) -> None:
    """Check that a graph is what every engine takes.

    Raises:
        ParityError: an operator of no standard domain or of the exporter's sequences, a tensor of
            double precision, a weight behind a Transpose, an input or output that is neither
            float32 nor int64, or one whose name or axes are the exporter's and not `shapes.AXES`'.
    """
    model = onnx.load(str(graph), load_external_data=False)
    nodes = model.graph.node
    foreign = {node.domain for node in nodes} | {o.domain for o in model.opset_import}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    weights = {weight.name for weight in model.graph.initializer}
    kinds = {weight.data_type for weight in model.graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in inferred.value_info}
    ends = (*model.graph.input, *model.graph.output)
    borders = {value.type.tensor_type.elem_type for value in ends}
    problems = [f"operators of {domain}" for domain in sorted(foreign - {"", "ai.onnx"})]
    problems += [f"the operator {k}" for k in sorted({node.op_type for node in nodes} & {*_JUNK})]
    turned = [n.input[0] for n in nodes if n.op_type == "Transpose" and n.input[0] in weights]
    if turned:
        problems.append(f"{len(turned)} weights behind a Transpose ({turned[0]})")
    if TensorProto.DOUBLE in kinds:
        problems.append("double precision inside")
    if borders - {TensorProto.FLOAT, TensorProto.INT64}:
        problems.append("inputs or outputs that are neither float32 nor int64")
    problems += [f"a tensor named {v.name}" for v in ends if v.name not in AXES]
    if problems:
        raise ParityError(f"{graph.name} of {graph.parent.name} has {', '.join(problems)}")


def operations(graph: Path, names: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    """How many matrix products and convolutions each engine runs in which type.

    Read from the graph that the engine made of the file, which is what runs, and not from the file,
    which is what was asked for: {"openvino-cpu": {"FullyConnected": {"i8": 48, "f32": 14}}}.
    """
    count = {OPENVINO: _openvino_operations, ORT: _ort_operations}
    return {
        name: {
            kind: dict(sorted(found.items())) for kind, found in sorted(count[name](graph).items())
        }
        for name in names
    }


def _openvino_operations(graph: Path) -> dict[str, Counter[str]]:
    from dermaflux.engines.ov_evidence import computed_in
    from dermaflux.engines.ov_graph import read
    from dermaflux.engines.ov_library import core

    # The same settings as the engine's: another hint would compile to another precision.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "CACHE_DIR": ""}
    compiled = core().compile_model(read(core(), graph), "CPU", settings)
    return computed_in(compiled, _COMPUTE)


def _ort_operations(graph: Path) -> dict[str, Counter[str]]:
    """From the model as ONNX Runtime's optimizer leaves it: a product whose factors come out of a
    DequantizeLinear is computed in fp32 from 8 bits, a fused one (MatMulInteger, QLinear...) is
    not."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = 4
        # Large weights stay where they are: only the nodes are looked at.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimized.data"
        )
        onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(str(optimized), load_external_data=False).graph.node
    makers = {name: node for node in nodes for name in node.output}

    def from_eight(name: str) -> bool:
        """ONNX Runtime puts a Cast behind what is fp16 in the file, for its kernels are fp32."""
        while name in makers and makers[name].op_type == "Cast":
            name = makers[name].input[0]
        return name in makers and makers[name].op_type == "DequantizeLinear"

    counts: dict[str, Counter[str]] = {}
    for node in nodes:
        if node.op_type in (*PRODUCTS, "FusedMatMul", "FusedGemm", "FusedConv", "NhwcFusedConv"):
            eight = [from_eight(name) for name in node.input[:2]]
            how = "f32 of 8 bits" if all(eight) else "f32 of 8-bit weights" if eight[1] else "f32"
            counts.setdefault(node.op_type, Counter())[how] += 1
        elif node.op_type in _INTEGER or node.op_type.startswith("QLinear"):
            counts.setdefault(node.op_type, Counter())["i8"] += 1
    return counts


def require_active(graph: Graph, products: int) -> None:
    """Check that what the file asks for in 8 bits runs in 8 bits, or from 8 bits where the engine
    emulates the type.

    `products` counts those that have both factors in 8 bits.

    Raises:
        EngineError: an engine runs fewer.
    """
    for engine, kinds in graph.operations.items():
        active = sum(
            count
            for found in kinds.values()
            for precision, count in found.items()
            if precision in (*_EIGHT, "f32 of 8 bits")
        )
        if active < products:
            raise EngineError(
                f"{graph.precision} is not active: of {products} quantized products of "
                f"{graph.part} {engine} runs {active} in 8 bits on this machine ({dict(kinds)}); "
                "leave it out of --precision"
            )
