"""Streams: what waits for a slow reader is bounded, and a reader that takes nothing is given up."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import threading
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

from serving.pictures import PREVIEW_SIDE, preview
from serving.stream import EventStream, Inbox
from serving.ticket import Position, Step
from tests.serving.live import Live, Permits, running
from tests.serving.test_generate import PROMPT, error, events

T = TypeVar("T")


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(10):
            return await work

    return asyncio.run(bounded())


def test_inbox_keeps_the_newest_of_a_kind() -> None:
    async def work() -> list[Any]:
        inbox = Inbox()
        for step in range(1, 10_001):
            inbox.put(Position(ahead=10_001 - step))
            inbox.put(Step(0, step, 10_000))
            inbox.put(Step(1, step, 10_000))
            assert len(inbox) <= 3
        inbox.close()
        return [await inbox.take() for _ in range(5)]

    assert run(work()) == [
        Position(1),
        Step(0, 10_000, 10_000),
        Step(1, 10_000, 10_000),
        None,
        None,
    ]


def test_inbox_keeps_a_preview_that_was_not_taken() -> None:
    async def work() -> list[Any]:
        inbox = Inbox()
        shown, later = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)
        inbox.put(Step(0, 1, 4, shown))
        inbox.put(Step(0, 2, 4))
        first = await inbox.take()
        inbox.put(Step(0, 3, 4, shown))
        inbox.put(Step(0, 4, 4, later))
        inbox.close()
        return [first, await inbox.take()]

    first, last = run(work())
    assert (first.step, first.preview.max()) == (2, 0)
    assert (last.step, last.preview.max()) == (4, 1)


def test_inbox_is_told_by_another_thread() -> None:
    async def work() -> list[Any]:
        inbox = Inbox()
        thread = threading.Thread(target=inbox.hand_over, args=(Step(0, 1, 1),))
        thread.start()
        taken = await inbox.take()
        thread.join()
        return [taken, inbox]

    taken, inbox = run(work())
    assert taken == Step(0, 1, 1)
    # Its loop has ended: telling it now must not end the thread that draws.
    inbox.hand_over(Step(0, 1, 1))


@pytest.mark.parametrize("stalls", [False, True])
def test_reader_that_takes_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch, stalls: bool
) -> None:
    monkeypatch.setattr("serving.stream.SLOW_READER_SECONDS", 0.05)
    ended: list[bool] = []
    given: list[str] = []

    async def two() -> AsyncGenerator[str, None]:
        try:
            for text in ("one", "two"):
                given.append(text)
                yield text
        finally:
            given.append("closed")

    async def work() -> None:
        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            if stalls and message.get("body"):
                await asyncio.Event().wait()

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await EventStream(two(), lambda: ended.append(True))(scope, receive, send)

    run(work())
    assert ended == [True]
    assert ("two" in given) != stalls


def test_preview_is_small_whatever_it_is_of() -> None:
    for height, width in ((1024, 512), (16, 32), (128, 128)):
        data = preview(np.full((height, width, 3), 90, np.uint8))
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.format == "JPEG"
            assert max(picture.size) <= PREVIEW_SIDE
            assert picture.width * height == picture.height * width
        assert len(data) < 4000


def test_several_images_come_with_their_numbers(live: Live) -> None:
    ask = {"prompt": PROMPT, "seed": 8, "n": 3, "steps": 4, "format": "jpeg", "quality": 80}
    with live.client.stream("POST", "/v1/generate/stream", json=ask) as reply:
        told = list(events(reply))
    assert told[0] == ("queued", {"ahead": 0, "seed": 8, "images": 3})
    for image in range(3):
        mine = [(name, data) for name, data in told if data.get("image") == image]
        steps = [data["step"] for name, data in mine if name == "progress"]
        assert steps == sorted(set(steps))
        assert steps[-1] == 4
        assert [name for name, _ in mine[-2:]] == ["progress", "image"]
    images = [data for name, data in told if name == "image"]
    assert [(data["image"], data["seed"]) for data in images] == [(0, 8), (1, 9), (2, 10)]
    for data in images:
        single = {**ask, "n": 1, "seed": data["seed"]}
        assert data["format"] == "jpeg"
        assert (
            base64.b64decode(data["file"]) == live.client.post("/v1/generate", json=single).content
        )
    assert told[-1][0] == "image"


def test_an_image_goes_out_while_the_next_one_is_drawn() -> None:
    ask = {"prompt": PROMPT, "n": 2, "steps": 2}
    with running(batch=1) as live:
        permits = Permits(2)
        live.brake.open = permits  # type: ignore[assignment]
        with live.client.stream("POST", "/v1/generate/stream", json=ask) as reply:
            told = events(reply)
            before = list(itertools.takewhile(lambda one: one[0] != "image", told))
            assert {data["image"] for name, data in before if name == "progress"} == {0}
            permits.set()
            after = list(told)
    assert [data["image"] for name, data in after if name == "image"] == [1]


def test_images_that_are_done_go_out_though_the_next_one_fails() -> None:
    ask = {"prompt": PROMPT, "n": 2, "steps": 2}
    with running(batch=1, deadline_seconds=2.0) as live:
        live.brake.open = Permits(2)  # type: ignore[assignment]
        with live.client.stream("POST", "/v1/generate/stream", json=ask) as reply:
            told = [(name, data) for name, data in events(reply) if name in ("image", "error")]
        live.brake.open.set()
    assert [name for name, _ in told] == ["image", "error"]
    assert told[1][1]["error"]["code"] == "deadline"


def test_previews_are_of_the_stream_alone(live: Live) -> None:
    reply = live.client.post("/v1/generate", json={"prompt": PROMPT, "previews": 2})
    assert (reply.status_code, error(reply)["field"]) == (422, "previews")
    assert "previews: is not a field here" in json.loads(reply.content)["error"]["message"]


def test_previews_are_small_pictures_on_the_way(live: Live) -> None:
    ask = {"prompt": PROMPT, "steps": 8, "previews": 3, "n": 2, "width": 256, "height": 128}
    with live.client.stream("POST", "/v1/generate/stream", json=ask) as reply:
        told = list(events(reply))
    seen = [data for name, data in told if name == "progress" and data["preview"]]
    assert {data["image"] for data in seen} == {0, 1}
    for image in (0, 1):
        # Fewer where the reader fell behind, but the last one always.
        assert 1 <= len([data for data in seen if data["image"] == image]) <= 3
    for data in seen:
        with Image.open(io.BytesIO(base64.b64decode(data["preview"]))) as picture:
            assert picture.format == "JPEG"
            assert max(picture.size) <= PREVIEW_SIDE
            assert picture.width == 2 * picture.height


def test_place_in_the_queue_is_told_as_it_moves() -> None:
    ask = {"prompt": PROMPT, "steps": 2}
    with (
        running(batch=1) as live,
        live.brake.closed(),
        live.client.stream("POST", "/v1/generate/stream", json=ask) as first,
    ):
        live.brake.wait_for(1)
        with (
            live.client.stream("POST", "/v1/generate/stream", json=ask) as second,
            live.client.stream("POST", "/v1/generate/stream", json=ask) as third,
        ):
            told = events(third)
            assert next(told)[1]["ahead"] == 2
            live.brake.open.set()
            places = [data["ahead"] for name, data in told if name == "position"]
            assert places == sorted(places, reverse=True)
            assert places[-1] == 1
            assert [name for name, _ in events(second)][-1] == "image"
        assert [name for name, _ in events(first)][-1] == "image"
