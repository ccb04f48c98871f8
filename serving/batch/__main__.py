"""Datasets of synthetic lesions, as large as wanted, drawn overnight and left alone.

    python -m serving.batch requests.jsonl --bundle bundles/mini --out generated
    python -m serving.batch --plan plan.yaml --out generated --parquet --webdataset 1000
    python -m serving.batch requests.jsonl --out /shared/generated --shard 2/3
    python -m serving.batch requests.jsonl --out generated --ray 10.0.0.1:6379 --workers 8

The same command goes on with a job that was stopped, killed, or ended by a full disk; pictures that
failed are tried again. Shares may run at once on many machines that have the folder in common, or
each with a folder of its own, copied together afterwards: whoever runs last writes the dataset.
A line of results ends up on stdout. Status: 0 done, 1 something failed, 2 bad input, 3 disk full,
130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from dermaflux.bundle import Bundle, sha256
from dermaflux.command import ended, parsed
from dermaflux.errors import Cancelled
from dermaflux.marks import Marker
from dermaflux.thumbnails import Index
from serving.batch.asked import asked, check, require_allowed, tell_cut, thresholds
from serving.batch.connection import reachable
from serving.batch.deaths import Deaths
from serving.batch.finish import Forms, finish
from serving.batch.items import Bad, Item
from serving.batch.job import Folder, Job
from serving.batch.journal import Entry, Journal, read
from serving.batch.maker import Maker, Tools, Try
from serving.batch.marked import opened
from serving.batch.rehearsal import rehearsal
from serving.batch.resume import check_same, forget_missing, remaining
from serving.batch.settings import Settings
from serving.batch.sharding import Shard, chosen
from serving.batch.store import Store, stopping_when_full
from serving.batch.work import Count, work

log = logging.getLogger(__name__)


def run(settings: Settings, cancelled: Callable[[], bool] = lambda: False) -> int:
    """Draw what is left of this process's share, and finish the job when all shares are done.

    Raises:
        DatasetError, RequestError, BundleError, EngineError: bad input, found before any picture.
        LicenceError: the policy forbids what the bundle is made of.
        MarksError, RegistryError: pictures are to be signed, and cannot be.
        Cancelled: asked to stop; the same call goes on.
        DiskFull: the disk is full; the same call goes on when there is room.
    """
    check(settings)
    started = time.monotonic()
    shard = chosen(settings.shard, os.environ)
    bundle = Bundle.open(settings.bundle)
    items, bad = asked(settings, bundle)
    for one in bad[:10]:
        log.warning("line %d: %s", one.line, one.reason)
    tell_cut(items, bundle)
    tools = Tools(
        settings.bundle, settings.engine, settings.precision, settings.threads,
        thresholds(settings, bundle), settings.seen, settings.tier,
    )  # fmt: skip
    require_allowed(settings.policy, bundle, tools.gate)
    if settings.seen is not None:
        Index.load(settings.seen)  # a wrong one must not become the job's
    job = Job(
        bundle.id, settings.seed, settings.attempts,
        None if tools.gate is None else asdict(tools.gate),
        None if settings.seen is None else sha256(settings.seen),
    )  # fmt: skip
    if settings.dry_run:
        print(json.dumps(rehearsal(tools, items, shard, settings)))
        return 0
    reachable(settings)
    with stopping_when_full(settings.out):
        marker = opened(settings.marks, bundle.id, os.environ)
        count, told = go_on(settings, tools, job, bundle, shard, items, bad, marker, cancelled)
    drawn = count.kept + count.rejected
    rate = round(drawn / count.seconds, 3) if drawn else None
    told |= {"drawn": drawn, "seconds": round(time.monotonic() - started, 1),
             "pictures_per_second": rate}  # fmt: skip
    print(json.dumps(told))
    # A bad line stays one however often a share is repeated: who finishes the job tells of it.
    return 1 if told["failed"] or told.get("bad_lines") else 0


def go_on(
    settings: Settings, tools: Tools, job: Job, bundle: Bundle, shard: Shard,
    items: Sequence[Item], bad: Sequence[Bad], marker: Marker | None,
    cancelled: Callable[[], bool],
) -> tuple[Count, dict[str, Any]]:  # fmt: skip
    """Draw what is left and finish if nothing is; what came of it, and what to say of the job."""
    folder = Folder(settings.out, f"{shard.number}-of-{shard.of}")
    folder.prepare(job)
    mine = [item for item in items if shard.mine(item.index)]
    with Journal.open(folder.machinery, folder.share) as journal:
        folder.sweep()
        ledger = read(folder.machinery)
        check_same(items, ledger)
        forget_missing(folder, mine, ledger, settings.verify)
        left = list(remaining(mine, ledger, settings.attempts, settings.seed))
        del ledger  # it is large, and another is read at the end
        count = Count()
        if left:
            store = Store(folder, journal, marker)
            count = draw(settings, tools, folder, store, left, len(mine), cancelled)
        found = finish(
            folder, job, bundle, items, bad,
            Forms(settings.webdataset, settings.parquet, settings.embed),
            threads=settings.threads or 2, shown=stoppable(cancelled),
        )  # fmt: skip
    told: dict[str, Any] = {"out": str(settings.out), "shard": str(shard)}
    if isinstance(found, int):
        log.info("this share is done; %d pictures are still with others", found)
        return count, told | {"with_others": found, "failed": count.failed}
    names = ("asked_by_label", "kept_by_label", "kept", "rejected", "copies", "failed", "bad_lines")
    for label, wanted in found["asked_by_label"].items():
        kept = found["kept_by_label"].get(label, 0)
        if kept < wanted:
            log.warning(
                "of %d %s pictures asked for, %d are kept (rejected.jsonl, failed.jsonl): more "
                "--attempts, or another --gate, in another --out, keep more", wanted, label, kept,
            )  # fmt: skip
    return count, told | {"with_others": 0} | {name: found[name] for name in names}


def stoppable(cancelled: Callable[[], bool]) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """Wraps a long loop: shows its progress, and ends it when asked to."""

    def shown(loop: Iterable[Any]) -> Iterator[Any]:
        for one in tqdm(loop, mininterval=_pause(), desc="finishing", leave=False):
            if cancelled():
                raise Cancelled("stopped")
            yield one

    return shown


def _pause() -> float:
    """Into a file, a bar that is drawn ten times a second is megabytes by the morning."""
    return 0.1 if sys.stderr.isatty() else 60.0


def draw(
    settings: Settings, tools: Tools, folder: Folder, store: Store, left: Sequence[Try],
    share: int, cancelled: Callable[[], bool],
) -> Count:  # fmt: skip
    """Draw what is left, here or on a cluster, with a progress bar."""
    with tqdm(
        total=share, initial=share - len(left), unit="img", mininterval=_pause(), desc="pictures"
    ) as bar:

        def settled(entry: Entry) -> None:
            bar.update(1)

        if settings.ray is not None:
            from serving.batch.cluster import work_on_ray

            return work_on_ray(
                settings, tools, folder, store, left, cancelled=cancelled, settled=settled
            )
        maker = Maker.open(tools)
        folder.tell_engine(maker.engine, maker.details)
        return work(
            maker, store, left, batch=settings.batch, attempts=settings.attempts,
            seed=settings.seed, cancelled=cancelled, settled=settled,
            deaths=Deaths(folder.machinery / f"deaths-{folder.share}.json"),
        )  # fmt: skip


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT came: schedulers send the one, people the other."""
    asked = threading.Event()

    def stop(number: int, _: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        log.info("%s: what is denoised gets written, then this stops", signal.Signals(number).name)
        asked.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parsed(Settings, "python -m serving.batch", str(__doc__), arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")

    def job() -> int:
        with _stopping() as stopped:
            try:
                return run(settings, stopped)
            except Cancelled as error:
                raise Cancelled("stopped; the same command goes on") from error

    return ended(job, "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
