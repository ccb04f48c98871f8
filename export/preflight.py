"""Whether TensorRT will build a graph, told without TensorRT.

    python -m export.compile --check bundles/mini
    python -m export.compile --check model.onnx --tensorrt 10.16

A build on the target takes from minutes to an hour and ends in an error of the parser. What the
parser refuses is published: operators, types and opsets by version (`export/trt_support.json`),
limits of attributes, where quantization may stand (`export.trt_quantization`). The rest are our
own: names, inputs and outputs in float32 and int64, shapes inside the profiles, files that are
whole, and nothing that tracing leaves behind.

It is a check of what is published, not a build: a graph that passes has not been built by
TensorRT here. Every rule has a test on a graph that is edited to break it.

    >>> check(Path("bundles/mini/transformer/model.onnx"), "11.4")
    []
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import onnx
from onnx import NodeProto, TensorProto

from dermaflux.errors import EngineError
from export import trt_attributes, trt_quantization, trt_standard, trt_tensors
from export.trt_data import faults
from export.trt_graph import Finding, View, label
from export.trt_profile import Profile
from export.trt_support import TYPES, Support, support

PROTOBUF_BYTES: Final = 2**31 - 1
_LEFTOVERS: Final = ("CastLike", "ConcatFromSequence", "SequenceAt", "SequenceConstruct",
                     "SequenceEmpty", "SplitToSequence")  # fmt: skip
"""What tracing without the optimizer leaves behind; CastLike builds, and hides a graph's types."""


def check(
    path: Path,
    version: str,
    profile: Profile | None = None,
    precision: str | None = None,
    part: str | None = None,
) -> list[Finding]:
    """What keeps a graph from being built by a version of TensorRT, and notes; nothing of the
    first where it builds.

    With `profile`, whether it covers the graph's inputs; with `precision`, whether the graph is
    quantized as that says; with `part`, whether it has all inputs and outputs of that part.

    Raises:
        EngineError: the version is not known.
    """
    return check_versions(path, [version], profile, precision, part)[version]


def check_versions(
    path: Path,
    versions: Sequence[str],
    profile: Profile | None = None,
    precision: str | None = None,
    part: str | None = None,
) -> dict[str, list[Finding]]:
    """`check` for several versions: the graph is read once."""
    facts = {version: support(version) for version in versions}
    found = list(_files(path))
    if not found:
        try:
            graph = View.open(path)
        except EngineError as error:
            found = [Finding("file", path.name, str(error))]
    if found:
        return dict.fromkeys(versions, found)
    common = [*_data(graph), *_functions(graph), *_leftovers(graph), *_attributes(graph)]
    common += [*trt_tensors.check(graph, part), *trt_standard.check(graph)]
    if not any(finding.rule == "data" for finding in common):
        common += trt_quantization.check(graph, precision)
    if profile is not None:
        common += _profile(graph, profile)
    return {
        version: [*_opsets(graph, known), *_operators(graph, known), *_types(graph, known), *common]
        for version, known in facts.items()
    }


def _files(path: Path) -> Iterator[Finding]:
    if not path.is_file():
        yield Finding("file", path.name, f"there is no {path}")
    elif path.stat().st_size > PROTOBUF_BYTES:
        yield Finding(
            "size",
            path.name,
            f"{path.stat().st_size / 2**30:.2f} GiB; protobuf reads up to 2 GiB. Keep the weights "
            "in external data",
        )


def _data(graph: View) -> Iterator[Finding]:
    """Weights, in the graph and beside it, are there and as long as their shapes need."""
    for name, tensor in graph.tensors():
        for message in faults(tensor, graph.path.parent):
            yield Finding("data", name, message)


def _opsets(graph: View, facts: Support) -> Iterator[Finding]:
    low, high = facts.opsets
    for opset in graph.model.opset_import:
        if opset.domain in ("", "ai.onnx") and not low <= opset.version <= high:
            yield Finding(
                "opset",
                graph.path.name,
                f"opset {opset.version}; TensorRT {facts.version} takes {low} to {high}",
            )


def _functions(graph: View) -> Iterator[Finding]:
    for function in graph.model.functions:
        yield Finding("function", function.name, "is a function of its own; inline it first")


def _operators(graph: View, facts: Support) -> Iterator[Finding]:
    seen = set()
    for node in graph.nodes():
        if node.domain not in ("", "ai.onnx"):
            yield Finding(
                "domain",
                label(node),
                f"is of the domain {node.domain!r}; only standard operators are in a bundle"
                + (", as QuantizeLinear instead" if "Quantize" in node.op_type else ""),
            )
        elif (lack := facts.lacks(node.op_type)) and node.op_type not in seen:
            # Once per operator: a transformer has hundreds of each.
            seen.add(node.op_type)
            yield Finding("operator", label(node), lack)


