"""What nobody reads of a row is not computed, and what is read stays the same."""

from __future__ import annotations

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from dermaflux.engines.ov import core
from dermaflux.engines.ov_rows import one_row

TOKENS, WIDTH, HEADS = 9, 8, 2


def weights(rows: int, columns: int, seed: int):
    random = np.random.default_rng(seed)
    return ops.constant(random.standard_normal((rows, columns), dtype=np.float32))


def across(value, order):
    return ops.transpose(value, ops.constant(np.array(order)))


def block(tokens, mask=None):
    """Attention and a layer behind it, with residuals."""
    normed = ops.mvn(tokens, ops.constant(np.array([2])), True, 1e-6, "INSIDE_SQRT")
    rounded = ops.fake_quantize(normed, *(ops.constant(np.float32(x)) for x in (-3, 3, -3, 3)), 256)
    query, key, value = (
        ops.reshape(
            ops.matmul(rounded, weights(WIDTH, WIDTH, seed), False, False),
            ops.constant(np.array([0, TOKENS, HEADS, WIDTH // HEADS])),
            special_zero=True,
        )
        for seed in (1, 2, 3)
    )
    scores = ops.matmul(across(query, [0, 2, 1, 3]), across(key, [0, 2, 3, 1]), False, False)
    if mask is not None:
        scores = ops.add(scores, mask)
    mixed = ops.matmul(ops.softmax(scores, -1), across(value, [0, 2, 1, 3]), False, False)
    joined = ops.reshape(
        across(mixed, [0, 2, 1, 3]), ops.constant(np.array([-1, TOKENS, WIDTH])), special_zero=False
    )
    tokens = ops.add(tokens, joined)
    made = ops.matmul(tokens, weights(WIDTH, WIDTH, 4), False, False)
    return ops.add(tokens, ops.gelu(made, "erf"))


def model(row: int = 0, blocks: int = 2, mask=None, whole: bool = False) -> openvino.Model:
    given = ops.parameter([-1, TOKENS, WIDTH], np.float32, name="tokens")
    tokens = given
    for _ in range(blocks):
        tokens = block(tokens, mask)
    axis = ops.constant(np.array(1))
    outputs = [ops.gather(tokens, ops.constant(np.array(row)), axis)]
    return openvino.Model([*outputs, tokens] if whole else outputs, [given])


def answer(graph: openvino.Model) -> np.ndarray:
    tokens = np.random.default_rng(0).standard_normal((3, TOKENS, WIDTH), dtype=np.float32)
    compiled = core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled({0: tokens})[0])


def lengths(graph: openvino.Model, kind: str) -> list[int]:
    """How many rows operators make."""
    return [
        node.get_output_partial_shape(0)[-2].get_length()
        for node in graph.get_ordered_ops()
        if node.get_type_name() == kind
    ]


@pytest.mark.parametrize("row", [0, 4])
@pytest.mark.parametrize("mask", [None, "one", "each", "heads", "flat"])
def test_one_row_of_the_last_block_is_the_same(row, mask):
    random = np.random.default_rng(5)
    shapes = {"one": (1, 1, 1, TOKENS), "each": (1, 1, TOKENS, TOKENS),
              "heads": (HEADS, TOKENS, TOKENS), "flat": (TOKENS, TOKENS)}  # fmt: skip
    given = mask and ops.constant(random.standard_normal(shapes[mask], dtype=np.float32))
    before, after = model(row, mask=given), model(row, mask=given)
    assert one_row(after) > 10
    expected = answer(before)
    assert np.abs(answer(after) - expected).max() < 1e-5 * np.abs(expected).max()
    assert lengths(before, "Gelu") == [TOKENS, TOKENS]
    assert lengths(after, "Gelu") == [TOKENS, 1]
    # Of three products of each block's tokens the last one's queries are one row.
    assert lengths(after, "Softmax") == [TOKENS, 1]
    assert lengths(after, "MVN") == [TOKENS, TOKENS]


def test_what_others_read_stays_whole():
    graph = model(whole=True)
    assert one_row(graph) == 0
    assert lengths(graph, "Gelu") == [TOKENS, TOKENS]
    given = ops.parameter([-1, TOKENS, WIDTH], np.float32)
    mean = ops.reduce_mean(block(given), ops.constant(np.array([1])))
    assert one_row(openvino.Model([mean], [given])) == 0


def test_rows_that_are_made_of_others_are_not_cut():
    given = ops.parameter([-1, TOKENS, WIDTH], np.float32)
    over = ops.mvn(block(given), ops.constant(np.array([1, 2])), True, 1e-6, "INSIDE_SQRT")
    zero, one = (ops.constant(np.array(number)) for number in (0, 1))
    graph = openvino.Model([ops.gather(over, zero, one)], [given])
    assert one_row(graph) == 0
    # A row that is found out by the numbers themselves.
    found = ops.convert(ops.reduce_max(given, ops.constant(np.array([0, 1, 2]))), np.int64)
    assert one_row(openvino.Model([ops.gather(block(given), found, one)], [given])) == 0


def test_a_row_that_is_read_as_a_list_keeps_its_axis():
    def listed() -> openvino.Model:
        given = ops.parameter([-1, TOKENS, WIDTH], np.float32)
        index, axis = ops.constant(np.array([2])), ops.constant(np.array(1))
        return openvino.Model([ops.gather(block(given), index, axis)], [given])

    cut = listed()
    assert one_row(cut) > 10
    expected, found = answer(listed()), answer(cut)
    assert expected.shape == found.shape == (3, 1, WIDTH)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_what_is_the_second_factor_too_stays_whole():
    def own() -> openvino.Model:
        given = ops.parameter([-1, TOKENS, WIDTH], np.float32)
        tokens = ops.gelu(given, "erf")
        scores = ops.softmax(ops.matmul(tokens, tokens, False, True), -1)
        mixed = ops.matmul(scores, weights(TOKENS, WIDTH, 1), False, False)
        zero, one = (ops.constant(np.array(number)) for number in (0, 1))
        return openvino.Model([ops.gather(mixed, zero, one)], [given])

    cut = own()
    assert one_row(cut) == 3
    assert lengths(cut, "Gelu") == [TOKENS]
    expected = answer(own())
    assert np.abs(answer(cut) - expected).max() < 1e-5 * np.abs(expected).max()
