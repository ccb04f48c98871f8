"""FLUX.1 at full size on one card, with random weights: diffusers, our tiers, floors, and proof.

    python -m benchmarks.gpu --out gpu.json
    python -m benchmarks.gpu --seconds 120 --rows lossless,fp8
    python -m benchmarks.gpu --device cpu            # tried at a reduced shape, not measured

Needs torch and the core's own numpy, pillow and tokenizers; diffusers, transformers and timm for
their own rows alone: a row whose package is not there says so and the others go on. Weights are
made on the device, so nothing is loaded. Rows come in the order of their value; what does not fit
in the seconds is left out and named. The result is written whole after each row, so a run that is
stopped (SIGTERM, Ctrl-C) has all rows before.

No GPU has run this yet. On a CPU it runs end to end at a reduced shape, with blocks traced and not
compiled, and the result says that it is no GPU figure.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch

from benchmarks import machine
from benchmarks.gpu_bench import Bench, Row
from benchmarks.gpu_rows import ROWS
from benchmarks.gpu_shapes import FULL, REDUCED
from benchmarks.gpu_sides import Sides
from benchmarks.results_file import finish, keep, require_place
from dermaflux.command import STOPPED, at_least, ended, option, parsed
from dermaflux.errors import DermaFluxError

_BEGAN: Final = time.monotonic()
_DEVICES: Final = ("auto", "cuda", "cpu")
_NO_GPU: Final = "not a GPU figure: run on a CPU at a reduced shape, to show that the script runs"
_ROW_FAILS: Final = (
    RuntimeError, ImportError, AssertionError, AttributeError, LookupError, NotImplementedError,
    OSError, TypeError, ValueError,
)  # fmt: skip
"""What a row may end with, out of memory included, without ending the others: each is reported."""


@dataclass(frozen=True)
class Settings:
    """What `python -m benchmarks.gpu` is asked for."""

    seconds: float = option("time for everything, from the start of the process", 570.0)
    rows: tuple[str, ...] = option("only rows whose names have one of these in them", ())
    device: str = option("auto, cuda or cpu", "auto")
    backend: str | None = option("torch.compile's; default: inductor on CUDA, eager on a CPU", None)
    out: Path | None = option("write the result here too, after each row", None)


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parsed(Settings, "python -m benchmarks.gpu", __doc__, arguments)
    words = sys.argv[1:] if arguments is None else arguments
    return ended(lambda: run(settings, words))


def run(settings: Settings, words: Sequence[str]) -> int:
    """Measure what fits, and print the result as one line of JSON; 130 where it was stopped."""
    at_least(settings, {"seconds": 1})
    require_place(settings.out)
    device = _device(settings.device)
    cuda = device.type == "cuda"
    # Floors need rates, whatever else is asked for.
    chosen = [row for row in ROWS if _asked(row, settings.rows) or row.name == "rates"]
    if not any(_asked(row, settings.rows) for row in ROWS):
        known = "; ".join(row.name for row in ROWS)
        raise DermaFluxError(f"--rows {','.join(settings.rows)} names no row; rows are: {known}")
    shape = FULL if cuda else REDUCED
    backend = settings.backend or ("inductor" if cuda else "eager")
    bench = Bench(Sides(shape, device, torch.bfloat16 if cuda else torch.float32, backend))
    result: dict[str, Any] = {
        "environment": {**machine.before_measuring(), "device": _described(device)},
        "gpu_figure": cuda,
        "shape": shape.name,
        "backend": backend,
        "seconds": settings.seconds,
        "rows": {},
        "left_out": {},
    }
    if not cuda:
        result["note"] = _NO_GPU
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        for row in chosen:
            _measure(row, bench, result, settings.seconds)
            keep("gpu", result, settings.out)
    except KeyboardInterrupt:
        result["stopped"] = True
    finally:
        signal.signal(signal.SIGTERM, previous)
    result["goals"] = goals(result["rows"])
    finish("gpu", result, words, settings.out)
    return STOPPED if result.get("stopped") else 0


def goals(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal in seconds an image, and whether transformer and decoder together keep it.

    Without the decoder's row the transformer alone is compared, and `decoder_s` is None.
    """
    found = []
    for name, row in rows.items():
        if row.get("goal_s") is None:
            continue
        decoders = rows.get("decoder", {})
        side = row["image"].split()[-1]
        decoder = decoders.get(f"ours {side}", {}).get("seconds")
        total = row["median_s"] + (decoder or 0.0)
        found.append(
            {
                "row": name,
                "goal_s": row["goal_s"],
                "seconds": total,
                "decoder_s": decoder,
                "met": total <= row["goal_s"],
            }
        )
    return found


def _measure(row: Row, bench: Bench, result: dict[str, Any], seconds: float) -> None:
    left = seconds - (time.monotonic() - _BEGAN)
    needed = row.estimate if result["gpu_figure"] else 1.0
    if left < needed:
        result["left_out"][row.name] = f"{left:.0f} s were left, it may take {needed:.0f}"
        print(f"left out {row.name}: {result['left_out'][row.name]}", file=sys.stderr)
        return
    began = time.monotonic()
    try:
        result["rows"][row.name] = row.measure(bench)
    except _ROW_FAILS as error:
        words = (str(error).splitlines() or [""])[0]
        result["left_out"][row.name] = f"{type(error).__name__}: {words}"[:500]
        print(f"left out {row.name}: {result['left_out'][row.name]}", file=sys.stderr)
        return
    spent = time.monotonic() - began
    result["rows"][row.name]["row_took_s"] = spent
    print(f"{row.name}: {spent:.1f} s", file=sys.stderr)


def _asked(row: Row, names: tuple[str, ...]) -> bool:
    return not names or any(name in row.name for name in names)


def _device(name: str) -> torch.device:
    if name not in _DEVICES:
        raise DermaFluxError(f"--device {name} is not known; use {', '.join(_DEVICES)}")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise DermaFluxError("--device cuda: torch sees no CUDA device here; use cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def _described(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": "cpu"}
    card = torch.cuda.get_device_properties(device)
    return {
        "name": card.name,
        "memory_gb": card.total_memory / 1e9,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
