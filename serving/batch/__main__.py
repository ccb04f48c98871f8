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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dermaflux.bundle import Bundle, sha256
from dermaflux.command import ended, parsed
from dermaflux.dataset import Record
from dermaflux.errors import BundleError, Cancelled, RequestError
from serving.batch import formats, plan, requests
from serving.batch.finish import finish, unsettled
from serving.batch.gate import Thresholds
from serving.batch.items import Bad, Item
from serving.batch.job import Folder, Job
from serving.batch.journal import Entry, Journal, read
from serving.batch.maker import Maker, Tools, Try
from serving.batch.rehearsal import rehearsal
from serving.batch.resume import check_same, forget_missing, remaining
from serving.batch.settings import Settings
from serving.batch.sharding import chosen
from serving.batch.store import Store, stopping_when_full
from serving.batch.work import Count, work

log = logging.getLogger(__name__)


def run(settings: Settings, cancelled: Callable[[], bool] = lambda: False) -> int:
    """Draw what is left of this process's share, and finish the job when all shares are done.

    Raises:
        DatasetError, RequestError, BundleError, EngineError: bad input, found before any picture.
        Cancelled: asked to stop; the same call goes on.
        DiskFull: the disk is full; the same call goes on when there is room.
    """
    check(settings)
    shard = chosen(settings.shard, os.environ)
    bundle = Bundle.open(settings.bundle)
    items, bad = asked(settings, bundle)
    for one in bad[:10]:
        log.warning("line %d: %s", one.line, one.reason)
    tools = Tools(
        settings.bundle, settings.engine, settings.precision, settings.threads,
        thresholds(settings, bundle), settings.seen,
    )  # fmt: skip
    job = Job(
        bundle.id, settings.seed, settings.attempts,
        None if tools.gate is None else asdict(tools.gate),
        None if settings.seen is None else sha256(settings.seen),
    )  # fmt: skip
    if settings.dry_run:
        print(json.dumps(rehearsal(tools, items, shard, settings)))
        return 0
    folder = Folder(settings.out, f"{shard.number}-of-{shard.of}")
    with stopping_when_full(settings.out):
        folder.prepare(job)
    started = time.monotonic()
    with Journal.open(folder.machinery, folder.share) as journal:
        folder.sweep()
        ledger = read(folder.machinery)
        check_same(items, ledger)
        forget_missing(folder, items, ledger, settings.verify)
        mine = [item for item in items if shard.mine(item.index)]
        left = list(remaining(mine, ledger, settings.attempts, settings.seed))
        count = Count()
        if left:
            count = draw(settings, tools, folder, journal, left, len(mine), cancelled)
        ledger = read(folder.machinery)
        others = unsettled(items, ledger, settings.attempts)
        result: dict[str, Any] = {"out": str(settings.out), "shard": str(shard)}
        failed = sum(item.name in ledger.failed for item in mine)
        if others:
            log.info("this share is done; %d pictures are still with others", others)
        else:
            with stopping_when_full(settings.out):
                outcome = finish(
                    folder, job, bundle, items, bad, ledger,
                    settings.threads or 2, further(settings),
                )  # fmt: skip
            failed = len(outcome.failed)
            result |= {
                "kept": len(outcome.kept),
                "rejected": len(outcome.rejected),
                "copies": len(outcome.copied),
            }
    drawn = count.kept + count.rejected
    rate = round(drawn / count.seconds, 3) if drawn else None
    seconds = round(time.monotonic() - started, 1)
    result |= {"failed": failed, "bad_lines": len(bad), "with_others": others, "drawn": drawn,
               "seconds": seconds, "pictures_per_second": rate}  # fmt: skip
    print(json.dumps(result))
    return 1 if failed or bad else 0


def check(settings: Settings) -> None:
    """Refuse settings that contradict each other or are out of range.

    Raises:
        RequestError: the option, the value found and the value needed.
    """
    if (settings.requests is None) == (settings.plan is None):
        raise RequestError("requests", "name a file of requests, or a --plan, and not both")
    numbers = {"attempts": settings.attempts, "workers": settings.workers}
    given = {"batch": settings.batch, "threads": settings.threads,
             "webdataset": settings.webdataset}  # fmt: skip
    for name, value in (numbers | {k: v for k, v in given.items() if v is not None}).items():
        if value is not None and value < 1:
            raise RequestError(f"--{name}", f"{value} is out of range; use 1 or more")
    if settings.seed < 0:
        raise RequestError("--seed", f"{settings.seed} is out of range; use 0 or more")
    if settings.embed and not settings.parquet:
        raise RequestError("--embed", "is for --parquet; name both")
    if settings.seen is not None and settings.gate == "off":
        raise RequestError("--seen", "is for the gate, which is off; leave one of them out")


def asked(settings: Settings, bundle: Bundle) -> tuple[list[Item], list[Bad]]:
    """All items of the job, whoever draws them, and the lines that ask for nothing."""
    if settings.plan is not None:
        return plan.read(settings.plan, bundle, settings.seed), []
    assert settings.requests is not None, "check wants one of them"
    return requests.read(settings.requests, bundle, settings.seed)


def thresholds(settings: Settings, bundle: Bundle) -> Thresholds | None:
    """The gate's, of `--gate`.

    Raises:
        DatasetError: no such file, or it is not of the form.
        BundleError: the classifier is to be asked, and the bundle has none.
    """
    if settings.gate == "off":
        return None
    gate = Thresholds() if settings.gate == "default" else Thresholds.open(Path(settings.gate))
    if gate.agreement != "none" and bundle.classifier is None:
        raise BundleError(
            f"the bundle {bundle.name} has no classifier for the gate to ask; use --gate off, or "
            "a --gate file with `agreement: none`"
        )
    return gate


def draw(
    settings: Settings, tools: Tools, folder: Folder, journal: Journal, left: Sequence[Try],
    share: int, cancelled: Callable[[], bool],
) -> Count:  # fmt: skip
    """Draw what is left, here or on a cluster, with a progress bar."""
    store = Store(folder, journal)
    # Into a file, a bar that is drawn ten times a second is megabytes by the morning.
    pause = 0.1 if sys.stderr.isatty() else 60.0
    with tqdm(
        total=share, initial=share - len(left), unit="img", mininterval=pause, desc="pictures"
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
        )  # fmt: skip


def further(settings: Settings) -> Callable[[list[Record]], None]:
    """Writes the forms that were asked for beside the dataset's own."""

    def write(records: list[Record]) -> None:
        if settings.webdataset is not None:
            formats.webdataset(settings.out, records, settings.webdataset)
        if settings.parquet:
            formats.parquet(settings.out, records, settings.embed)

    return write


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
