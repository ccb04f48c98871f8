from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dermaflux.engines.fake import Fake
from dermaflux.errors import Cancelled, EngineError
from dermaflux.images import read_marks
from dermaflux.marks import Marker
from dermaflux.pipeline import Pipeline
from dermaflux.prompt import Lesion
from serving.batch.deaths import Deaths
from serving.batch.gate import Verdict
from serving.batch.items import Item, default_name, item_seed
from serving.batch.job import Folder, Job
from serving.batch.journal import Journal, Ledger, read
from serving.batch.maker import Maker, Try
from serving.batch.store import Store
from serving.batch.work import Count, work

JOB = Job("bundle", 0, 1, None, None)


def items(pipeline: Pipeline, count: int, **values: int) -> list[Item]:
    return [
        Item(
            default_name(index),
            index,
            Lesion(label="benign"),
            pipeline.request(f"benign lesion {index % 3}", item_seed(0, default_name(index)),
                             **values),
        )
        for index in range(count)
    ]  # fmt: skip


class Picky:
    """A gate that wants a seed that a number divides."""

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor
        self.judged: list[str] = []

    def judge(self, items: Sequence[Item], pixels: Sequence[np.ndarray]) -> list[Verdict]:
        self.judged += [item.name for item in items]
        sums = [int(one[::8, ::8].astype(int).sum()) for one in pixels]
        return [
            Verdict(() if total % self.divisor == 0 else ("odd",), {"sum": total}) for total in sums
        ]


def run(
    pipeline: Pipeline, path: Path, wanted: list[Item], *, gate=None, attempts: int = 1,
    batch: int | None = None, share: str = "1-of-1", marker: Marker | None = None, **more,
) -> tuple[Count, Ledger]:  # fmt: skip
    folder = Folder(path, share)
    folder.prepare(replace(JOB, attempts=attempts))
    with Journal.open(folder.machinery, share) as journal:
        folder.sweep()
        before = read(folder.machinery)
        left = [
            Try(item, number, item.attempt(number, 0))
            for item in wanted
            if (number := before.next_attempt(item.name, attempts)) is not None
        ]
        count = work(
            Maker(pipeline, gate, {"engine": "fake"}), Store(folder, journal, marker), left,
            batch=batch, attempts=attempts, seed=0, **more,
        )  # fmt: skip
    return count, read(folder.machinery)


def pictures(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*.png"))
        if ".batch" not in file.parts
    }


def test_a_picture_is_the_same_whatever_its_batch_and_share(fake_pipeline, tmp_path) -> None:
    wanted = items(fake_pipeline, 11)
    run(fake_pipeline, tmp_path / "one", wanted, batch=1)
    run(fake_pipeline, tmp_path / "many", wanted, batch=4)
    for number in range(3):
        run(fake_pipeline, tmp_path / "shares", wanted[number::3], share=f"{number + 1}-of-3")
    reference = pictures(tmp_path / "one")
    assert len(reference) == 11
    assert pictures(tmp_path / "many") == reference
    assert pictures(tmp_path / "shares") == reference
    made = read_marks(reference["images/0000/0000003.png"])
    assert made["dermaflux.seed"] == str(wanted[3].request.seed)


def test_sizes_and_steps_may_differ(fake_pipeline, tmp_path) -> None:
    wanted = [
        replace(one, request=replace(one.request, height=32 * (1 + one.index % 2),
                                     steps=1 + one.index % 5))
        for one in items(fake_pipeline, 9)
    ]  # fmt: skip
    count, ledger = run(fake_pipeline, tmp_path / "all", wanted)
    assert count.kept == 9
    for one in wanted:
        run(fake_pipeline, tmp_path / "single", [one])
    assert pictures(tmp_path / "single") == pictures(tmp_path / "all")
    assert len(ledger.kept) == 9


def test_a_bad_item_never_fails_its_neighbours(fake_pipeline, tmp_path) -> None:
    wanted = items(fake_pipeline, 7)
    poison = fake_pipeline.encode([wanted[4].request.prompt + " poison"]).pooled[0]
    wanted[4] = replace(
        wanted[4], request=replace(wanted[4].request, prompt=wanted[4].request.prompt + " poison")
    )
    good = fake_pipeline.engines["transformer"]

    def velocity(inputs):
        if any(np.array_equal(row, poison) for row in inputs["pooled_projections"]):
            raise EngineError("out of luck")
        return good.run(inputs)

    sick = Pipeline(
        fake_pipeline.model, fake_pipeline.schedule, fake_pipeline.limits, fake_pipeline.defaults,
        fake_pipeline.tokenizers, {**fake_pipeline.engines, "transformer": Fake(velocity)},
    )  # fmt: skip
    # The two unknown words of the tiny tokenizer must not make it equal to a neighbour's.
    assert not any(np.array_equal(poison, fake_pipeline.encode([i.request.prompt]).pooled[0])
                   for i in wanted if i.index != 4)  # fmt: skip
    count, ledger = run(sick, tmp_path, wanted)
    assert (count.kept, count.failed) == (6, 1)
    assert ledger.failed["0000004"].reasons == ("out of luck",)
    count, ledger = run(fake_pipeline, tmp_path, wanted)
    assert (count.kept, count.failed) == (1, 0)
    assert len(ledger.kept) == 7
    assert not any(ledger.has_failed(one.name, 1) for one in wanted)


