"""A folder that appears whole or not at all.

>>> with staged(Path("bundles/mini")) as folder:   # bundles/.mini.4711.partial
...     ...                                        # a failure here leaves bundles/mini as it was
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dermaflux.bundle import MANIFEST
from dermaflux.errors import BundleError


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, put in its place when the block ends without an exception.

    Raises:
        BundleError: the place cannot be written to, or holds something that is not a bundle.
    """
    target = target.absolute()
    _check(target)
    folder = _sibling(target, "partial")
    try:
        # Not mkdtemp, whose folders only their owner may read: a bundle is mounted by others.
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        raise BundleError(
            f"{target.parent} cannot be written to ({error.strerror}); choose another --out"
        ) from error
    try:
        yield folder
        _swap(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise BundleError(f"{target} is not a folder; choose another --out")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise BundleError(
            f"{target} holds something that is not a bundle (it has no {MANIFEST}) and is left as "
            "it is; remove it or choose another --out"
        )


def _swap(folder: Path, target: Path) -> None:
    """Two renames: whoever holds the old bundle's files open keeps reading them."""
    if not target.exists():
        folder.rename(target)
        return
    old = _sibling(target, "old")
    target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{kind}")
