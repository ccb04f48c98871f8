"""No LoRA learns the test: what is trained on is held against the test splits before anything else.

The index of what was seen stays in the run's folder, for tests that are made later
(`python -m training.data leaks TEST --seen RUN/seen.npz`).

>>> check(settings, items)      # RUN/seen.npz
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from dermaflux.errors import DatasetError
from dermaflux.thumbnails import Index
from training import data, leaks
from training.lora.corpus import Item
from training.lora.settings import Settings

log = logging.getLogger(__name__)

SEEN: Final = "seen.npz"
_THREADS: Final = 2


def check(settings: Settings, items: Sequence[Item]) -> None:
    """Write the index of `items`, and pass where no picture of a test split is among them.

    Raises:
        DatasetError: some are, or a test picture cannot be read; the message lists them.
    """
    seen = _seen(settings.out / SEEN, items)
    tests = [
        sample
        for folder in dict.fromkeys((*settings.data, *settings.held_out))
        for sample in data.read(folder)
        if sample.split == "test"
    ]
    if not tests or settings.split == "test":
        log.warning("no test split is held against what is trained on; name one with --held-out")
        return
    test = leaks.index(tests, _THREADS, _bar("test pictures"))
    leaks.refuse(
        test, seen, "this training", _THREADS,
        remedy="train on pictures that do not stand in the test",
    )  # fmt: skip


def _seen(file: Path, items: Sequence[Item]) -> Index:
    """The index at `file` where it is of these pictures, else a new one."""
    names = [str(item.file) for item in items]
    if file.exists():
        try:
            known = Index.load(file)
            if list(known.names) == names:
                return known
        except DatasetError as error:
            log.warning("%s; it is made again", error)
    # Pictures that cannot be decoded are not trained on either.
    pictures = [(item.file, item.record.group) for item in items]
    index = leaks.look(pictures, _THREADS, _bar("pictures looked at")).index
    index.save(file)
    return index


def _bar(what: str) -> Any:
    return lambda pictures: tqdm(pictures, desc=what, leave=False)
