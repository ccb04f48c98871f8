"""What a rehearsal says of the night: by steps, sizes and tries, of what is left, in whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dermaflux.bundle import Bundle
from dermaflux.errors import RequestError
from serving.batch import rehearsal, requests
from serving.batch.__main__ import main
from serving.batch.gate import Verdict
from serving.batch.maker import Made, Maker, Tools, Try
from serving.batch.settings import Settings
from serving.batch.sharding import Shard
from tests.batch.test_batch import line, write

WHOLE = Shard(1, 1)
MIXED = [line(n, steps=(1, 20)[n % 2], width=(32, 64, 128)[n % 3]) for n in range(60)]
WORK = sum(one["steps"] * one["width"] * 64 for one in MIXED)


@pytest.fixture
def rehearsed(tiny_bundle: Bundle, tmp_path: Path):
    """A rehearsal of requests; and what was drawn for it, in its `batches`."""

    def call(rows: Sequence[Any], shard: Shard = WHOLE, **settings: Any) -> dict[str, Any]:
        file = write(tmp_path / "r.jsonl", list(rows))
        items, _ = requests.read(file, tiny_bundle, 0)
        tools = Tools(tiny_bundle.path, threads=1)
        return rehearsal.rehearsal(
            tools, items, shard, Settings(out=tmp_path / "out", **{"batch": 4, **settings})
        )

    return call


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[Try]]:
    """Batches that take a microsecond a step and pixel, of files of a byte a pixel, half good."""
    drawn: list[list[Try]] = []

    def timed(maker: Maker, sample: Sequence[Try]) -> tuple[float, list[Made]]:
        drawn.append(list(sample))
        seconds = 1e-6 * sum(
            one.request.steps * one.request.height * one.request.width for one in sample
        )
        made = [
            Made(one, "", b"x" * one.request.height * one.request.width,
                 verdict=Verdict(("bad",) if number % 2 else (), {}))
            for number, one in enumerate(sample)
        ]  # fmt: skip
        return seconds, made

    monkeypatch.setattr(rehearsal, "_timed", timed)
    return drawn


def test_steps_and_sizes_count(rehearsed, batches) -> None:
    told = rehearsed(MIXED)
    assert told["seconds"] == pytest.approx(1e-6 * WORK, abs=0.006)
    assert told["bytes"] == sum(one["width"] * 64 for one in MIXED)
    assert (told["pictures"], told["left"], told["tries"]) == (60, 60, 60)
    # Of every size a batch, with the few steps and the many.
    assert sorted(batch[0].request.width for batch in batches) == [32, 64, 128]
    for batch in batches:
        assert [one.request.steps for one in batch] == [1, 1, 20, 20]
        assert len({one.request.width for one in batch}) == 1
    assert (told["drawn"], told["rejected"], told["failed"]) == (12, 6, 0)


def test_of_many_sizes_those_with_the_most_work_are_drawn(rehearsed, batches) -> None:
    told = rehearsed([line(n, width=(32, 48, 64, 96, 128)[n % 5]) for n in range(40)])
    assert sorted(batch[0].request.width for batch in batches) == [64, 96, 128]
    assert told["seconds"] == pytest.approx(
        1e-6 * 8 * 2 * 64 * (32 + 48 + 64 + 96 + 128), abs=0.006
    )


def test_further_tries_count_where_seeds_are_free(rehearsed, batches) -> None:
    rows = [line(n, **({"seed": 7} if n < 20 else {})) for n in range(60)]
    told = rehearsed(rows, attempts=3)
    assert told["tries"] == 20 + 40 * 1.75
    assert told["bytes"] == (20 + 40 * 1.75) * 64 * 64
    assert told["seconds"] == pytest.approx(1e-6 * 90 * 2 * 64 * 64, abs=0.006)


def test_a_share_is_reckoned_alone(rehearsed, batches) -> None:
    told = rehearsed(MIXED, Shard(2, 3))
    assert (told["pictures"], told["of"]) == (20, 60)
    assert sum(len(batch) for batch in batches) <= 20
    with pytest.raises(RequestError, match="has none of 1 pictures"):
        rehearsed(MIXED[:1], Shard(2, 3))


def test_what_is_done_does_not_count_and_nothing_is_written(
    rehearsed, batches, tiny_bundle, tmp_path
) -> None:
    rows = [line(n, steps=1 + n % 2) for n in range(8)]
    out = tmp_path / "out"
    file = write(tmp_path / "r.jsonl", rows)
    more = ["--threads=1", "--gate=off", "--shard=1/2"]
    assert main([str(file), "--bundle", str(tiny_bundle.path), "--out", str(out), *more]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    told = rehearsed(rows)
    assert (told["pictures"], told["left"]) == (8, 4)
    assert told["bytes"] == 4 * 64 * 64
    (gone,) = list(out.rglob("images/**/0000000.png"))
    assert rehearsed(rows, Shard(1, 2))["left"] == 0
    assert rehearsed(rows, Shard(1, 2))["seconds"] == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    gone.unlink()
    assert rehearsed(rows)["left"] == 5


def test_a_short_job_has_its_parts_of_a_second(rehearsed) -> None:
    told = rehearsed([line(n, steps=20) for n in range(40)], batch=None)
    assert 0 < told["seconds"] < 60
    assert told["seconds"] == pytest.approx(40 * told["seconds_per_picture"], rel=0.5)
    assert told["bytes"] > 40 * 100
