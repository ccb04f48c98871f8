"""Modulation ahead of the steps: few calls, the same rows for whoever asks, bounded memory."""

from __future__ import annotations

import numpy as np
import pytest

from dermaflux.engines import ov_ahead
from dermaflux.engines.ov_ahead import BLOCK, Ahead

WIDTH = 5
TIMES = np.linspace(1, 0.05, 20, dtype=np.float32)


class Computes:
    """Rows that tell what they were made of; counts calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self.calls += 1
        assert {value.shape[0] for value in inputs.values()} == {BLOCK}
        first = inputs["timestep"] + 10 * inputs["pooled_projections"][:, 0]
        first = first + 100 * inputs.get("guidance", np.zeros(BLOCK, np.float32))
        return np.repeat(first[:, None, None], WIDTH, axis=2)


def pooled(number: float) -> np.ndarray:
    return np.full(3, number, np.float32)


def test_a_picture_takes_one_call_for_eight_steps() -> None:
    compute = Computes()
    item = Ahead(compute, WIDTH, guided=True).item(pooled(1), np.float32(2), TIMES)
    for time in TIMES:
        np.testing.assert_allclose(item.row(time), np.full(WIDTH, time + 210), rtol=1e-6)
    assert compute.calls == -(-len(TIMES) // BLOCK)


def test_a_prompt_that_comes_again_finds_its_rows_made() -> None:
    compute = Computes()
    ahead = Ahead(compute, WIDTH, guided=False)
    rows = [ahead.item(pooled(1), None, TIMES).row(time) for time in TIMES]
    before = compute.calls
    again = ahead.item(pooled(1), None, TIMES)
    assert all(np.array_equal(again.row(t), row) for t, row in zip(TIMES, rows, strict=True))
    assert compute.calls == before
    # Of another prompt or guidance nothing is known.
    ahead.item(pooled(2), None, TIMES).row(TIMES[0])
    assert compute.calls == before + 1


@pytest.mark.parametrize("times", [TIMES[:0], TIMES[:3], TIMES])
def test_a_time_that_nobody_announced_is_computed(times: np.ndarray) -> None:
    item = Ahead(Computes(), WIDTH, guided=False).item(pooled(0), None, times)
    for time in (np.float32(0.77), np.float32(0.01), np.float32("nan")):
        np.testing.assert_allclose(item.row(time), np.full(WIDTH, time))


@pytest.mark.parametrize(("announced", "asked"), [(0.0, -0.0), (-0.0, 0.0), (-0.0, -0.0)])
def test_nought_has_no_sign(announced: float, asked: float) -> None:
    times = np.array([1, announced], np.float32)
    item = Ahead(Computes(), WIDTH, guided=False).item(pooled(0), None, times)
    np.testing.assert_array_equal(item.row(np.float32(asked)), np.zeros(WIDTH))


def test_what_is_kept_is_bounded_and_a_picture_keeps_its_own(monkeypatch) -> None:
    monkeypatch.setattr(ov_ahead, "_KEPT_BYTES", 0)
    compute = Computes()
    ahead = Ahead(compute, WIDTH, guided=False)
    items = [ahead.item(pooled(number), None, TIMES[:BLOCK]) for number in range(4)]
    for time in TIMES[:BLOCK]:
        for number, item in enumerate(items):
            np.testing.assert_allclose(item.row(time), np.full(WIDTH, time + 10 * number))
    # A block of one picture is all that is kept, and still nothing was computed twice.
    assert compute.calls == len(items)
    assert sum(ahead.known((pooled(n).tobytes(), b"", t.tobytes())) is not None
               for n in range(4) for t in TIMES[:BLOCK]) == BLOCK  # fmt: skip
