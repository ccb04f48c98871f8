"""Graphs compiled for the shapes that they are asked with: once each, and not for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from dermaflux.engines.ov_shapes import LEAST, MOST, MOST_FIXED_BYTES, Shaped, kept_at_once


class Model:
    """A model of the inputs a and b that notes what shapes it is given."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[int]] = {}
        self.inputs = [SimpleNamespace(get_any_name=lambda name=name: name) for name in "ab"]

    def reshape(self, shapes: dict[str, list[int]]) -> None:
        self.shapes = shapes


class Compiled:
    def __init__(self, shapes: dict[str, list[int]]) -> None:
        self.shapes = shapes
        self.requests = 0

    def create_infer_request(self) -> str:
        self.requests += 1
        return f"request {self.requests}"


def shaped(fixed: bool) -> tuple[Shaped, list[Compiled]]:
    made: list[Compiled] = []

    def compiled(model: Any) -> Compiled:
        made.append(Compiled(dict(model.shapes)))
        return made[-1]

    return Shaped(Model(), compiled, MOST if fixed else 0), made


def of(batch: int) -> dict[str, tuple[int, ...]]:
    return {"a": (batch, 3), "b": (batch,)}


def test_each_shape_is_compiled_once() -> None:
    graph, made = shaped(fixed=True)
    for batch in (1, 2, 1, 2, 2):
        graph.slot(of(batch))
    assert [one.shapes for one in made] == [{"a": [n, 3], "b": [n]} for n in (1, 2)]
    assert graph.compiled() == (made[1], made[0])


def test_free_shapes_are_compiled_once_for_all() -> None:
    graph, made = shaped(fixed=False)
    assert graph.slot(of(1)) is graph.slot(of(7))
    assert [one.shapes for one in made] == [{}]


def test_what_was_not_used_the_longest_goes() -> None:
    graph, made = shaped(fixed=True)
    for batch in range(1, MOST + 1):
        graph.slot(of(batch))
    graph.slot(of(1))
    graph.slot(of(MOST + 1))
    assert len(graph.compiled()) == MOST
    assert made[0] in graph.compiled()
    assert made[1] not in graph.compiled()


def test_a_request_is_used_again_and_never_by_two() -> None:
    graph, made = shaped(fixed=True)
    with graph.request(of(1)) as one, graph.request(of(1)) as other:
        assert one != other
    with graph.request(of(1)), graph.request(of(1)):
        pass
    assert made[0].requests == 2
    with pytest.raises(ValueError, match="lost"), graph.request(of(1)):
        raise ValueError("lost")
    with graph.request(of(1)), graph.request(of(1)):
        pass
    assert made[0].requests == 2


def test_threads_that_ask_at_once_compile_once() -> None:
    graph, made = shaped(fixed=True)
    start = threading.Barrier(6)

    def ask(number: int) -> None:
        start.wait()
        graph.slot(of(1 + number % 2))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))
    assert len(made) == 2


def test_a_shape_that_is_compiled_does_not_wait_for_another() -> None:
    compiling, over = threading.Event(), threading.Event()

    def compiled(model: Any) -> Compiled:
        if model.shapes == {"a": [2, 3], "b": [2]}:
            compiling.set()
            assert over.wait(10)
        return Compiled(dict(model.shapes))

    graph = Shaped(Model(), compiled, MOST)
    first = graph.slot(of(1))
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(graph.slot, of(2))
        assert compiling.wait(10)
        found = pool.submit(graph.slot, of(1))
        try:
            assert found.result(5) is first
            assert len(graph.compiled()) == 1
        finally:
            over.set()
        assert second.result(10) is graph.slot(of(2))


def test_the_larger_a_graph_the_fewer_of_it_are_kept() -> None:
    assert kept_at_once(0) == kept_at_once(10 * 2**20) == MOST
    assert LEAST < kept_at_once(80 * 2**20) < MOST
    assert kept_at_once(MOST_FIXED_BYTES) == LEAST
    assert kept_at_once(MOST_FIXED_BYTES + 1) == 0
