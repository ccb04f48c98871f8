"""A denoiser's graph in three: what a picture keeps, what a step's time says, and the step itself.

Of the nodes of a Flux transformer many depend on the text and the positions alone, which are the
same in every step of a picture, and many on timestep, guidance and pooled text alone: all
modulation, 27 % of FLUX.1's weights, which can be computed for many steps in one product. An engine
that is handed the whole graph computes all of it in every step. `split` cuts it at the values that
lead from those nodes into the rest; numbers stay what they were.

    >>> parts = split(read(core(), Path("bundles/mini/transformer/model_int8.onnx")))
    >>> [value.get_any_name() for value in parts.step.inputs]
    ['hidden_states', 'pooled_projections', 'modulation', 'kept.0', 'kept.1', 'kept.2', 'kept.3']

A graph that cannot be cut so (a value of another form than one vector an item, or a part that asks
for the shape of an input that it does not get) is None, and runs as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dermaflux.engines.ov_library import openvino

opset13 = openvino.opset13

STEPPING: Final = ("hidden_states", "timestep")
"""Inputs that differ from step to step."""
TIME: Final = frozenset({"timestep", "guidance", "pooled_projections"})
"""Inputs of all that a step's time decides."""
KEPT: Final = frozenset({"encoder_hidden_states", "img_ids", "txt_ids"})
"""Inputs of what a picture keeps over its steps."""
MODULATION: Final = "modulation"
"""The step's input that is a row of `Split.modulation`'s output."""


@dataclass(frozen=True)
class Split:
    """`kept` makes the step's inputs `kept.0` ... from `KEPT`. `modulation` makes rows [B, 1,
    width] from `TIME`, one an item. `step` takes what is left of the inputs, and both."""

    kept: Any
    modulation: Any
    step: Any


def split(model: Any) -> Split | None:
    """Cut a graph, of which nothing else can be made then; None where it cannot be cut."""
    _once(model)
    needs = _needs(model)
    timed = list(_cut(model, needs, TIME))
    kept = list(_cut(model, needs, KEPT))
    if not timed or not kept or not all(_is_row(value) for value in timed):
        return None
    wholes = [opset13.convert(value, np.float32) for value in timed]
    given = model.get_parameters()
    modulation = _part([opset13.result(opset13.concat(wholes, -1))], given)
    before = _part([opset13.result(opset13.convert(value, np.float32)) for value in kept], given)

    row = _input(MODULATION, [-1, 1, sum(_width(value) for value in timed)])
    widths = [_width(value) for value in timed]
    pieces = opset13.variadic_split(row, opset13.constant(-1), opset13.constant(widths))
    inputs = [row]
    for index, value in enumerate(timed):
        _lead(value, needs, TIME, pieces.output(index))
    for index, value in enumerate(kept):
        made = _input(f"kept.{index}", value.get_partial_shape())
        inputs.append(made)
        _lead(value, needs, KEPT, made.output(0))
    parts = Split(before, modulation, _part(model.get_results(), [*given, *inputs]))
    return parts if _handed(parts) else None


def _handed(parts: Split) -> bool:
    """Whether each part asks for what it is given alone, were it for a shape."""
    kept, modulation, step = (
        {port.get_any_name() for port in part.inputs}
        for part in (parts.kept, parts.modulation, parts.step)
    )
    return modulation <= TIME and not kept & set(STEPPING) and "timestep" not in step


def _once(model: Any) -> None:
    """Ask a shape of an input itself, and add an axis to a value once, so that fewer values lead
    over the cut."""
    unsqueezed: dict[Any, Any] = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "ShapeOf":
            source = node.input_value(0)
            while source.get_node().get_type_name() == "Convert":
                source = source.get_node().input_value(0)
            node.input(0).replace_source_output(source)
        elif kind == "Unsqueeze" and node.input_value(1).get_node().get_type_name() == "Constant":
            source, axes = node.input_value(0), node.input_value(1).get_node().get_data()
            key = (source.get_node().get_name(), source.get_index(), axes.tobytes())
            first = unsqueezed.setdefault(key, node)
            if first is not node:
                for user in node.output(0).get_target_inputs():
                    user.replace_source_output(first.output(0))


def _needs(model: Any) -> dict[str, frozenset[str]]:
    """Node -> the inputs that its numbers depend on. A shape is no number of an input."""
    found: dict[str, frozenset[str]] = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Parameter":
            needs = frozenset({node.output(0).get_any_name()})
        elif kind == "ShapeOf":
            needs = frozenset()
        else:
            sources = [value.get_source_output().get_node() for value in node.inputs()]
            needs = frozenset().union(*(found[source.get_name()] for source in sources))
        found[node.get_name()] = needs
    return found


def _cut(model: Any, needs: dict[str, frozenset[str]], inputs: Collection[str]) -> Iterator[Any]:
    """Values that depend on some inputs alone and that others read."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Parameter" or not _of(node, needs, inputs):
            continue
        for value in node.outputs():
            if any(not _of(user.get_node(), needs, inputs) for user in value.get_target_inputs()):
                yield value


def _of(node: Any, needs: dict[str, frozenset[str]], inputs: Collection[str]) -> bool:
    found = needs[node.get_name()]
    return bool(found) and found <= frozenset(inputs)


def _is_row(value: Any) -> bool:
    shape = value.get_partial_shape()
    rows = shape.rank.is_static and len(shape) == 3 and shape[1] == 1 and shape[2].is_static
    return bool(rows and value.get_element_type().is_real())


def _width(value: Any) -> int:
    return int(value.get_partial_shape()[2].get_length())


def _part(results: list[Any], parameters: list[Any]) -> Any:
    """A graph of its own: results, and those parameters that lead there. Its constants are the same
    memory as before."""
    reached: set[str] = set()
    todo = list(results)
    while todo:
        node = todo.pop()
        if node.get_name() not in reached:
            reached.add(node.get_name())
            todo += [value.get_source_output().get_node() for value in node.inputs()]
    return openvino.Model(results, [one for one in parameters if one.get_name() in reached]).clone()


def _input(name: str, shape: Any) -> Any:
    made = opset13.parameter(shape, np.float32)
    made.set_friendly_name(name)
    made.output(0).get_tensor().set_names({name})
    return made


def _lead(
    value: Any, needs: dict[str, frozenset[str]], inputs: Collection[str], instead: Any
) -> None:
    """Have everybody beyond the cut read another value."""
    kind = value.get_element_type()
    source = instead
    # By OpenVINO's name: numpy has none for bf16.
    if kind != openvino.Type.f32:
        source = opset13.convert(instead, kind).output(0)
    for user in value.get_target_inputs():
        # Nodes of this function's own making are not known, and stay where they are.
        known = user.get_node().get_name() in needs
        if known and not _of(user.get_node(), needs, inputs):
            user.replace_source_output(source)
