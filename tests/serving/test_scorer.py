"""The classifier's process: a result each whatever a batch holds, and what is told when it dies."""

from __future__ import annotations

import asyncio
import io
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dermaflux.classifier import Classifier
from dermaflux.engines import Array, Arrays, fake
from dermaflux.errors import BundleError, EngineError
from serving.places import Places
from serving.remote import ATTEMPTS, Remote
from serving.replies import Refusal
from serving.scores import Local, Trouble, UnavailableError, beside
from serving.scoring import Answer, Photograph, Result, Scoring
from tests.lenient import lenient
from tests.serving.live import SPEC, picture

POISON = 13
"""The red of a picture on which the engine fails, and every batch that it is in."""


def redness(inputs: Arrays) -> dict[str, Array]:
    """Its logits say how red a picture is, so an answer tells whose it is."""
    red = np.rint((inputs["pixel_values"][:, 0].mean(axis=(1, 2)) + 1) * 127.5)
    if (red == POISON).any():
        raise RuntimeError("secret of the house")
    logits = np.stack([np.zeros_like(red), (red - 128) / 16], axis=1).astype(np.float32)
    return {"logits": logits, "features": logits}


def scoring(**more: object) -> Scoring:
    return Scoring(Classifier(SPEC, fake.Fake(redness), **more))  # type: ignore[arg-type]


def red_of(result: Result) -> int:
    assert result.answer is not None, result.fault
    assert result.answer.probability is not None
    return round(128 + 16 * float(np.log(1 / (1 / result.answer.probability - 1))))


def photograph(red: int, **more: object) -> Photograph:
    return Photograph(data=picture(red), **more)  # type: ignore[arg-type]


