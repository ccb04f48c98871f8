"""Who is measured over HTTP, and with which settings: our service, LitServe, FastAPI.

Rivals are given the settings that users try on few cores, and are quoted at their best: all cores
within one image or batch, or an image or batch per core with a thread each.

>>> families, left_out = contenders(settings, kinds(settings, bundle))
>>> [side.name for side in families["litserve"]]
['litserve, 1 worker of 2 threads', 'litserve, 2 workers of 1 thread']
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from benchmarks.http_ours import Kind
from benchmarks.http_sides import PORT, Side
from benchmarks.rivals_http.torch_classifier import READY_PATH
from dermaflux.errors import BundleError
from dermaflux.hardware import usable_cores

RIVALS: Final = ("litserve", "fastapi")
RIVALS_PYTHON: Final = Path(".venv-rivals/bin/python")
PACKAGES: Final = ("litserve", "fastapi", "uvicorn", "uvloop", "torch", "timm")
_QUIET: Final = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
"""No side may ask the network: LitServe has no telemetry in 0.2, timm might ask for weights."""


class Asked(Protocol):
    """What is needed of the command's settings."""

    @property
    def checkpoint(self) -> Path | None: ...
    @property
    def rivals_python(self) -> Path | None: ...


def contenders(asked: Asked, ours: Sequence[Kind]) -> tuple[dict[str, list[Side]], dict[str, str]]:
    """Each family's settings that are to be tried, ours first, and why families are left out.

    Raises:
        BundleError: the checkpoint has no classifier.
    """
    families = {one.side: [one.service()] for one in ours}
    if asked.checkpoint is None:
        return families, dict.fromkeys(RIVALS, "no --checkpoint was given, which rivals run")
    if not (asked.checkpoint / "classifier/model.safetensors").is_file():
        raise BundleError(
            f"{asked.checkpoint} has no classifier/model.safetensors; name the checkpoint that the "
            "bundle was exported from, or make one with: python -m benchmarks.classifiers "
            f"vit_base_patch16_224 --out {asked.checkpoint}"
        )
    interpreter = interpreter_of(asked)
    left_out = {}
    for name in RIVALS:
        if _has(interpreter, name):
            families[name] = rivals(name, interpreter, asked.checkpoint, usable_cores())
        else:
            left_out[name] = (
                f"{interpreter} has no {name} beside torch and timm; install it with: "
                "make .venv-rivals/.complete"
            )
    return families, left_out


def rivals(name: str, python: str, checkpoint: Path, cores: int) -> list[Side]:
    """A rival's settings: all cores in one place, and one core in each of as many places."""
    places = [(1, cores)] if cores == 1 else [(1, cores), (cores, 1)]
    option, what = {"litserve": ("--workers", "worker"), "fastapi": ("--at-once", "image")}[name]
    return [
        Side(
            f"{name}, {_counted(count, what)}{' at a time' if what == 'image' else ''} of "
            f"{_counted(threads, 'thread')}",
            (python, "-m", f"benchmarks.rivals_http.{name}_server", "--checkpoint", str(checkpoint),
             "--port", PORT, option, str(count), "--threads", str(threads)),
            _QUIET,
            READY_PATH,
        )
        for count, threads in places
    ]  # fmt: skip


def interpreter_of(asked: Asked) -> str:
    """What runs the rivals."""
    python = asked.rivals_python or (RIVALS_PYTHON if RIVALS_PYTHON.exists() else None)
    return sys.executable if python is None else str(python)


def versions(python: str, names: Sequence[str]) -> Mapping[str, str]:
    """Installed versions in an interpreter's environment, of those that are there."""
    program = (
        "import sys\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        print(name, version(name))\n"
        "    except PackageNotFoundError:\n        pass\n"
    )
    done = subprocess.run([python, "-c", program, *names], capture_output=True, text=True)
    return dict(line.split() for line in done.stdout.splitlines())


def _has(python: str, name: str) -> bool:
    try:
        return {name, "torch", "timm", "uvicorn"} <= versions(python, PACKAGES).keys()
    except OSError:
        return False


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
