"""The files of a checkpoint that merging copies, and the place that the result appears in at once.

>>> copied, left_out = others(Path("models/mini"))
>>> with staged(Path("checkpoints/melanoma")) as folder:
...     copy(copied[0], folder / copied[0].name, bar.update)
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from dermaflux import files
from dermaflux.errors import BundleError
from training.tensors import TensorFile

_WEIGHTS: Final = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf")
_CHUNK: Final = 2**24


def others(base: Path, classifier: bool = True) -> tuple[list[Path], list[Path]]:
    """The files that the merged checkpoint has, and those that would be untrue or unsafe there, or,
    without `classifier`, are in its folder."""
    copied: list[Path] = []
    left_out: list[Path] = []
    # Links are followed: a download's folder is made of them.
    for folder, folders, names in os.walk(base, followlinks=True):
        here = Path(folder).resolve()
        folders[:] = sorted(
            name
            for name in folders
            # A link to a folder that it stands in has no end.
            if not name.startswith(".") and not here.is_relative_to((here / name).resolve())
        )
        for name in sorted(names):
            file = Path(folder) / name
            # A single-file model in the root is the base's own weights once more.
            top = file.parent == base and (file.suffix == ".safetensors" or name == "report.json")
            top |= not classifier and file.relative_to(base).parts[0] == "classifier"
            if name.startswith(".") or (file.parent == base and name == "provenance.json"):
                continue
            (left_out if top or file.suffix in _WEIGHTS else copied).append(file)
    return copied, left_out


def copy(source: Path, target: Path, written: Callable[[int], object]) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
            written(len(chunk))
        writer.flush()
        os.fsync(writer.fileno())


def shards(index: Path) -> set[str]:
    """The files that an index names.

    Raises:
        BundleError: it is no index of shards; the message says what it is.
    """
    return set(_index(index)["weight_map"].values())


def _index(file: Path) -> dict[str, Any]:
    """An index with its `weight_map`, tensor -> file, and its `metadata`, both perhaps empty."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is no JSON ({error}); get the base again") from error
    if not isinstance(content, dict):
        found = f"a {type(content).__name__}"
    elif not isinstance(content.setdefault("metadata", {}), dict):
        found = f"metadata that is a {type(content['metadata']).__name__}"
    elif not isinstance(content.setdefault("weight_map", {}), dict):
        found = f"a weight_map that is a {type(content['weight_map']).__name__}"
    elif odd := [one for one in content["weight_map"].values() if not isinstance(one, str)]:
        found = f"the file name {odd[0]!r}"
    else:
        return content
    raise BundleError(
        f"{file} holds {found}, and an object is needed whose weight_map has a file's name for "
        "each tensor; get the base again"
    )


def count(index: Path) -> None:
    """An index's `total_size` is that of its own files."""
    content = _index(index)
    shards = sorted(set(content["weight_map"].values()))
    total = sum(
        e.bytes for name in shards for e in TensorFile.open(index.parent / name).entries.values()
    )
    if content["metadata"].get("total_size", total) != total:
        content["metadata"]["total_size"] = total
        files.write(index, (json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well, and else is removed.

    Its name is the same every time, so that what a killed run left is found; a lock, which the
    system lifts when a process dies, tells that from a run that is still writing.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.merging"
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BundleError(f"another run is writing {out}; wait for it, or stop it") from None
        try:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield folder
            folder.rename(out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def room(out: Path, needed: int) -> None:
    folder = next(one for one in out.resolve().parents if one.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BundleError(
            f"{folder} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed; give "
            "--out a place on another disk"
        )
