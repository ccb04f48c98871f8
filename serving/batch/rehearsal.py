"""A few batches drawn before the night: how long the job takes, and what room it needs."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from dermaflux.errors import RequestError
from dermaflux.pipeline import Pipeline
from serving.batch.items import Item
from serving.batch.job import Folder
from serving.batch.journal import read
from serving.batch.maker import Made, Maker, Tools, Try
from serving.batch.resume import check_same, forget_missing, remaining, tries
from serving.batch.settings import Settings
from serving.batch.sharding import Shard

log = logging.getLogger(__name__)

_SIZES: Final = 3
"""Sizes of which a batch is drawn, those with the most work; the rest is reckoned from them."""


def rehearsal(
    tools: Tools, items: Sequence[Item], shard: Shard, settings: Settings
) -> dict[str, Any]:
    """What the rest of a share will take in one process, by a batch of each size; writes nothing.

    The time of a picture is taken to grow with its steps and its pixels, the room with its pixels,
    and every try to be rejected as often as those that were drawn. Seconds and bytes are of what
    is `left` of the share's `pictures`; memory is what was planned for.

    Raises:
        RequestError: the share is empty.
        DatasetError: what is done already was drawn of other requests, or cannot be read.
        BundleError, EngineError: nothing can be drawn.
    """
    mine = [item for item in items if shard.mine(item.index)]
    if not mine:
        raise RequestError("--shard", f"{shard} has none of {len(items)} pictures")
    left = _left(mine, shard, settings)
    maker = Maker.open(tools)
    by_size: dict[tuple[int, int], list[Try]] = {}
    for one in left:
        by_size.setdefault((one.request.height, one.request.width), []).append(one)
    most = sorted(by_size, key=lambda size: _work(by_size[size]), reverse=True)[:_SIZES]
    pace: dict[tuple[int, int], float] = {}
    made: list[Made] = []
    drawn: list[Try] = []
    whole = 0.0
    for size in most:
        sample = _spread(by_size[size], settings.batch or maker.pipeline.batch(*size))
        seconds, results = _timed(maker, sample)
        pace[size] = seconds / _work(sample)
        whole += seconds
        made += results
        drawn += sample
    for result in made:
        if result.error:
            log.warning("%s failed: %s", result.one.item.name, result.error)
    rejected = sum(bool(one.verdict.reasons) for one in made)
    rate = rejected / max(1, len(made))
    # Of a size that was not drawn, at the pace of all that were.
    pooled = whole / _work(drawn) if drawn else 0.0
    seconds = sum(
        pace.get((one.request.height, one.request.width), pooled)
        * _work([one])
        * _expected(one, rate, settings.attempts)
        for one in left
    )
    bytes_each = sum(len(one.png) for one in made) / max(1, _pixels(drawn))
    wanted = sum(_pixels([one]) * _expected(one, rate, settings.attempts) for one in left)
    place = next(one for one in (settings.out, *settings.out.resolve().parents) if one.exists())
    return {
        "pictures": len(mine),
        "of": len(items),
        "left": len(left),
        "tries": round(sum(_expected(one, rate, settings.attempts) for one in left), 1),
        "seconds_per_picture": round(seconds / len(left), 4) if left else 0.0,
        "seconds": round(seconds, 2),
        "bytes": round(bytes_each * wanted),
        "bytes_free": shutil.disk_usage(place).free,
        "drawn": len(made),
        "rejected": rejected,
        "failed": sum(bool(one.error) for one in made),
        "engines": maker.details,
        "memory": _memory(maker.pipeline, most),
    }


def _memory(pipeline: Pipeline, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """By device: bytes in use at once at most, for the sizes that were drawn, and bytes free."""
    plan = pipeline.plan
    if plan is None:
        return {}
    return {
        device: {
            "peak": max(plan.peak(device, *size, plan.batch(*size)) for size in sizes),
            "available": memory.available,
        }
        for device, memory in plan.devices.items()
        if sizes
    }


def _left(mine: Sequence[Item], shard: Shard, settings: Settings) -> list[Try]:
    """What the journals leave to be drawn: everything, where there is no job yet."""
    folder = Folder(settings.out, f"{shard.number}-of-{shard.of}")
    ledger = read(folder.machinery)
    check_same(mine, ledger)
    forget_missing(folder, mine, ledger)
    return list(remaining(mine, ledger, settings.attempts, settings.seed))


def _spread(group: Sequence[Try], count: int) -> list[Try]:
    """As many of a group, from the few to the many steps, as evenly as can be."""
    by_work = sorted(group, key=lambda one: one.request.steps)
    count = min(count, len(by_work))
    return [by_work[(2 * n + 1) * len(by_work) // (2 * count)] for n in range(count)]


def _timed(maker: Maker, sample: Sequence[Try]) -> tuple[float, list[Made]]:
    """Seconds of a batch, and what came of it, after one step to load and to warm up."""
    short = [replace(one, request=replace(one.request, steps=1)) for one in sample]
    maker.develop(short, maker.denoise(short))
    started = time.monotonic()
    made = maker.develop(sample, maker.denoise(sample))
    return time.monotonic() - started, made


def _work(group: Sequence[Try]) -> int:
    return sum(one.request.steps * one.request.height * one.request.width for one in group)


def _pixels(group: Sequence[Try]) -> int:
    return sum(one.request.height * one.request.width for one in group)


def _expected(one: Try, rate: float, attempts: int) -> float:
    """Tries that an item will take, each rejected at a rate from 0 to 1."""
    return sum(rate**number for number in range(tries(one.item, attempts) - one.attempt))
