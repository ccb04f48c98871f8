"""Files that are there whole or not at all.

>>> write(Path("generated/7.png"), data)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path, within: Path | None = None) -> Iterator[IO[bytes]]:
    """A stream whose content is at `path` when the block ends, and nowhere if it fails.

    A temporary file beside it, or `within` a folder of the same disk (which a later process can
    sweep after a kill), is written, flushed to the disk and renamed over it.

    Raises:
        OSError: the folder is not there or takes no files.
    """
    descriptor, temporary = tempfile.mkstemp(dir=within or path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # Temporary files are their owner's alone; what a container mounts is read by others.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write(path: Path, data: bytes, within: Path | None = None) -> None:
    """Write a file so that no reader ever sees half of it, whatever stops this process.

    Raises:
        OSError: the folder is not there or takes no files.
    """
    with replacing(path, within) as stream:
        stream.write(data)