def _leftovers(graph: View) -> Iterator[Finding]:
    for node in graph.nodes():
        if node.op_type in _LEFTOVERS:
            yield Finding(
                "leftover", label(node), "is left from tracing; the exporter must resolve it"
            )
        elif node.op_type == "Transpose" and node.input[0] in graph.constants:
            yield Finding(
                "leftover",
                label(node),
                f"turns the weight {node.input[0]}; store it turned, or it is held twice and "
                "cannot be quantized",
            )


def _attributes(graph: View) -> Iterator[Finding]:
    for node in graph.nodes():
        rule = trt_attributes.RULES.get(node.op_type)
        for message in rule(graph, node) if rule else ():
            yield Finding("attribute", label(node), message)


def _types(graph: View, facts: Support) -> Iterator[Finding]:
    for name, tensor in graph.tensors():
        if tensor.data_type not in TYPES:
            yield Finding("type", name, _no_type(tensor.data_type))
    doubles = {n for n, w in graph.weights.items() if w.data_type not in TYPES}
    for node in graph.nodes():
        taken = facts.operators.get(node.op_type)
        if node.domain not in ("", "ai.onnx") or not taken:
            continue
        for given in _main(graph, node):
            kind = graph.type(given)
            if kind == 0 or given in doubles:
                continue
            if kind not in TYPES:
                yield Finding("type", label(node), f"{given}: {_no_type(kind)}")
            elif TYPES[kind] not in taken:
                yield Finding(
                    "type",
                    label(node),
                    f"{given} is {TYPES[kind]}; TensorRT takes {', '.join(sorted(taken))}",
                )


def _main(graph: View, node: NodeProto) -> list[str]:
    """The inputs that a node's types in the matrix speak of: not its shapes, axes and indices.

    They are those of the schema's type of the output, or, where that stands alone, of the input.
    """
    try:
        schema = onnx.defs.get_schema(node.op_type, graph.opset, "")
    except onnx.defs.SchemaError:
        return []
    if not schema.inputs:
        return [name for name in node.output if name]
    kinds = [item.type_str for item in schema.inputs]
    main = schema.outputs[0].type_str if schema.outputs[0].type_str in kinds else kinds[0]
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        main = kinds[0]
    # The last input of a schema may stand for many.
    padded = kinds + kinds[-1:] * max(0, len(node.input) - len(kinds))
    chosen = [n for n, kind in zip(node.input, padded, strict=False) if n and kind == main]
    return [*chosen, *node.output[:1]] if node.op_type == "Cast" else chosen


def _no_type(kind: int) -> str:
    known = kind in TensorProto.DataType.values()
    name = TensorProto.DataType.Name(kind) if known else f"type {kind}"
    if kind == TensorProto.DOUBLE:
        return "DOUBLE; TensorRT computes none. Compute it in FLOAT"
    return f"{name}; TensorRT has no such type"


def _profile(graph: View, profile: Profile) -> Iterator[Finding]:
    """Every input has its shapes, and they agree with the graph and with each other."""
    inputs = [v.name for v in graph.model.graph.input if v.name not in graph.weights]
    for name in sorted(profile.keys() - set(inputs)):
        yield Finding("profile", name, "has shapes in the profile and is no input of the graph")
    bound: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in inputs:
        if name not in profile:
            yield Finding("profile", name, "has no shapes in the profile")
            continue
        shape, given = graph.shape(name) or (), profile[name]
        if not len(shape) == len(given.min) == len(given.opt) == len(given.max):
            yield Finding("profile", name, f"has {len(shape)} axes, its profile {len(given.max)}")
            continue
        for axis, size in enumerate(shape):
            sizes = (given.min[axis], given.opt[axis], given.max[axis])
            if not 0 < sizes[0] <= sizes[1] <= sizes[2]:
                yield Finding("profile", name, f"axis {axis} goes {sizes}; smallest comes first")
            elif isinstance(size, int) and set(sizes) != {size}:
                yield Finding(
                    "profile",
                    name,
                    f"axis {axis} is fixed to {size}, the profile needs {sizes[0]} to {sizes[2]}. "
                    "Export it with that axis free",
                )
            elif isinstance(size, str):
                other, same = bound.setdefault(size, (name, sizes))
                if same != sizes:
                    yield Finding("profile", name, f"{size} goes {sizes}, and {same} in {other}")
