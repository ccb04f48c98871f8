"""What nobody reads of a token's row is not computed.

A vision transformer that answers from its class token reads one of the rows that its last block
makes. Queries, projection and MLP of that block are the same for every row, so they are computed
for that one: two thirds of a block, of ViT-B/16 6 % of all, and to the same numbers. OpenVINO does
not find that out itself. A classifier that pools all its tokens, or is asked for a map that needs
them, stays as it is.

    >>> model = core().read_model("model.onnx")
    >>> one_row(model)                      # operators of one row from now on
    31
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

_ALONE: Final = (
    *("Convert", "FakeQuantize", "Gelu", "Erf", "Relu", "Sigmoid", "Swish", "Tanh", "Clamp"),
    *("Add", "Subtract", "Multiply", "Divide", "Power", "Maximum", "Minimum"),
)
"""Operators of numbers alone, whose inputs are as large as their output or spread out to it."""
_FIRST: Final = ("MatMul", "ScaledDotProductAttention")
"""Operators whose rows are those of their first input; the others are read whole."""


def one_row(model: Any) -> int:
    """Compute one row where only that is read; of how many operators."""
    count = 0
    for gather in model.get_ordered_ops():
        row = _row(gather)
        if row is not None:
            count += _narrow(gather, row)
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _row(gather: Any) -> int | None:
    """Which row of [B, N, D] a node takes, if it is one and always the same."""
    if gather.get_type_name() != "Gather" or gather.input_value(0).get_partial_shape().rank != 3:
        return None
    index, axis = (_numbers(gather.input_value(place)) for place in (1, 2))
    if index is None or axis is None or len(index) != 1 or axis != [1] or index[0] < 0:
        return None
    return index[0]


def _narrow(gather: Any, row: int) -> int:
    axes = _wanted(gather)
    if not axes:
        return 0
    for node, axis in axes.items():
        for place in _carrying(node, axis):
            value = node.input_value(place)
            if value.get_node() not in axes:
                before = _axis_before(node, axis, place)
                node.input(place).replace_source_output(_sliced(value, before, row))
    for node in axes:
        if node.get_type_name() == "Reshape":
            _reshape(node)
    # Of the index's own shape: one that is a list keeps the axis that it reads.
    shape = [axis.get_length() for axis in _shape(gather.input_value(1))]
    gather.input(1).replace_source_output(_constant(np.zeros(shape)))
    return len(axes)


def _reshape(node: Any) -> None:
    """The same of one row: nought stands for the batch, whatever the file said of it."""
    from openvino import opset13

    rest = [axis.get_length() for axis in _shape(node.output(0))[2:]]
    users = node.output(0).get_target_inputs()
    made = opset13.reshape(node.input_value(0), _constant([0, 1, *rest]), special_zero=True)
    for user in users:
        user.replace_source_output(made.output(0))


def _wanted(gather: Any) -> dict[Any, int]:
    """Operators of which one row is read, with the axis that it is of."""
    axes: dict[Any, int] = {}
    todo = [(gather.input_value(0).get_node(), 1)]
    while todo:
        node, axis = todo.pop()
        if node in axes or not _same_rows(node, axis):
            continue
        # Whoever is read by others too gets its turn again when the last of them is known.
        if all(_reads(user, axis, axes, gather) for user in node.output(0).get_target_inputs()):
            axes[node] = axis
            todo += [(node.input_value(place).get_node(), _axis_before(node, axis, place))
                     for place in _carrying(node, axis)]  # fmt: skip
    return axes


def _reads(user: Any, axis: int, axes: dict[Any, int], gather: Any) -> bool:
    """Whether an input needs that row of an axis alone; what is its own keys needs all."""
    node, place = user.get_node(), user.get_index()
    if node == gather:
        return bool(place == 0 and axis == 1)
    if node not in axes or place not in _carrying(node, axes[node]):
        return False
    return _axis_before(node, axes[node], place) == axis


def _same_rows(node: Any, axis: int) -> bool:
    """Whether a row of a node's output is made of that row of its inputs, and of nothing else of
    them."""
    kind, last = node.get_type_name(), len(_shape(node.output(0))) - 1 if node.outputs() else 0
    if len(node.outputs()) != 1 or axis > last:
        return False
    if kind in _ALONE or kind == "ConvertLike":
        return True
    if kind in _FIRST and len(_shape(node.input_value(0))) != last + 1:
        return False
    if kind == "MatMul":
        return axis == last - 1 and not node.get_attributes()["transpose_a"]
    if kind == "ScaledDotProductAttention":
        # A mask that is not the same for all rows would have to be cut too.
        masks = [_shape(value) for value in node.input_values()[3:4]]
        plain = all(len(mask) < 2 or mask[-2] == 1 for mask in masks)
        return axis == last - 1 and plain and not node.get_attributes()["causal"]
    if kind == "Softmax":
        return bool(node.get_attributes()["axis"] % (last + 1) == last and axis < last)
    if kind == "MVN":
        reduced = _numbers(node.input_value(1))
        return axis < last and reduced is not None and reduced in ([-1], [last])
    if kind == "Transpose":
        return _numbers(node.input_value(1)) is not None
    return kind == "Reshape" and axis == 1 and _keeps(node)


def _keeps(reshape: Any) -> bool:
    """Whether the two first axes stay, and the others are known."""
    before, after = (_shape(value) for value in (reshape.input_value(0), reshape.output(0)))
    if len(before) < 3 or len(after) < 3 or any(x.is_dynamic for x in (*before[1:], *after[1:])):
        return False
    sizes = [[axis.get_length() for axis in shape[1:]] for shape in (before, after)]
    return bool(sizes[0][0] == sizes[1][0] and math.prod(sizes[0]) == math.prod(sizes[1]))


def _carrying(node: Any, axis: int) -> Iterable[int]:
    """The inputs that have a row for each of the output's."""
    if node.get_type_name() not in _ALONE:
        return (0,)
    rank = len(_shape(node.output(0)))
    found = []
    for place, value in enumerate(node.input_values()):
        shape = _shape(value)
        at = axis - (rank - len(shape))
        if at >= 0 and shape[at] != 1:
            found.append(place)
    return found


def _axis_before(node: Any, axis: int, place: int) -> int:
    """Which axis of an input the output's is; axes that an input lacks are its first ones."""
    if node.get_type_name() in _ALONE:
        return axis - len(_shape(node.output(0))) + len(_shape(node.input_value(place)))
    if node.get_type_name() != "Transpose":
        return axis
    order = _numbers(node.input_value(1))
    assert order is not None
    return order[axis]


def _sliced(value: Any, axis: int, row: int) -> Any:
    from openvino import opset13

    ends = [_constant([number]) for number in (row, row + 1, 1, axis)]
    return opset13.slice(value, *ends).output(0)


def _constant(numbers: Any) -> Any:
    from openvino import opset13

    return opset13.constant(np.array(numbers, np.int64)).output(0)


def _shape(value: Any) -> list[Any]:
    return list(value.get_partial_shape())


def _numbers(value: Any) -> list[int] | None:
    """Whole numbers that are constant, or a range between constants."""
    node = value.get_node()
    if node.get_type_name() == "Constant":
        return [int(number) for number in node.get_data().reshape(-1)]
    if node.get_type_name() == "Range":
        ends = [_numbers(node.input_value(place)) for place in range(3)]
        if all(end is not None and len(end) == 1 for end in ends):
            return list(range(*(end[0] for end in ends if end is not None)))
    return None
