"""The largest memory that a command takes, measured from outside.

>>> peak_of([sys.executable, "-m", "export", "models/mini"])
1204817920
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dermaflux.errors import EngineError

# A process begins with the largest memory of the one that started it (Linux' exec_mmap keeps it):
# the benchmark, which made the weights, would be counted as the command. A small one in between
# starts it instead.
_BETWEEN: Final = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as stream:
    stream.write(str(usage.ru_maxrss))
sys.exit(abs(os.waitstatus_to_exitcode(status)))
"""


def peak_of(command: Sequence[str]) -> int:
    """Run a command to its end; the largest resident memory of its process, in bytes.

    Raises:
        EngineError: it failed; with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        told, log = Path(folder) / "peak", Path(folder) / "log"
        with log.open("wb") as stream:
            done = subprocess.run(
                [sys.executable, "-c", _BETWEEN, str(told), *command], stdout=stream, stderr=stream
            )
        if done.returncode:
            words = log.read_bytes()[-2000:].decode(errors="replace")
            raise EngineError(f"{' '.join(command)} failed: {words}")
        # Linux counts in KiB, macOS in bytes.
        return int(told.read_text()) * (1 if sys.platform == "darwin" else 1024)
