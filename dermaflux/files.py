"""Files that are there whole or not at all.

>>> write(Path("generated/7.png"), data)
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Write a file so that no reader ever sees half of it, whatever stops this process.

    A temporary file beside it is written, flushed to the disk and renamed over it.

    Raises:
        OSError: the folder is not there or takes no files.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # Temporary files are their owner's alone; what a container mounts is read by others.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
