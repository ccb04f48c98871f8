from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import measuring
from dermaflux.errors import DermaFluxError


def test_each_side_takes_every_place_of_a_round_and_warm_ups_do_not_count() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str) -> Callable[[int], object]:
        return lambda number: calls.append((name, number))

    seconds = measuring.alternate({name: side(name) for name in "abc"}, rounds=6, warm_up=1)
    assert {name: len(spent) for name, spent in seconds.items()} == {"a": 6, "b": 6, "c": 6}
    assert [number for _, number in calls[:3]] == [0, 0, 0]  # warm-up
    rounds = [calls[start : start + 3] for start in range(3, len(calls), 3)]
    assert [{number for _, number in one} for one in rounds] == [{n} for n in range(6)]
    for place in range(3):
        assert {one[place][0] for one in rounds} == set("abc")
    # Rotation alone would leave a always before b.
    pairs = {(one[i][0], one[i + 1][0]) for one in rounds for i in (0, 1)}
    assert {("a", "b"), ("b", "a")} <= pairs


def test_no_round_is_one_sentence() -> None:
    with pytest.raises(DermaFluxError, match="0 rounds"):
        measuring.alternate({"a": lambda number: None}, rounds=0)


def test_a_ratio_is_within_rounds_and_its_interval_holds_it() -> None:
    # Twice as fast in each round, while the machine slows down tenfold.
    base = [2.0 * 1.3**n for n in range(10)]
    sure = measuring.ratio(base, [one / 2 for one in base])
    assert (sure.median, sure.low, sure.high) == pytest.approx((2, 2, 2))
    unsure = measuring.ratio([2, 2, 2, 2, 2, 2, 2, 2], [1, 1.1, 0.9, 1, 1.2, 0.8, 1, 1.05])
    assert unsure.low < unsure.median < unsure.high
    assert unsure == measuring.ratio([2] * 8, [1, 1.1, 0.9, 1, 1.2, 0.8, 1, 1.05])


@pytest.mark.parametrize(("base", "other"), [([], []), ([1.0], [1.0, 2.0])])
def test_rounds_that_do_not_match_have_no_ratio(base: list[float], other: list[float]) -> None:
    with pytest.raises(ValueError, match=r"rounds|shorter|longer"):
        measuring.ratio(base, other)


def test_spread_is_in_milliseconds() -> None:
    found = measuring.spread([0.001 * n for n in range(101)])
    assert found == {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99}
