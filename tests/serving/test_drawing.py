"""The generator's queue: who joins, leaves, waits, is refused; nobody is lost or mixed up."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from dermaflux.engines import Array, Arrays, Engine, fake
from dermaflux.engines.fake import Fake
from dermaflux.errors import Cancelled, EngineError
from dermaflux.gains import Gains
from dermaflux.pipeline import Pipeline, Request
from dermaflux.residency import InTurns
from serving.drawing import Drawing
from serving.metrics import Metrics
from serving.replies import Refusal
from serving.settings import Settings
from serving.ticket import Done, News, Position, Step, Ticket
from tests.serving.live import until

SECONDS = 10.0


@dataclass
class Gate:
    """Lets one step of the transformer through at a time, or all; keeps the batches it saw."""

    batches: list[tuple[int, int]] = field(default_factory=list)
    fails: Callable[[Arrays], Exception | None] = lambda _: None
    _free: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _came: threading.Condition = field(default_factory=threading.Condition)
    open: bool = True

    def __call__(self, inputs: Arrays) -> None:
        tokens = inputs["hidden_states"].shape
        with self._came:
            self.batches.append((tokens[0], tokens[1]))
            self._came.notify_all()
        if not self.open:
            assert self._free.acquire(timeout=SECONDS)
        if error := self.fails(inputs):
            raise error

    def step(self, count: int = 1) -> None:
        """Let so many through."""
        self._free.release(count)

    def wait_for(self, batches: int) -> None:
        """Until so many have come."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.batches) >= batches, SECONDS)

    def release(self) -> None:
        """Let all through from now on."""
        self.open = True
        self._free.release(1000)


@dataclass
class House:
    drawing: Drawing
    gate: Gate
    pipeline: Pipeline
    registry: CollectorRegistry

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"dermaflux_{name}", labels) or 0.0


@pytest.fixture
def house(fake_pipeline: Pipeline) -> Iterator[Callable[..., House]]:
    made: list[House] = []

    def build(
        *,
        limit: int | None = 4,
        engines: dict[str, Fake] | None = None,
        loads: list[str] | None = None,
        **settings: object,
    ) -> House:
        gate = Gate()
        velocity = fake.engines(fake_pipeline.model)["transformer"]

        def gated(inputs: Arrays) -> dict[str, Array]:
            gate(inputs)
            return velocity.run(inputs)

        pipeline = Pipeline(
            fake_pipeline.model,
            fake_pipeline.schedule,
            replace(fake_pipeline.limits, max_batch=8),
            fake_pipeline.defaults,
            fake_pipeline.tokenizers,
            {**fake_pipeline.engines, "transformer": Fake(gated), **(engines or {})},
        )
        if loads is not None:
            pipeline.engines = in_turns(pipeline.engines, loads)
        registry = CollectorRegistry()
        configured = replace(Settings(), **{"waiting": 100, **settings})  # type: ignore[arg-type]
        drawing = Drawing(pipeline, Metrics(registry), configured, limit=limit)
        made.append(House(drawing, gate, pipeline, registry))
        return made[-1]

    yield build
    for one in made:
        one.gate.release()
        one.drawing.close()


def in_turns(engines: Mapping[str, Engine], loads: list[str]) -> InTurns:
    """The same engines, one group in memory at a time; `loads` keeps who was loaded."""

    def load(part: str) -> Engine:
        loads.append(part)
        return engines[part]

    groups = (("text_encoder", "text_encoder_2"), ("transformer",), ("vae_decoder",))
    return InTurns(load, groups)


def ask(seed: int = 0, steps: int = 4, size: int = 64, prompt: str = "benign lesion") -> Request:
    return Request(prompt, seed, steps, 2.0, size, 64)


def images(ticket: Ticket) -> list[np.ndarray]:
    return asyncio.run(ticket.images())


