"""No LoRA learns the test: what is trained on is held against the test splits before anything else.

The index of what was seen stays in the run's folder, for tests that are made later
(`python -m training.data leaks TEST --seen RUN/seen.npz`).

>>> check(settings, items)      # RUN/seen.npz
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from dermaflux import files
from dermaflux.errors import DatasetError
from dermaflux.thumbnails import Index
from training import data, leaks
from training.lora.corpus import Item, sha256
from training.lora.settings import Settings
from training.lora.state import saving

log = logging.getLogger(__name__)

SEEN: Final = "seen.npz"
MADE_OF: Final = "seen.json"
"""Beside it: of which pictures the index is, and its own checksum."""
_THREADS: Final = 2


def check(settings: Settings, items: Sequence[Item]) -> None:
    """Write the index of `items`, and pass where no picture of a test split is among them.

    Raises:
        DatasetError: some are, or a test picture cannot be read; the message lists them.
    """
    seen = _seen(settings.out / SEEN, items)
    # Who trains on a test split gives that test up, and no other.
    own = () if settings.split == "test" else settings.data
    tests = [
        sample
        for folder in dict.fromkeys((*own, *settings.held_out))
        for sample in data.read(folder)
        if sample.split == "test"
    ]
    if not tests:
        log.warning("no test split is held against what is trained on; name one with --held-out")
        return
    test = leaks.index(tests, _THREADS, _bar("test pictures"))
    leaks.refuse(
        test, seen, "this training", _THREADS,
        remedy="train on pictures that do not stand in the test",
    )  # fmt: skip


def _seen(file: Path, items: Sequence[Item]) -> Index:
    """The index at `file` where it is of these pictures, else a new one."""
    made_of = file.with_name(MADE_OF)
    pictures = _digest(items)
    try:
        if json.loads(made_of.read_bytes()) == {"pictures": pictures, "index": sha256(file)}:
            return Index.load(file)
    except FileNotFoundError:
        pass
    except (DatasetError, OSError, ValueError) as error:
        log.warning("%s; it is made again", error)
    # Pictures that cannot be decoded are not trained on either.
    looked = [(item.file, item.record.group) for item in items]
    index = leaks.look(looked, _THREADS, _bar("pictures looked at")).index
    with saving("what is trained on", file, file.parent):
        index.save(file)
        told = {"pictures": pictures, "index": sha256(file)}
        files.write(made_of, (json.dumps(told) + "\n").encode())
    return index


def _digest(items: Sequence[Item]) -> str:
    """Names pictures as an index sees them: their files, what is in these, their groups.

    Those that cannot be decoded count too, so that they do not make it anew at every run.
    """
    total = hashlib.sha256()
    for item in items:
        total.update(f"{item.file}\0{item.sha256}\0{item.record.group}\n".encode())
    return total.hexdigest()


def _bar(what: str) -> Any:
    return lambda pictures: tqdm(pictures, desc=what, leave=False)
