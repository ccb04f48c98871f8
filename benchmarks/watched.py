"""A training process seen from outside: when its progress bar told of each step, and its memory.

Any command that draws a bar of tqdm on stderr can be timed so, whoever wrote it: the clock is this
process's, and the two sides of a comparison have the same one.

>>> seen = watch([sys.executable, "-m", "training.lora", *words], bar="lora")
>>> seen.step_s(after=5)
0.31
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dermaflux.errors import EngineError

EVERY_STEP = {"TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1"}
"""Environment under which tqdm (4.66 and later) draws its bar anew at every step."""
_CHUNK = 2**16
_WORDS = 2000
_NAME = 160


@dataclass(frozen=True)
class Watched:
    """One process from its start to its end.

    Attributes:
        seconds: all of it, the interpreter's start included.
        cpu_s: processor time of it and of what it started and waited for, over all cores.
        peak_bytes: the largest resident memory that the system saw of it.
        steps: step (from 1) -> seconds from the start until the bar told of it.
        output: all of its standard output.
        errors: all of its standard error.
    """

    seconds: float
    cpu_s: float
    peak_bytes: int
    steps: Mapping[int, float]
    output: str
    errors: str

    def step_s(self, after: int) -> float:
        """Mean seconds of a step, those up to `after` left out.

        Raises:
            EngineError: the bar never told of that step, or of none beyond it.
        """
        last = max(self.steps, default=0)
        if after not in self.steps or last <= after:
            raise EngineError(
                f"the progress bar told of {len(self.steps)} steps, the last {last}; to leave out "
                f"{after} it must tell of that one and of later ones: {self.errors[-_WORDS:]}"
            )
        took = self.steps[last] - self.steps[after]
        if took <= 0:
            raise EngineError(
                f"the progress bar told of steps {after} to {last} at once: too few or too short "
                "to be timed; take more with --steps"
            )
        return took / (last - after)


def watch(command: Sequence[str], bar: str, more: Mapping[str, str] | None = None) -> Watched:
    """Run a command to its end; `bar` is its progress bar's description, `more` its environment's.

    The memory is right where the command takes more than this process did: Linux starts a
    process's largest memory with that of the one that started it.

    Raises:
        EngineError: it failed; with its last words.
    """
    told = re.compile(rb"%s:[^\r\n]*?(\d+)/\d+ \[" % re.escape(bar).encode())
    steps: dict[int, float] = {}
    errors, line = bytearray(), b""
    environment = {**os.environ, **EVERY_STEP, **(more or {})}
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE,
            env=environment, bufsize=0,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            while chunk := os.read(process.stderr.fileno(), _CHUNK):
                now = time.perf_counter() - started
                errors += chunk
                line += chunk
                for count in told.findall(line):
                    steps.setdefault(int(count), now)
                # A line that has not ended may be told only in part: it is looked at again.
                line = line[max(line.rfind(b"\r"), line.rfind(b"\n"), 0) :]
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
            if process.stderr is not None:
                process.stderr.close()
        output.seek(0)
        said = output.read().decode(errors="replace")
    words = errors.decode(errors="replace")
    if process.returncode:
        name = textwrap.shorten(" ".join(command), _NAME, placeholder=" ...")
        raise EngineError(f"{name} failed: {(words.strip() or said.strip())[-_WORDS:]}")
    steps.pop(0, None)
    # Linux counts in KiB, macOS in bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Watched(seconds, usage.ru_utime + usage.ru_stime, peak, steps, said, words)
