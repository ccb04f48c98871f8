"""The pictures of a job: `Item`, one asked for, whole; and the seed that each has of its own.

An item is all that decides its picture, and nothing that does not: not its batch, its shard, its
neighbours, nor the machine. So every machine of a job makes the same list, and shares it by number.

    >>> item_seed(run=1, name="0000017")
    5391284067284419
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from dermaflux.flow import MAX_SEED
from dermaflux.prompt import Lesion
from dermaflux.request import Request

PER_FOLDER: Final = 1000
"""Pictures in a folder: file browsers and network disks are slow with many more."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Item:
    """A picture asked for.

    `name` is its own in the job, and safe in a file's name. `index` is its place in the job, from
    0. `lesion` has the label and whatever attributes were asked for. `more` are further keys for
    its line in the dataset, such as `skin_type`. `fixed` says that the caller gave the seed, so no
    other may be tried in its place.
    """

    name: str
    index: int
    lesion: Lesion
    request: Request
    more: Mapping[str, Any] = field(default_factory=dict)
    fixed: bool = False

    def attempt(self, number: int, run: int) -> Request:
        """What to draw at a try, from 0: the request, with another seed each time.

        Raises:
            ValueError: the seed is fixed, and this is not the first try.
        """
        if number and self.fixed:
            raise ValueError(f"{self.name} has a seed of its own: there is one try")
        if not number:
            return self.request
        return replace(self.request, seed=item_seed(run, self.name, number))

    @property
    def file(self) -> str:
        """The picture's path, relative to the folder of pictures, with forward slashes."""
        return f"{self.index // PER_FOLDER:04d}/{self.name}.png"

    @property
    def digest(self) -> str:
        """Sixteen hex digits of what was asked for: the name and the place do not count."""
        asked = {
            "lesion": vars(self.lesion),
            "request": vars(self.request),
            "more": dict(self.more),
            "fixed": self.fixed,
        }
        text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Bad:
    """A line that asks for nothing that can be drawn, and why; `line` counts from 1."""

    line: int
    reason: str


def item_seed(run: int, name: str, attempt: int = 0) -> int:
    """The seed of an item, 0 to `MAX_SEED`: the head of a sha256 of the run's seed and its name."""
    digest = hashlib.sha256(f"{run}/{name}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED


def default_name(index: int) -> str:
    """The name of an item that was given none: its place in seven digits.

    >>> default_name(17)
    '0000017'
    """
    return f"{index:07d}"


def named(name: object) -> str:
    """A name that a caller gave, if it may be one.

    Raises:
        ValueError: it is no text, or not of 1 to 64 letters, digits, dots, dashes, underscores.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"id {name!r} cannot name a file; use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a "
            "letter or digit"
        )
    return name