def refused(submit: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        submit()
    return caught.value


def test_who_comes_while_others_are_drawn_joins_at_the_next_step(house, fake_pipeline):
    here = house()
    here.gate.open = False
    first = here.drawing.submit([ask(1, steps=4)], "a")
    here.gate.wait_for(1)
    second = here.drawing.submit([ask(2, steps=2)], "b")
    assert (first.ahead, second.ahead) == (0, 0)
    here.gate.release()
    assert np.array_equal(images(first)[0], fake_pipeline.generate([ask(1, steps=4)])[0])
    assert np.array_equal(images(second)[0], fake_pipeline.generate([ask(2, steps=2)])[0])
    assert [batch for batch, _ in here.gate.batches] == [1, 2, 2, 1]
    assert here.count("batch_size_sum") == 6
    assert here.count("generations_total", outcome="done") == 2


def test_one_after_the_other_where_the_limit_is_one(house):
    here = house(limit=1)
    here.gate.open = False
    tickets = [here.drawing.submit([ask(i, steps=2)], "a") for i in range(3)]
    assert [ticket.ahead for ticket in tickets] == [0, 1, 2]
    here.gate.release()
    for ticket in tickets:
        images(ticket)
    assert here.gate.batches == [(1, 16)] * 6


def test_several_sizes_take_steps_in_turn_within_one_limit(house, fake_pipeline):
    here = house(limit=3)
    here.gate.open = False
    wanted = [ask(i, steps=3, size=(64, 32)[i % 2]) for i in range(4)]
    tickets = [here.drawing.submit([one], "a") for one in wanted[:1]]
    here.gate.wait_for(1)
    tickets += [here.drawing.submit([one], "a") for one in wanted[1:]]
    here.gate.step(2)
    here.gate.wait_for(3)
    # Two of the first size and one of the second; the fourth waits for a place.
    here.gate.release()
    for ticket, one in zip(tickets, wanted, strict=True):
        assert np.array_equal(images(ticket)[0], fake_pipeline.generate([one])[0])
    assert here.gate.batches[:3] == [(1, 16), (2, 16), (1, 8)]


def test_engines_that_take_turns_are_loaded_once_a_batch(house, fake_pipeline):
    loads: list[str] = []
    here = house(limit=None, loads=loads)
    here.drawing.learn()
    until(lambda: here.drawing.snapshot().limit == 8)
    here.gate.open = False
    first = here.drawing.submit([ask(1, steps=2)], "a", previews=1)
    here.gate.wait_for(1)
    wanted = [ask(2, steps=1), ask(3, steps=4), ask(4, steps=2, size=32)]
    later = [here.drawing.submit([one], "b") for one in wanted]
    gone = here.drawing.submit([ask(5, steps=50)], "c")
    here.gate.step(2)
    assert np.array_equal(images(first)[0], fake_pipeline.generate([ask(1, steps=2)])[0])
    here.gate.wait_for(3)
    gone.stop()
    here.gate.release()
    for ticket, one in zip(later, wanted, strict=True):
        assert np.array_equal(images(ticket)[0], fake_pipeline.generate([one])[0])
    # The text of the second batch is known from the first.
    encoders, others = ["text_encoder", "text_encoder_2"], ["transformer", "vae_decoder"]
    assert loads == encoders + others + others
    with ThreadPoolExecutor(1) as pool:
        assert here.drawing.drained(SECONDS)
        here.drawing.close()
        assert here.drawing._thread is not None
        here.drawing._thread.join(SECONDS)
        assert pool.submit(here.pipeline.engines.turn.acquire, False).result()


def test_images_of_a_ticket_come_in_order(house, fake_pipeline):
    here = house(limit=2)
    wanted = [ask(i, steps=5 - i) for i in range(5)]
    found = images(here.drawing.submit(wanted, "a"))
    expected = fake_pipeline.generate(wanted)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert here.count("generations_total", outcome="done") == 5


def test_callers_take_turns(house):
    here = house(limit=1)
    here.gate.open = False
    order: list[str] = []

    def submit(caller: str, count: int) -> None:
        def heard(news: News) -> None:
            if isinstance(news, Step):
                order.append(caller)

        wanted = [ask(i, steps=1) for i in range(count)]
        tickets.append(here.drawing.submit(wanted, caller, on_news=heard))

    tickets: list[Ticket] = []
    submit("greedy", 1)
    here.gate.wait_for(1)
    submit("greedy", 4)
    submit("late", 2)
    submit("later", 1)
    here.gate.release()
    for ticket in tickets:
        images(ticket)
    assert order == ["greedy", "greedy", "late", "later", "greedy", "late", "greedy", "greedy"]


def test_a_full_queue_refuses_and_says_when_to_come_back(house):
    here = house(limit=1, waiting=1)
    here.gate.open = False
    here.drawing.submit([ask(steps=1)], "a")
    here.gate.wait_for(1)
    here.drawing.submit([ask()], "a")
    told = refused(lambda: here.drawing.submit([ask()], "b"))
    assert (told.status, told.code) == (429, "busy")
    assert int(told.headers["Retry-After"]) >= 1
    assert here.drawing.snapshot().waiting == 1


def test_the_wait_is_told_from_what_was_measured(house, monkeypatch):
    here = house(limit=2, waiting=0)
    size = (here.pipeline.defaults.height, here.pipeline.defaults.width)
    found = Gains(size, {1: 1.0, 2: 3.0, 4: 8.0})
    monkeypatch.setattr("dermaflux.gains.measuring", lambda _: iter([found]))
    here.drawing.learn()
    assert here.drawing._thread is None, "the limit is forced"
    free = Drawing(here.pipeline, Metrics(CollectorRegistry()), Settings(waiting=0))
    assert free.snapshot().limit == 1
    free.learn()
    until(lambda: free._measuring is None)
    now = free.snapshot()
    assert (now.limit, now.rates) == (1, found.rates)
    assert now.usual_seconds == pytest.approx(here.pipeline.defaults.steps)
    here.gate.open = False
    ticket = free.submit([ask(steps=20)], "a")
    here.gate.wait_for(1)
    told = refused(lambda: free.submit([ask()], "b"))
    assert int(told.headers["Retry-After"]) == 20
    ticket.stop()
    here.gate.release()
    free.close()


def test_who_comes_right_after_the_start_goes_first(house, monkeypatch):
    here = house(limit=None)
    asked: list[int] = []

    def measuring(_: Pipeline) -> Iterator[Gains]:
        for _ in range(3):
            asked.append(len(here.gate.batches))
            yield Gains((64, 64), {1: 1.0})

    monkeypatch.setattr("dermaflux.gains.measuring", measuring)
    here.gate.open = False
    ticket = here.drawing.submit([ask(steps=5)], "a")
    here.gate.wait_for(1)
    here.drawing.learn()
    here.gate.release()
    images(ticket)
    until(lambda: here.drawing._measuring is None)
    assert asked == [5, 5, 5], "after its five steps"


def test_what_batches_gain_is_measured_beside_what_is_drawn(house, fake_pipeline, monkeypatch):
    """Who comes right after the start waits for one step of measuring, not for all; and an engine
    that cannot do the largest batch leaves what is known by then."""
    here = house(limit=None)
    size = (64, 64)
    asked: list[int] = []

    def measuring(_: Pipeline) -> Iterator[Gains]:
        yield Gains(size, {1: 1.0})
        for _ in range(8):
            asked.append(len(here.gate.batches))
            yield Gains(size, {1: 1.0, 2: 1.2})
        raise EngineError("no memory for four")

    monkeypatch.setattr("dermaflux.gains.measuring", measuring)
    monkeypatch.setattr("serving.drawing.PATIENCE_SECONDS", 0)
    here.gate.open = False
    tickets = [here.drawing.submit([ask(n, steps=4)], "a") for n in range(2)]
    here.gate.wait_for(1)
    here.drawing.learn()
    here.gate.release()
    for number, ticket in enumerate(tickets):
        expected = fake_pipeline.generate([ask(number, steps=4)])[0]
        assert np.array_equal(images(ticket)[0], expected)
    until(lambda: here.drawing._measuring is None)
    assert asked[0] < asked[2] < asked[3], "not all at once"
    assert here.drawing.snapshot().limit == 2
    assert here.drawing.snapshot().rates == Gains(size, {1: 1.0, 2: 1.2}).rates


def test_the_last_places_are_for_those_who_have_none(house):
    here = house(limit=1, waiting=7)
    here.gate.open = False
    for _ in range(6):
        here.drawing.submit([ask()], "greedy")
    assert refused(lambda: here.drawing.submit([ask()], "greedy")).status == 429
    assert refused(lambda: here.drawing.submit([ask()] * 3, "other")).status == 429
    here.drawing.submit([ask()], "other")
    here.drawing.submit([ask()], "third")
    assert refused(lambda: here.drawing.submit([ask()], "fourth")).status == 429


def test_an_empty_house_takes_more_images_than_may_wait(house):
    here = house(limit=1, waiting=0)
    assert len(images(here.drawing.submit([ask(i) for i in range(5)], "a"))) == 5


def test_a_stopped_ticket_leaves_the_queue_at_once_and_the_batch_before_its_next_step(house):
    here = house(limit=2)
    here.gate.open = False
    first = here.drawing.submit([ask(1, steps=50)], "a")
    here.gate.wait_for(1)
    second = here.drawing.submit([ask(2, steps=3)], "b")
    third = here.drawing.submit([ask(3), ask(4)], "c")
    assert here.drawing.snapshot().waiting == 3
    third.stop()
    third.stop()
    assert third.over
    assert here.drawing.snapshot().waiting == 1
    first.stop()
    assert here.drawing.snapshot().running == 0
    here.gate.release()
    images(second)
    assert len(here.gate.batches) <= 4
    for ticket in (first, third):
        with pytest.raises(Cancelled):
            images(ticket)
    second.stop()
    assert len(images(second)) == 1
    assert here.count("generations_total", outcome="cancelled") == 3
    assert here.drawing.drained(SECONDS)
    assert here.count("images_waiting") == here.count("images_running") == 0


def test_a_stop_is_heard_between_the_steps_of_two_sizes(house):
    here = house(limit=2)
    here.gate.open = False
    first = here.drawing.submit([ask(1, steps=50)], "a")
    here.gate.wait_for(1)
    second = here.drawing.submit([ask(2, steps=50, size=32)], "b")
    here.gate.step(1)
    here.gate.wait_for(2)
    second.stop()
    here.gate.step(1)
    here.gate.wait_for(3)
    first.stop()
    assert here.gate.batches == [(1, 16)] * 3


def test_a_caller_who_is_cancelled_stops_its_ticket(house):
    here = house()
    here.gate.open = False
    ticket = here.drawing.submit([ask(steps=50)], "a")

    async def leave() -> None:
        waits = asyncio.ensure_future(ticket.images())
        await asyncio.sleep(0)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits

    asyncio.run(leave())
    assert ticket.over
    assert here.drawing.snapshot().running == 0


def test_a_deadline_does_not_wait_for_the_thread(house):
    here = house(limit=1, deadline_seconds=0.2)
    here.gate.open = False
    tickets = [here.drawing.submit([ask(steps=50)], "a") for _ in range(2)]
    here.gate.wait_for(1)
    begin = time.monotonic()
    for ticket in tickets:
        assert refused(lambda ticket=ticket: images(ticket)).status == 504
    assert time.monotonic() - begin < 5
    assert here.drawing.snapshot().waiting == 0
    here.gate.release()
    assert here.drawing.drained(SECONDS)
    assert len(here.gate.batches) <= 2
    assert here.count("generations_total", outcome="deadline") == 2


def test_late_tickets_of_nobody_are_let_go(house):
    here = house(limit=1)
    here.gate.open = False
    running = here.drawing.submit([ask(steps=50)], "a")
    waiting = here.drawing.submit([ask()], "a")
    here.gate.wait_for(1)
    running.deadline_seconds = waiting.deadline_seconds = 0.0
    here.gate.release()
    assert here.drawing.drained(SECONDS)
    for ticket in (running, waiting):
        assert refused(lambda ticket=ticket: images(ticket)).status == 504


@pytest.mark.parametrize("error", [EngineError("broken"), RuntimeError("odd"), MemoryError()])
def test_an_engine_that_fails_ends_its_batch_and_no_other(house, error, fake_pipeline):
    here = house(limit=3)
    here.gate.open = False
    here.gate.fails = lambda inputs: error if inputs["hidden_states"].shape[1] == 8 else None
    good = here.drawing.submit([ask(1)], "a")
    bad = here.drawing.submit([ask(2, size=32), ask(3, size=32)], "b")
    mixed = here.drawing.submit([ask(4), ask(5, size=32)], "c")
    here.gate.release()
    assert np.array_equal(images(good)[0], fake_pipeline.generate([ask(1)])[0])
    for ticket in (bad, mixed):
        with pytest.raises(type(error)):
            images(ticket)
    here.gate.fails = lambda _: None
    assert np.array_equal(
        images(here.drawing.submit([ask(6, size=32)], "b"))[0],
        fake_pipeline.generate([ask(6, size=32)])[0],
    )
    assert here.count("generations_total", outcome="failed") == 4


def test_one_that_cannot_be_decoded_does_not_take_the_others_along(house, fake_pipeline):
    decoder = fake_pipeline.engines["vae_decoder"]
    (poison,) = fake_pipeline.latents([ask(2)])

    def picky(inputs: Arrays) -> dict[str, Array]:
        sample = decoder.run(inputs)["sample"]
        scaled = poison / fake_pipeline.model.scaling_factor + fake_pipeline.model.shift_factor
        for row, latents in enumerate(inputs["latent_sample"]):
            if np.allclose(latents, scaled):
                sample[row] = np.nan
        return {"sample": sample}

    here = house(engines={"vae_decoder": Fake(picky)})
    here.gate.open = False
    tickets = [here.drawing.submit([ask(seed)], "a") for seed in (1, 2, 3)]
    here.gate.release()
    with pytest.raises(EngineError, match="finite"):
        images(tickets[1])
    for seed in (1, 3):
        assert np.array_equal(images(tickets[seed - 1])[0], fake_pipeline.generate([ask(seed)])[0])


def test_encoders_that_fail_end_those_who_came(house):
    fails = [True]
    encoder = fake.engines(house().pipeline.model)["text_encoder"]

    def moody(inputs: Arrays) -> dict[str, Array]:
        if fails:
            raise EngineError("broken")
        return encoder.run(inputs)

    here = house(engines={"text_encoder": Fake(moody)})
    with pytest.raises(EngineError):
        images(here.drawing.submit([ask()], "a"))
    fails.clear()
    assert len(images(here.drawing.submit([ask()], "a"))) == 1


def test_news_of_place_and_steps_and_previews(house):
    here = house(limit=1)
    here.gate.open = False
    news: list[News] = []
    first = here.drawing.submit([ask(1, steps=2)], "a")
    here.gate.wait_for(1)
    second = here.drawing.submit([ask(2, steps=2)], "a")
    wanted = [ask(3, steps=5, size=128), ask(4, steps=1, size=128)]
    third = here.drawing.submit(wanted, "a", previews=2, on_news=news.append)
    assert third.ahead == 2
    here.gate.step(2)
    images(first)
    here.gate.wait_for(3)
    second.stop()
    here.gate.release()
    images(third)
    assert news[0] == Position(1)
    steps = [one for one in news if isinstance(one, Step)]
    done = [one for one in news if isinstance(one, Done)]
    assert [one.item for one in sorted(done, key=lambda one: one.item)] == [0, 1]
    assert {one.pixels.shape for one in done} == {(128, 64, 3)}
    assert [one for one in news[1:] if not isinstance(one, Done)] == steps
    assert [(s.item, s.step, s.steps) for s in steps] == [(0, n, 5) for n in range(1, 6)] + [
        (1, 1, 1)
    ]
    shown = {s.step: s.preview.shape for s in steps if s.preview is not None}
    assert shown == {2: (64, 32, 3), 3: (64, 32, 3)}


def test_previews_that_fail_cost_nobody_an_image(house, fake_pipeline, monkeypatch):
    def broken(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("dermaflux.underway.Underway.previews", broken)
    ticket = house().drawing.submit([ask(1)], "a", previews=3, on_news=lambda _: None)
    assert np.array_equal(images(ticket)[0], fake_pipeline.generate([ask(1)])[0])


def test_a_listener_that_fails_ends_its_ticket_alone(house):
    here = house()
    here.gate.open = False

    def broken(_: News) -> None:
        raise RuntimeError("Event loop is closed")

    bad = here.drawing.submit([ask(1)], "a", on_news=broken)
    good = here.drawing.submit([ask(2)], "a")
    here.gate.release()
    assert len(images(good)) == 1
    with pytest.raises(RuntimeError, match="closed"):
        images(bad)


def test_a_drained_house_takes_nothing_and_finishes_what_is_there(house):
    here = house(limit=1)
    here.gate.open = False
    tickets = [here.drawing.submit([ask(i)], "a") for i in range(3)]
    here.drawing.drain()
    assert here.drawing.snapshot().draining
    told = refused(lambda: here.drawing.submit([ask()], "a"))
    assert (told.status, told.code) == (503, "not_ready")
    assert not here.drawing.drained(0)
    here.gate.release()
    for ticket in tickets:
        assert len(images(ticket)) == 1
    assert here.drawing.drained(SECONDS)


def test_closing_ends_everything(house):
    here = house(limit=1)
    here.gate.open = False
    tickets = [here.drawing.submit([ask(i, steps=50)], "a") for i in range(3)]
    here.gate.wait_for(1)
    here.drawing.close()
    for ticket in tickets:
        assert refused(lambda ticket=ticket: images(ticket)).status == 503
    here.gate.release()
    assert refused(lambda: here.drawing.submit([ask()], "a")).status == 503
    assert here.drawing._thread is not None
    here.drawing._thread.join(SECONDS)
    assert not here.drawing._thread.is_alive()
    assert len(here.gate.batches) == 1


def test_a_snapshot_shows_a_caller_its_own(house):
    here = house(limit=2)
    here.gate.open = False
    here.drawing.submit([ask(1), ask(2), ask(3)], "a")
    here.drawing.submit([ask(4)], "b")
    here.gate.wait_for(1)
    now = here.drawing.snapshot("a")
    assert (now.running, now.waiting, now.limit) == (2, 2, 2)
    assert sorted([*now.mine, *here.drawing.snapshot("b").mine]) == [0, 0, 1, 2]
    assert here.drawing.snapshot("nobody").mine == ()
    assert now.backlog_seconds > 0
    assert here.count("images_running") == here.count("images_waiting") == 2


def test_hundreds_of_random_callers_are_neither_lost_nor_mixed_up(house, fake_pipeline):
    """Arrivals, sizes, stops, deadlines and failures at random; whoever gets images gets theirs."""
    chance = random.Random(0)
    here = house(limit=3, waiting=20)
    poison = 13

    # Failing is by what an item is, so who fails with it is whoever shares its batch.
    here.gate.fails = lambda inputs: (
        EngineError("broken") if (inputs.get("guidance") == poison).any() else None
    )
    expected: dict[Request, np.ndarray] = {}

    def wanted() -> Request:
        one = ask(
            chance.randrange(40), 1 + chance.randrange(6), chance.choice((32, 64)),
            chance.choice(("benign lesion", "malignant lesion")),
        )  # fmt: skip
        if one not in expected:
            (expected[one],) = fake_pipeline.generate([one])
        return replace(one, guidance=float(poison)) if chance.random() < 0.02 else one

    outcomes: dict[str, int] = {}

    async def caller(number: int) -> str:
        asked = [wanted() for _ in range(chance.choice((1, 1, 1, 2, 4)))]
        heard: list[News] = []
        for _ in range(chance.randrange(20)):
            await asyncio.sleep(0)
        try:
            ticket = here.drawing.submit(
                asked, f"caller {number % 5}", previews=chance.randrange(2), on_news=heard.append
            )
        except Refusal as refusal:
            return {429: "busy"}[refusal.status]
        if chance.random() < 0.1:
            ticket.deadline_seconds = 0.0
        leaves = chance.random() < 0.2
        waits = asyncio.ensure_future(ticket.images())
        if leaves:
            for _ in range(chance.randrange(20)):
                await asyncio.sleep(0)
            ticket.stop()
        try:
            found = await waits
        except Refusal as refusal:
            return {504: "late"}[refusal.status]
        except Cancelled:
            assert leaves
            return "left"
        except EngineError:
            return "failed"
        for one, pixels in zip(asked, found, strict=True):
            assert np.array_equal(pixels, expected[one])
        steps = [news for news in heard if isinstance(news, Step)]
        for item, one in enumerate(asked):
            assert [s.step for s in steps if s.item == item] == list(range(1, one.steps + 1))
        return "done"

    async def crowd() -> None:
        for start in range(0, 300, 30):
            together = [caller(number) for number in range(start, start + 30)]
            for outcome in await asyncio.gather(*together):
                outcomes[outcome] = outcomes.get(outcome, 0) + 1

    asyncio.run(crowd())
    assert sum(outcomes.values()) == 300
    assert set(outcomes) == {"busy", "late", "left", "failed", "done"}
    assert outcomes["done"] > 50
    assert here.drawing.drained(SECONDS)
    now = here.drawing.snapshot()
    assert (now.waiting, now.running, now.backlog_seconds) == (0, 0, 0)
    assert max(batch for batch, _ in here.gate.batches) == 3
    here.drawing.close()
    assert here.drawing._thread is not None
    here.drawing._thread.join(SECONDS)
    left = here.drawing._easel._underway
    assert (left.keys, left.sizes, left.finished()) == ((), (), {})
