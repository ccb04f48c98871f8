"""Optimum's `ORTFluxPipeline` over the bundle's fp32 graphs, as a process of its own environment.

    >>> with opened(Path("bundles/mini"), threads=2) as rival:
    ...     rival.draw(task.asked(0)).seconds

Optimum needs an older transformers than we do, so it lives in `.venv-optimum`
(`make .venv-optimum/.complete`), and is asked over a pipe (`benchmarks.rivals.optimum_process`).
Its seconds are by its own clock: the way there and back is no work of its own.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.rivals.flux_torch import Rival
from benchmarks.rivals.task import Asked, Drawn
from dermaflux import flow
from dermaflux.errors import EngineError

ENVIRONMENT: Final = Path(".venv-optimum")
_SCRIPT: Final = Path(__file__).with_name("optimum_process.py")


@contextmanager
def opened(bundle: Path, threads: int, command: Sequence[str] | None = None) -> Iterator[Rival]:
    """The process, for as long as the block lasts; `command` is another than `.venv-optimum`'s.

    Raises:
        EngineError: the environment is not there, or the process did not start; with its words.
    """
    if command is None:
        python = ENVIRONMENT / "bin/python"
        if not python.exists():
            raise EngineError(
                f"Optimum's environment {ENVIRONMENT} is not there; make {ENVIRONMENT}/.complete"
            )
        command = [str(python), str(_SCRIPT)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as words:
            process = subprocess.Popen(
                [*command, str(bundle), str(threads)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True,
            )  # fmt: skip
        try:
            other = _OtherEnd(process, Path(folder), log)
            ready = other.answer()
            told: dict[str, Any] = {
                key: ready[key] for key in ("versions", "providers") if key in ready
            }
            yield Rival(other.draw, float(ready["opened_s"]), lambda: told)
        finally:
            # The end of its input is its sign to end; what does not is ended.
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


class _OtherEnd:
    """What is asked and answered over the pipes of a process."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, log: Path) -> None:
        self._process = process
        self._folder = folder
        self._log = log

    def draw(self, asked: Asked) -> Drawn:
        noise, out = self._folder / "noise.npy", self._folder / "pixels.npy"
        np.save(noise, flow.pack(asked.noise))
        line = {
            "prompts": list(asked.prompts), "latents": str(noise), "out": str(out),
            "steps": asked.steps, "guidance": asked.guidance, "height": asked.height,
            "width": asked.width, "text_length": asked.text_length,
        }  # fmt: skip
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        answer = self.answer()
        pixels = np.load(out, allow_pickle=False)
        return Drawn(pixels, answer["stages"], float(answer["seconds"]))

    def answer(self) -> dict[str, Any]:
        """The next line that comes out.

        Raises:
            EngineError: it says that something is wrong, or there is none.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            found = json.loads(line)
        except ValueError:
            raise self._ended(line) from None
        if not isinstance(found, dict) or "error" in found:
            raise EngineError(f"Optimum's process says: {str(found)[:500]}")
        return found

    def _ended(self, line: str = "") -> EngineError:
        words = self._log.read_bytes()[-500:].decode(errors="replace").strip()
        return EngineError(
            f"Optimum's process ended or answered {line[:200]!r} where one JSON object a line was "
            f"expected; its last words: {words or 'none'}"
        )
