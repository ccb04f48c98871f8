"""Turns of callers, by properties of random queues."""

from __future__ import annotations

import random

import pytest

from serving.pace import FIRST_GUESS_SECONDS, Pace
from serving.waiting import Waiting, taken


def always(_: object) -> bool:
    return True


def filled(seed: int, count: int = 40) -> tuple[Waiting[tuple[str, int]], dict[str, list[int]]]:
    chance = random.Random(seed)
    waiting: Waiting[tuple[str, int]] = Waiting()
    sent: dict[str, list[int]] = {}
    for number in range(count):
        caller = chance.choice("aaaabbc")
        waiting.put(caller, (caller, number))
        sent.setdefault(caller, []).append(number)
    return waiting, sent


@pytest.mark.parametrize("seed", range(5))
def test_everything_comes_once_each_caller_in_order_and_as_foretold(seed: int) -> None:
    waiting, sent = filled(seed)
    foretold = list(waiting.order())
    order = [waiting.take(always) for _ in range(len(waiting))]
    assert order == foretold
    assert len(waiting) == 0
    assert waiting.take(always) is None
    for caller, numbers in sent.items():
        assert [number for who, number in order if who == caller] == numbers


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_served_twice_while_another_waits(seed: int) -> None:
    waiting, sent = filled(seed)
    served = dict.fromkeys(sent, 0)
    while (item := waiting.take(always)) is not None:
        served[item[0]] += 1
        for other, count in served.items():
            if count < len(sent[other]):
                assert served[item[0]] <= count + 1


def test_a_newcomer_waits_for_one_image_of_each_other_at_most() -> None:
    waiting, sent = filled(1)
    waiting.put("new", ("new", 0))
    assert list(waiting.order()).index(("new", 0)) <= len(sent)


def test_who_does_not_fit_keeps_its_place_in_front() -> None:
    waiting: Waiting[str] = Waiting()
    for caller, item in (("a", "large"), ("a", "a2"), ("b", "small"), ("b", "b2"), ("c", "c1")):
        waiting.put(caller, item)
    assert waiting.take(lambda item: item != "large") == "small"
    assert waiting.take(lambda item: item != "large") == "c1"
    assert waiting.take(always) == "large"
    assert [waiting.take(always) for _ in range(2)] == ["b2", "a2"]


def test_what_is_discarded_is_gone() -> None:
    waiting, sent = filled(2)
    first = next(iter(waiting.order()))
    assert waiting.discard(first[0], first)
    assert not waiting.discard(first[0], first)
    assert not waiting.discard("nobody", first)
    assert first not in list(waiting.order())
    assert len(waiting) == sum(map(len, sent.values())) - 1


def test_places_are_bounded_and_the_last_quarter_is_for_newcomers() -> None:
    places = 12
    assert taken(50, here=0, mine=0, places=places)
    assert taken(1, here=8, mine=8, places=places)
    assert not taken(1, here=9, mine=9, places=places)
    assert taken(3, here=9, mine=0, places=places)
    assert not taken(4, here=9, mine=0, places=places)
    assert not taken(1, here=12, mine=0, places=places)


def test_a_pace_is_that_of_late() -> None:
    pace = Pace()
    assert (pace.seconds(3), pace.seconds(0)) == (FIRST_GUESS_SECONDS, 0)
    pace.learn(10, 10)
    assert pace.seconds(4) == 4
    for _ in range(1000):
        pace.learn(2, 10)
    assert pace.seconds(10) == pytest.approx(2, rel=1e-3)
