"""One batch drawn before the night: how long the job takes, and what room it needs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import Any

from dermaflux.errors import RequestError
from serving.batch.items import Item
from serving.batch.maker import Maker, Tools, Try
from serving.batch.settings import Settings
from serving.batch.sharding import Shard


def rehearsal(
    tools: Tools, items: Sequence[Item], shard: Shard, settings: Settings
) -> dict[str, Any]:
    """One batch drawn twice, the first to warm up: what the whole share will take.

    Seconds and bytes are of the share; memory is the plan's.
    """
    mine = [item for item in items if shard.mine(item.index)]
    if not mine:
        raise RequestError("--shard", f"{shard} has none of {len(items)} pictures")
    maker = Maker.open(tools)
    size = (mine[0].request.height, mine[0].request.width)
    most = settings.batch or maker.pipeline.batch(*size)
    first = [
        Try(item, 0, item.request)
        for item in mine
        if (item.request.height, item.request.width) == size
    ][:most]
    maker.develop(first, maker.denoise(first))
    started = time.monotonic()
    made = maker.develop(first, maker.denoise(first))
    seconds = (time.monotonic() - started) / len(first)
    place = next(one for one in (settings.out, *settings.out.resolve().parents) if one.exists())
    each = sum(len(one.png) for one in made) / len(made)
    memory = maker.pipeline.plan
    return {
        "pictures": len(mine),
        "of": len(items),
        "seconds_per_picture": round(seconds, 4),
        "seconds": round(seconds * len(mine)),
        "bytes": round(each * len(mine)),
        "bytes_free": shutil.disk_usage(place).free,
        "rejected_of_one_batch": sum(bool(one.verdict.reasons) for one in made),
        "batch": len(first),
        "engines": maker.details,
        "memory": None if memory is None else str(memory),
    }
