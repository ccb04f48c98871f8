"""A graph is cut where each part gets all that it asks for, and not elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dermaflux.engines.ov_library import core, openvino
from dermaflux.engines.ov_split import MODULATION, split

ops = openvino.opset13
WIDTH = 4


POOLED = "pooled_projections"


def graph(*, kept: str = POOLED, time: str = POOLED, step: str = POOLED) -> Any:
    """tokens * modulation + text; each part takes the batch's size from an input's shape."""
    shapes = {
        "hidden_states": [-1, -1, WIDTH],
        "encoder_hidden_states": [-1, WIDTH],
        "pooled_projections": [-1, WIDTH],
        "timestep": [-1],
        "img_ids": [-1, 3],
        "txt_ids": [2, 3],
    }
    given = {}
    for name, shape in shapes.items():
        given[name] = ops.parameter(shape, np.float32)
        given[name].set_friendly_name(name)
        given[name].output(0).get_tensor().set_names({name})

    def count(name: str) -> Any:
        shape = ops.shape_of(given[name], "i64")
        return ops.gather(shape, ops.constant([0]), ops.constant(0))

    def rows(value: Any, name: str) -> Any:
        target = ops.concat([count(name), ops.constant([1, WIDTH])], 0)
        return ops.reshape(value, target, False)

    times = ops.unsqueeze(given["timestep"], ops.constant(1))
    row = rows(ops.multiply(given["pooled_projections"], times), time)
    text = rows(ops.relu(given["encoder_hidden_states"]), kept)
    turned = ops.multiply(given["hidden_states"], row)
    out = ops.add(rows(ops.reduce_sum(turned, ops.constant(1)), step), text)
    angles = ops.add(
        ops.reduce_sum(ops.cos(given["img_ids"]), ops.constant([0, 1])),
        ops.reduce_sum(ops.cos(given["txt_ids"]), ops.constant([0, 1])),
    )
    result = ops.result(ops.add(out, angles))
    result.output(0).get_tensor().set_names({"out"})
    return openvino.Model([result], list(given.values()))


def test_parts_give_what_the_whole_gives() -> None:
    random = np.random.default_rng(0)
    inputs = {
        "hidden_states": random.standard_normal((3, 5, WIDTH), np.float32),
        "encoder_hidden_states": random.standard_normal((3, WIDTH), np.float32),
        "pooled_projections": random.standard_normal((3, WIDTH), np.float32),
        "timestep": np.array([1, 0.5, 0.25], np.float32),
        "img_ids": random.standard_normal((5, 3), np.float32),
        "txt_ids": random.standard_normal((2, 3), np.float32),
    }

    def run(model: Any, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        names = [port.get_any_name() for port in model.inputs]
        found = core().compile_model(model, "CPU")({name: given[name] for name in names})
        return [found[index] for index in range(len(model.outputs))]

    (expected,) = run(graph(), inputs)
    parts = split(graph())
    assert parts is not None
    kept = {f"kept.{index}": value for index, value in enumerate(run(parts.kept, inputs))}
    (modulation,) = run(parts.modulation, inputs)
    (found,) = run(parts.step, {**inputs, **kept, MODULATION: modulation})
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("asks", "fits"),
    [
        ({}, True),
        ({"step": "hidden_states"}, True),
        ({"step": "timestep"}, False),
        ({"time": "hidden_states"}, False),
        ({"time": "encoder_hidden_states"}, False),
        ({"kept": "timestep"}, False),
        ({"kept": "hidden_states"}, False),
    ],
)
def test_a_part_that_asks_for_what_it_does_not_get_is_not_cut_off(
    asks: dict[str, str], fits: bool
) -> None:
    assert (split(graph(**asks)) is not None) == fits
