"""The decoder's graph said another way: the same pictures, of any batch and size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dermaflux.engines import ov
from dermaflux.engines.ov import OpenVinoEngine
from dermaflux.engines.ov_decoder import Decoder, doubling, norms, rewrite, upsamplings
from dermaflux.flow import noise

CHANNELS, GROUPS = 8, 4


def decoder(
    folder: Path,
    *,
    scales: tuple[float, ...] = (1, 1, 2, 2),
    mode: str = "nearest",
    strides: tuple[int, int] = (1, 1),
    shared: bool = False,
) -> Path:
    """x [B, 8, H, W]: a group norm, one of pixels in a row, doubled, a convolution; as `y`. With
    `shared` the doubled picture is an output too."""
    random = np.random.default_rng(0)
    constants = {
        "scale": random.standard_normal(CHANNELS, dtype=np.float32),
        "bias": random.standard_normal(CHANNELS, dtype=np.float32),
        "row": np.array([0, CHANNELS, -1], np.int64),
        "factors": np.array(scales, np.float32),
        "weights": random.standard_normal((3, CHANNELS, 3, 3), dtype=np.float32),
        "shift": random.standard_normal(3, dtype=np.float32),
    }
    norm = {"num_groups": GROUPS, "epsilon": 1e-6}
    nodes = [
        helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["a"], **norm),
        helper.make_node("Reshape", ["a", "row"], ["b"]),
        helper.make_node("GroupNormalization", ["b", "scale", "bias"], ["c"], **norm),
        helper.make_node("Shape", ["x"], ["whole"]),
        helper.make_node("Reshape", ["c", "whole"], ["d"]),
        helper.make_node(
            *("Resize", ["d", "", "factors"], ["e"]),
            mode=mode,
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        helper.make_node(
            *("Conv", ["e", "weights", "shift"], ["y"]), pads=[1, 1, 1, 1], strides=strides
        ),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, None, None])
        for name, channels in (("x", CHANNELS), ("y", 3), ("e", CHANNELS))
    ]
    made = helper.make_graph(
        nodes,
        "decoder",
        ends[:1],
        ends[1:] if shared else ends[1:2],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    file = folder / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)]), file)
    return file


def kinds(model: Any) -> list[str]:
    return [op.get_type_name() for op in model.get_ordered_ops()]


def test_the_same_pictures_come_out(tmp_path):
    file = decoder(tmp_path)
    x = noise(1, (3, CHANNELS, 6, 4)) * 5 + 20
    plain = ov.core().read_model(str(file))
    other = plain.clone()
    assert (norms(other), upsamplings(other)) == (2, 1)
    assert rewrite(other) == 0
    assert not {"GroupNormalization", "Interpolate"} & set(kinds(other))
    want, found = (ov.core().compile_model(one, "CPU")({"x": x})["y"] for one in (plain, other))
    assert want.shape == (3, 3, 12, 8)
    assert np.abs(found - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    "different",
    [
        {"scales": (1, 1, 3, 3)},
        {"scales": (1, 1, 2, 1)},
        {"mode": "linear"},
        {"strides": (2, 2)},
        {"shared": True},
    ],
)
def test_what_is_no_doubling_stays_as_it_is(tmp_path, different):
    model = ov.core().read_model(str(decoder(tmp_path, **different)))
    assert upsamplings(model) == 0
    assert norms(model) == 2


def test_a_doubled_picture_is_convolved_from_its_half():
    weights = noise(2, (2, 3, 3, 3))
    x = noise(3, (3, 5, 4)).astype(np.float64)
    doubled = np.pad(x.repeat(2, 1).repeat(2, 2), ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(doubled, (3, 3), (1, 2))
    want = np.einsum("chwkl,ockl->ohw", windows, weights)
    found = np.zeros((2, 5 * 2 + 2, 4 * 2 + 2))
    for row in range(5):
        for column in range(4):
            place = np.s_[:, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
            found[place] += np.einsum("c,cokl->okl", x[:, row, column], doubling(weights))
    assert np.abs(found[:, 1:-1, 1:-1] - want).max() < 1e-5


class Fake:
    """Twice what it is given; `shapes` are those that it takes."""

    name, precision = "openvino-cpu", "fp32"

    def __init__(self, shapes: Any) -> None:
        self.shapes = shapes
        self.given: list[tuple[int, ...]] = []

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self.shapes is None or inputs["x"].shape == self.shapes["x"]
        self.given.append(inputs["x"].shape)
        return {"y": 2 * inputs["x"]}

    def bind(self, constant: Any, timesteps: Any = None) -> Any:
        raise AssertionError


def test_the_usual_size_has_its_own_model_and_others_share_one():
    made: list[Fake] = []
    engine = Decoder(lambda shapes: made.append(Fake(shapes)) or made[-1], {"x": (1, 2, 3)})
    for shape in ((1, 2, 3), (4, 2, 3)):
        x = noise(1, shape)
        assert np.array_equal(engine.run({"x": x})["y"], 2 * x)
    assert [one.shapes for one in made] == [{"x": (1, 2, 3)}]
    assert made[0].given == [(1, 2, 3)] * 5
    for shape in ((1, 2, 5), (2, 7, 3)):
        x = noise(2, shape)
        assert np.array_equal(engine.bind({})({"x": x})["y"], 2 * x)
    assert [one.shapes for one in made[1:]] == [None]
    assert made[1].given == [(1, 2, 5), (1, 7, 3), (1, 7, 3)]
    assert len(made[0].given) == 5


def test_a_picture_is_the_same_bits_in_every_batch(tmp_path):
    file = decoder(tmp_path)
    engine = Decoder(
        lambda shapes: OpenVinoEngine(file, "fp32", 2, shapes=shapes), {"x": (1, CHANNELS, 8, 8)}
    )
    for size in (8, 6):
        x = noise(4, (5, CHANNELS, size, size))
        together = engine.run({"x": x})["y"]
        for row in range(5):
            alone = engine.run({"x": x[row : row + 1]})["y"]
            assert np.array_equal(alone, together[row : row + 1])


def test_rewritten_models_give_the_same_bits_every_time_on_any_threads(tmp_path):
    model = ov.core().read_model(str(decoder(tmp_path)))
    rewrite(model)
    model.reshape({"x": [1, CHANNELS, 64, 64]})
    x = noise(5, (1, CHANNELS, 64, 64))
    seen = set()
    for threads in ("1", "2"):
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1"}
        compiled = ov.core().compile_model(model, "CPU", settings)
        seen |= {compiled({"x": x})["y"].tobytes() for _ in range(3)}
    assert len(seen) == 1