def test_when_all_fail_it_is_the_engine_and_the_night_is_not_lost(fake_pipeline, tmp_path) -> None:
    def broken(inputs):
        raise EngineError("the device is gone")

    dead = Pipeline(
        fake_pipeline.model, fake_pipeline.schedule, fake_pipeline.limits, fake_pipeline.defaults,
        fake_pipeline.tokenizers, {**fake_pipeline.engines, "vae_decoder": Fake(broken)},
    )  # fmt: skip
    wanted = items(fake_pipeline, 200)
    with pytest.raises(EngineError, match="the device is gone"):
        run(dead, tmp_path, wanted)
    assert 32 <= len(read(tmp_path / ".batch").failed) < 64


def test_rejected_items_are_tried_with_other_seeds_and_stay_with_their_reason(
    fake_pipeline, tmp_path
) -> None:
    wanted = items(fake_pipeline, 12)
    gate = Picky(2)
    settled: list[str] = []
    count, ledger = run(
        fake_pipeline, tmp_path, wanted, gate=gate, attempts=3,
        settled=lambda entry: settled.append(entry.name),
    )  # fmt: skip
    assert sorted(settled) == [one.name for one in wanted]
    assert count.kept == len(ledger.kept)
    assert count.rejected == sum(map(len, ledger.rejected.values())) > 0
    for one in wanted:
        entries = [*ledger.rejected.get(one.name, {}).values()]
        assert all(entry.reasons == ("odd",) for entry in entries)
        assert {entry.seed for entry in entries} | (
            {ledger.kept[one.name].seed} if one.name in ledger.kept else set()
        ) == {one.attempt(n, 0).seed for n in range(len(entries) + (one.name in ledger.kept))}
        assert one.name in ledger.kept or len(entries) == 3
    assert len(pictures(tmp_path)) == count.kept + count.rejected
    # The same whatever the batch: a try depends on its item alone.
    run(fake_pipeline, tmp_path / "b", wanted, gate=Picky(2), attempts=3, batch=1)
    ours = {name: data for name, data in pictures(tmp_path).items() if not name.startswith("b/")}
    assert pictures(tmp_path / "b") == ours
    assert run(fake_pipeline, tmp_path, wanted, gate=gate, attempts=3)[0].kept == 0


def test_many_bad_items_do_not_stop_the_good_ones_after_them(fake_pipeline, tmp_path) -> None:
    good = fake_pipeline.engines["vae_decoder"]

    def small_only(inputs):
        if inputs["latent_sample"].shape[2] > 4:
            raise EngineError("too large")
        return good.run(inputs)

    sick = Pipeline(
        fake_pipeline.model, fake_pipeline.schedule, fake_pipeline.limits, fake_pipeline.defaults,
        fake_pipeline.tokenizers, {**fake_pipeline.engines, "vae_decoder": Fake(small_only)},
    )  # fmt: skip
    wanted = [
        replace(one, request=replace(one.request, height=64 if 8 <= one.index < 60 else 32))
        for one in items(fake_pipeline, 80)
    ]
    count, _ = run(sick, tmp_path, wanted)
    assert (count.kept, count.failed) == (28, 52)


def test_an_item_over_which_processes_died_is_drawn_alone_and_at_last_given_up(
    fake_pipeline, tmp_path
) -> None:
    wanted = items(fake_pipeline, 8)
    file = tmp_path / "deaths.json"
    for _ in range(4):
        Deaths(file).begin([wanted[2].name, wanted[5].name])
    run(fake_pipeline, tmp_path / "alone", wanted, deaths=Deaths(file))
    run(fake_pipeline, tmp_path / "whole", wanted)
    assert pictures(tmp_path / "alone") == pictures(tmp_path / "whole")
    for _ in range(5):
        Deaths(file).begin([wanted[2].name])
    count, ledger = run(fake_pipeline, tmp_path / "given", wanted, deaths=Deaths(file))
    assert (count.kept, count.failed) == (7, 1)
    assert "process died 5 times" in ledger.failed[wanted[2].name].reasons[0]
    assert run(fake_pipeline, tmp_path / "given", wanted, deaths=Deaths(file))[0].kept == 1


def test_an_item_with_a_seed_of_its_own_has_one_try(fake_pipeline, tmp_path) -> None:
    wanted = [replace(one, fixed=True) for one in items(fake_pipeline, 6)]
    count, ledger = run(fake_pipeline, tmp_path, wanted, gate=Picky(10**9), attempts=3)
    assert count.rejected == 6
    assert all(set(tries) == {0} for tries in ledger.rejected.values())


def test_what_is_denoised_when_asked_to_stop_is_written(fake_pipeline, tmp_path) -> None:
    wanted = items(fake_pipeline, 20)
    asked = iter(range(10_000))

    def cancelled() -> bool:
        return next(asked) > 12

    with pytest.raises(Cancelled):
        run(fake_pipeline, tmp_path, wanted, batch=2, cancelled=cancelled)
    there = pictures(tmp_path)
    assert 0 < len(there) < 20
    assert len(read(tmp_path / ".batch").kept) == len(there)
    run(fake_pipeline, tmp_path, wanted, batch=2)
    run(fake_pipeline, tmp_path / "whole", wanted, batch=2)
    ours = {name: data for name, data in pictures(tmp_path).items() if "whole" not in name}
    assert ours == pictures(tmp_path / "whole")
