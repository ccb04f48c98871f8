"""Batches cut over cores: the same rows in the same order, whoever computed them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from dermaflux.engines import OPENVINO, Choice, ov
from dermaflux.engines.ov import OpenVinoEngine
from dermaflux.engines.ov_streams import Streams
from dermaflux.errors import EngineError
from dermaflux.flow import noise


class Request:
    """Doubles what it is given; what is waited for is done, and a negative number fails."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def start_async(self, inputs: dict[str, np.ndarray], share_inputs: bool) -> None:
        self.given = inputs["x"]
        self.model.running += 1
        self.model.sizes.append(len(self.given))

    def wait(self) -> None:
        self.model.running -= 1
        if (self.given < 0).any():
            raise RuntimeError("negative")

    def get_output_tensor(self, index: int) -> Any:
        return type("Tensor", (), {"data": 2 * self.given})


class Model:
    def __init__(self) -> None:
        self.running = 0
        self.requests = 0
        self.sizes: list[int] = []

    def create_infer_request(self) -> Request:
        self.requests += 1
        return Request(self)


def test_a_batch_is_cut_and_put_together_in_order():
    model, made = Model(), []
    streams = Streams(lambda: made.append(model) or model, 3)
    assert [streams.take({"x": np.zeros((n, 2))}) for n in (1, 2, 3, 8)] == [
        False,
        False,
        True,
        True,
    ]
    assert made == []
    for size in (3, 8, 7):
        x = np.arange(2.0 * size).reshape(size, 2)
        assert np.array_equal(streams.run({"x": x}, ["y"])["y"], 2 * x)
    assert model.sizes == [1, 1, 1, 3, 3, 2, 3, 2, 2]
    assert len(made) == 1
    assert (model.requests, model.running) == (3, 0)
    assert not Streams(lambda: model, 1).take({"x": np.zeros((9, 2))})


def test_a_piece_that_fails_leaves_none_running():
    model = Model()
    streams = Streams(lambda: model, 3)
    with pytest.raises(RuntimeError, match="negative"):
        streams.run({"x": np.array([[-1.0], [2.0], [3.0]])}, ["y"])
    assert model.running == 0
    assert np.array_equal(streams.run({"x": np.ones((3, 1))}, ["y"])["y"], np.full((3, 1), 2.0))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_classifiers_batches_are_bit_equal_to_single_pictures(tiny_bundle, precision):
    choice = Choice("classifier", OPENVINO, precision, "")
    engine = ov.load(tiny_bundle, choice, threads=2)
    height, width = tiny_bundle.classifier.input_size[1:]
    pixels = noise(5, (9, 3, height, width)).astype(np.float32)
    alone = [engine.run({"pixel_values": pixels[i : i + 1]})["logits"][0] for i in range(9)]
    for size in range(2, 10):
        found = engine.run({"pixel_values": pixels[:size]})["logits"]
        assert np.array_equal(found, np.stack(alone[:size]))
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda _: engine.run({"pixel_values": pixels})["logits"], range(8)))
    assert all(np.array_equal(one, np.stack(alone)) for one in batches)


def test_one_core_and_the_generator_are_left_as_they_are(tiny_bundle, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("it was cut")

    monkeypatch.setattr(Streams, "run", never)
    pixels = noise(5, (4, 3, *tiny_bundle.classifier.input_size[1:])).astype(np.float32)
    graph = tiny_bundle.file(tiny_bundle.parts["classifier"].files["fp32"].path)
    for engine in (
        OpenVinoEngine(graph, "fp32", 1, batches=True),
        OpenVinoEngine(graph, "fp32", 2),
    ):
        assert len(engine.run({"pixel_values": pixels})["logits"]) == 4
    with pytest.raises(EngineError, match="it was cut"):
        OpenVinoEngine(graph, "fp32", 2, batches=True).run({"pixel_values": pixels})