def test_whatever_is_wrong_with_one_its_neighbours_have_their_own_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Hundreds of photographs in batches of every size, a third of them bad in some way."""
    source = random.Random(8)
    bad = {
        "invalid_image": lambda: Photograph(data=source.randbytes(300)),
        "unsuitable_image": lambda: Photograph(data=picture(9, size=(40, 80))),
        "deadline": lambda: photograph(9, expires=time.monotonic() - 1),
        "failed": lambda: photograph(POISON),
        "no_saliency": lambda: photograph(9, saliency=True),
    }
    judge = scoring()
    for size in range(1, 25):
        kinds = [source.choice([*bad, *["good"] * 10]) for _ in range(size)]
        reds = [source.choice([red for red in range(60, 196) if red != POISON]) for _ in kinds]
        batch = [
            photograph(red) if kind == "good" else bad[kind]()
            for kind, red in zip(kinds, reds, strict=True)
        ]
        for kind, red, result in zip(kinds, reds, judge(batch), strict=True):
            if kind == "good":
                assert red_of(result) == red
                assert result.fault is None
            else:
                assert result.fault is not None
                assert (result.fault.kind, result.answer) == (kind, None)
                assert "secret" not in result.fault.message
    judge.close()
    assert "trying one by one" in caplog.text


def test_a_failure_is_logged_under_the_request_that_it_is_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR, "serving"):
        scoring()([photograph(100, request_id="right"), photograph(POISON, request_id="wrong")])
    assert [getattr(record, "request", None) for record in caplog.records] == ["wrong"]


def test_a_picture_that_is_not_accepted_has_no_label_whoever_is_beside_it() -> None:
    judge = scoring(intake=lenient(2, light=150.0))
    dark, light = judge([photograph(90), photograph(255)])
    assert dark.answer is not None
    assert light.answer is not None
    assert (dark.answer.label, dark.answer.probability, dark.answer.accepted) == (None, None, False)
    assert [code for code, _ in dark.answer.reasons] == ["too_dark"]
    assert (light.answer.label, light.answer.accepted) == ("malignant", True)


def test_a_saliency_is_a_picture_over_the_picture_and_only_where_asked_for() -> None:
    def looks(inputs: Arrays) -> dict[str, Array]:
        maps = np.ones((len(inputs["pixel_values"]), 4, 4), np.float32)
        return {**redness(inputs), "saliency": maps}

    judge = Scoring(Classifier(SPEC, fake.Fake(looks), intake=lenient(2, light=150.0)))
    asked, not_asked, refused = judge(
        [photograph(255, saliency=True), photograph(255), photograph(90, saliency=True)]
    )
    assert asked.answer is not None
    assert asked.answer.saliency is not None
    with Image.open(io.BytesIO(asked.answer.saliency), formats=["PNG"]) as drawn:
        assert (drawn.mode, drawn.size) == ("LA", (96, 80))
    for other in (not_asked, refused):
        assert other.answer is not None
        assert other.answer.saliency is None


def test_a_classifier_that_is_being_opened_or_cannot_be_says_so() -> None:
    async def asked(opening: Future[Scoring]) -> Trouble:
        with pytest.raises(UnavailableError) as found:
            await Local(opening).score(photograph(100))
        return found.value.trouble

    def failing(error: Exception) -> Future[Scoring]:
        def work() -> Scoring:
            raise error

        opening = beside(work)
        opening.exception(timeout=30)
        return opening

    assert asyncio.run(asked(Future())) == Trouble("The classifier is being loaded.")
    told = asyncio.run(asked(failing(BundleError("no file"))))
    assert told == Trouble("The classifier cannot be used: no file", passes=False)
    told = asyncio.run(asked(failing(RuntimeError("secret of the house"))))
    assert not told.passes
    assert "secret" not in told.words


class Lost(Exception):
    """A connection broke."""


def answered(one: Photograph) -> Result:
    """Its label is what the file holds, so an answer tells whose it is."""
    answer = Answer(
        label=one.data.decode(), probability=0.1, threshold=0.4, decision="benign", accepted=True,
        reasons=[],
    )  # fmt: skip
    return Result(answer=answer)


@dataclass
class Process:
    """The other process as its client shows it: `lines` are said one after the other, each when it
    is put there; None ends the process and everything that hangs on it."""

    lines: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)
    losing: int = 0
    hangs: bool = False
    calls: int = 0
    lives: int = 0
    sizes: list[int] = field(default_factory=list)
    turn: asyncio.Semaphore | None = None
    """Each call that is answered takes one; without, all are answered at once."""

    async def score(self, photographs: Sequence[Photograph]) -> list[Result]:
        self.calls += 1
        self.sizes.append(len(photographs))
        if self.turn is not None:
            await self.turn.acquire()
            return [answered(one) for one in photographs]
        if self.losing:
            self.losing -= 1
            raise Lost
        if self.hangs:
            await asyncio.Event().wait()
        answer = Answer(
            label="benign", probability=0.1, threshold=0.4, decision="benign", accepted=True,
            reasons=[],
        )  # fmt: skip
        return [Result(answer=answer) for _ in photographs]

    async def life(self) -> AsyncIterator[str]:
        self.lives += 1
        while (line := await self.lines.get()) is not None:
            yield line
        raise Lost


async def turns() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_the_other_process_is_followed_through_its_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.remote.AGAIN_SECONDS", 0.0)

    async def lives() -> None:
        process = Process()
        remote = Remote(process, (Lost,))
        following = asyncio.create_task(remote.follow())
        for line, trouble in (
            ("loading\n", Trouble("The classifier is being loaded.")),
            # What is said in two breaths may come as one.
            ("loading\nready\n", None),
            ("The driver", None),  # half a line says nothing yet
            (" is gone.\n", Trouble("The driver is gone.", passes=False)),
            (None, Trouble("The classifier's process ended and is being started again.")),
            ("loading\nready\n", None),
        ):
            process.lines.put_nowait(line)
            await turns()
            assert remote.trouble() == trouble
        assert process.lives == 2
        assert (await remote.score(photograph(9))).answer is not None
        following.cancel()

    asyncio.run(lives())


def test_what_the_engine_says_comes_with_its_being_ready() -> None:
    async def told() -> None:
        process = Process()
        remote = Remote(process, (Lost,))
        following = asyncio.create_task(remote.follow())
        await turns()
        assert remote.note() == ""
        for line, note in (("ready 4 in bf16, 1e-03 off\n", "in bf16, 1e-03 off"),
                           ("ready 4\n", "")):  # fmt: skip
            process.lines.put_nowait(line)
            await turns()
            assert (remote.note(), remote.trouble()) == (note, None)
        following.cancel()

    asyncio.run(told())


@dataclass(frozen=True)
class Noted(fake.Fake):
    note: str = "in bf16"


def test_a_classifier_of_this_process_says_it_once_it_is_open() -> None:
    opening: Future[Scoring] = Future()
    local = Local(opening)
    assert local.note() == ""
    opening.set_result(Scoring(Classifier(SPEC, Noted(redness))))
    assert local.note() == "in bf16"
    assert scoring().note == ""


def test_who_comes_meanwhile_goes_together_and_nobody_waits_for_a_batch_to_fill() -> None:
    """A full batch goes beside the one that is scored, and what is less waits for its end."""

    async def asked() -> None:
        process = Process(turn=asyncio.Semaphore(0))
        assert process.turn is not None
        remote = Remote(process, (Lost,))
        following = asyncio.create_task(remote.follow())
        process.lines.put_nowait("loading\nready 4\n")
        await turns()

        def come(*names: int) -> list[asyncio.Task[Result]]:
            files = [Photograph(data=str(name).encode()) for name in names]
            return [asyncio.create_task(remote.score(file)) for file in files]

        coming = come(0)
        await turns()
        assert process.sizes == [1]
        coming += come(1, 2, 3)
        await turns()
        assert process.sizes == [1]
        coming += come(4, 5, 6, 7, 8, 9)
        await turns()
        assert process.sizes == [1, 4]
        process.turn.release()
        await turns()
        assert process.sizes == [1, 4, 4]
        process.turn.release()
        await turns()
        assert process.sizes == [1, 4, 4]
        process.turn.release()
        await turns()
        assert process.sizes == [1, 4, 4, 1]
        process.turn.release()
        found = await asyncio.gather(*coming)
        assert [one.answer.label for one in found if one.answer] == [str(n) for n in range(10)]
        following.cancel()

    asyncio.run(asked())


def test_a_call_that_all_have_left_keeps_its_place_until_it_is_back() -> None:
    """The other process scores it all the same."""

    async def leave() -> None:
        process = Process(turn=asyncio.Semaphore(0))
        assert process.turn is not None
        remote = Remote(process, (Lost,))
        following = asyncio.create_task(remote.follow())
        process.lines.put_nowait("ready 4\n")
        await turns()
        names = [str(number).encode() for number in range(7)]
        coming = [asyncio.create_task(remote.score(Photograph(data=name))) for name in names]
        await turns()
        assert process.sizes == [1, 4]
        for one in (coming[0], coming[2], coming[5]):  # all of the first, some of others
            one.cancel()
        await turns()
        assert process.sizes == [1, 4]
        for _ in range(50):  # who ask and leave at once
            hasty = asyncio.create_task(remote.score(Photograph(data=b"hasty")))
            await turns()
            hasty.cancel()
            await turns()
        assert process.sizes == [1, 4]
        for _ in range(3):
            process.turn.release()
            await turns()
        found = await asyncio.gather(*coming, return_exceptions=True)
        labels = [one.answer.label for one in found if isinstance(one, Result) and one.answer]
        assert labels == ["1", "3", "4", "6"]
        assert process.sizes == [1, 4, 1]
        following.cancel()

    asyncio.run(leave())


def test_files_of_the_next_batch_are_read_while_one_is_judged() -> None:
    """And never two are judged at a time."""
    judging, go = threading.Semaphore(0), threading.Semaphore(0)
    at_once: list[int] = []
    inside = 0

    def slow(inputs: Arrays) -> dict[str, Array]:
        nonlocal inside
        inside += 1
        at_once.append(inside)
        judging.release()
        assert go.acquire(timeout=30)
        inside -= 1
        return redness(inputs)

    read: list[int] = []
    judge = Scoring(Classifier(SPEC, fake.Fake(slow)))
    prepare, ready = judge.classifier.prepare, threading.Semaphore(0)

    def noted(image: Image.Image, **asked: bool) -> Any:
        read.append(1)
        ready.release()
        return prepare(image, **asked)

    judge.classifier.prepare = noted  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(judge, [photograph(100)])
        assert judging.acquire(timeout=30)
        second = pool.submit(judge, [photograph(90)])
        for _ in range(2):
            assert ready.acquire(timeout=30)
        assert len(read) == 2
        go.release(2)
        assert [red_of(one) for work in (first, second) for one in work.result(30)] == [100, 90]
    assert at_once == [1, 1]


def test_whoever_waits_for_a_process_that_dies_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.remote.AGAIN_SECONDS", 0.0)

    async def dies() -> None:
        process = Process(hangs=True)
        remote = Remote(process, (Lost,))
        following = asyncio.create_task(remote.follow())
        process.lines.put_nowait("ready\n")
        await turns()
        waiting = [asyncio.create_task(remote.score(photograph(9))) for _ in range(100)]
        await turns()
        assert 0 < process.calls < 100  # the rest waits here, not in the client
        process.lines.put_nowait(None)
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(one) for one in found} == {UnavailableError}
        process.hangs = False
        process.lines.put_nowait("ready\n")
        await turns()
        assert (await remote.score(photograph(9))).answer is not None
        following.cancel()

    asyncio.run(dies())


@pytest.mark.parametrize(("losing", "calls"), [(1, 2), (ATTEMPTS - 1, ATTEMPTS), (99, ATTEMPTS)])
def test_a_connection_that_was_just_closed_is_no_failure(losing: int, calls: int) -> None:
    async def asked() -> None:
        process = Process(losing=losing)
        remote = Remote(process, (Lost,))
        following = asyncio.create_task(remote.follow())
        process.lines.put_nowait("ready\n")
        await turns()
        if losing < ATTEMPTS:
            assert (await remote.score(photograph(9))).answer is not None
        else:
            with pytest.raises(UnavailableError, match="cannot be reached"):
                await remote.score(photograph(9))
        assert process.calls == calls
        following.cancel()

    asyncio.run(asked())


def test_a_call_that_never_comes_back_is_given_up_when_all_have_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.remote.LEFT_SECONDS", 0.0)

    async def leaves() -> None:
        process = Process(hangs=True)
        remote = Remote(process, (Lost,))
        following = asyncio.create_task(remote.follow())
        process.lines.put_nowait("ready\n")
        await turns()
        for _ in range(200):  # more than there are calls at a time
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await remote.score(photograph(9))
        process.hangs = False
        assert (await remote.score(photograph(9))).answer is not None
        following.cancel()

    asyncio.run(leaves())


def test_places_are_bounded_and_one_large_form_is_always_let_in() -> None:
    places = Places(10)
    with places.taken(10):
        with pytest.raises(Refusal) as found, places.taken(1):
            pass
        assert (found.value.status, found.value.headers) == (429, {"Retry-After": "1"})
    with places.taken(32), pytest.raises(Refusal), places.taken(1):
        pass
    for _ in range(100):
        places.took(7.2)
    late = pytest.raises(Refusal, match="about 8 seconds")
    with places.taken(4), places.taken(6), late, places.taken(1):
        pass


def test_an_engine_that_gives_what_is_no_number_fails_alone() -> None:
    def broken(inputs: Arrays) -> dict[str, Array]:
        return {"logits": np.full((len(inputs["pixel_values"]), 2), np.nan, np.float32)}

    with pytest.raises(EngineError, match="not finite"):
        Classifier(SPEC, fake.Fake(broken)).classify([Image.new("RGB", (80, 80))])
    results = Scoring(Classifier(SPEC, fake.Fake(broken)))([photograph(9), photograph(9)])
    assert [one.fault.kind for one in results if one.fault] == ["failed", "failed"]
