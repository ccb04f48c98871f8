"""Batch generation beside the bare pipeline: does the night lose time to anything but denoising?

    python -m benchmarks.batch --bundle bundles/mini --pictures 96 --rounds 5 \\
        --out benchmarks/results/batch_mini_cpu.json

Both draw the same requests in the same batches with the same engines. The bare side is a loop over
`Pipeline.generate` that throws its pictures away; the other is `python -m serving.batch`, which
also encodes, hashes, writes and journals them, and with its gate on judges them. Each side is a
process of its own whose clock starts when the bundle is open; the bare one has drawn a batch to
warm up by then, the other has not. The sides alternate, and what counts is the median of the
rounds' ratios. The bare rate is the limit: nothing that writes its pictures can pass it for long.
Progress goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import environment
from dermaflux import files
from dermaflux.command import at_least, ended
from dermaflux.errors import EngineError
from dermaflux.pipeline import Pipeline
from dermaflux.prompt import COLORS, SIZES, Lesion, caption

BARE: Final = "bare pipeline"
SIDES: Final[dict[str, tuple[str, ...]]] = {
    "batch": ("--gate", "off"),
    "batch, gate": ("--gate", "default"),
}
GOAL: Final = 0.95


@dataclass(frozen=True)
class Round:
    """Pictures a second of each side in one round, in the order in which they ran."""

    rates: dict[str, float]

    def ratio(self, side: str) -> float:
        return self.rates[side] / self.rates[BARE]


def lesions(count: int) -> list[Lesion]:
    """A spread of attributes, the same every time."""
    sizes, colours = tuple(SIZES)[:3], COLORS[1:3]
    return [
        Lesion(
            label=("benign", "malignant")[index % 2],
            size=sizes[index // 2 % 3],
            colors=(colours[index // 6 % 2],),
        )
        for index in range(count)
    ]


def bare(bundle: Path, wanted: Sequence[Lesion], batch: int, threads: int | None) -> float:
    """Pictures a second of the pipeline alone; the first batch warms up and does not count."""
    pipeline = Pipeline.open(bundle, threads=threads)
    requests = [pipeline.request(caption(one), seed) for seed, one in enumerate(wanted)]
    pipeline.generate(requests[:batch])
    started = time.monotonic()
    for start in range(0, len(requests), batch):
        pipeline.generate(requests[start : start + batch])
    return len(requests) / (time.monotonic() - started)


def batched(
    bundle: Path, wanted: Sequence[Lesion], batch: int, threads: int | None, more: Sequence[str],
    work: Path,
) -> float:  # fmt: skip
    """Pictures a second of `serving.batch`, from its first batch on."""
    file = work / "requests.jsonl"
    lines = [{"prompt": caption(one), "label": one.label} for one in wanted]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with tempfile.TemporaryDirectory(dir=work) as out:
        command = [sys.executable, "-m", "serving.batch", str(file), "--bundle", str(bundle),
                   "--out", f"{out}/generated", "--batch", str(batch), *more]  # fmt: skip
        if threads is not None:
            command += ["--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["pictures_per_second"])


def measure(
    bundle: Path, pictures: int, rounds: int, batch: int, threads: int | None
) -> list[Round]:
    """Rounds in which each side ran once; the order turns from round to round."""
    wanted = lesions(pictures)
    found: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            names = [BARE, *SIDES]
            rates: dict[str, float] = {}
            for name in names[number % 3 :] + names[: number % 3]:
                if name == BARE:
                    rates[name] = _bare_apart(bundle, pictures, batch, threads)
                else:
                    rates[name] = batched(bundle, wanted, batch, threads, SIDES[name], Path(folder))
                print(f"round {number + 1}, {name}: {rates[name]:.3f} a second", file=sys.stderr)
            found.append(Round(rates))
    return found


def _bare_apart(bundle: Path, pictures: int, batch: int, threads: int | None) -> float:
    """In a process of its own, as the other side is: a heap that has grown is another machine."""
    command = [sys.executable, "-m", "benchmarks.batch", "--bundle", str(bundle), "--pictures",
               str(pictures), "--batch", str(batch), "--bare"]  # fmt: skip
    if threads is not None:
        command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return float(done.stdout.splitlines()[-1])


def report(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians over rounds, each ratio within its round."""
    names = [BARE, *SIDES]
    return {
        "goal": GOAL,
        "median_pictures_per_second": {
            name: round(statistics.median(one.rates[name] for one in rounds), 4) for name in names
        },
        "median_ratio_to_bare": {
            name: round(statistics.median(one.ratio(name) for one in rounds), 4) for name in SIDES
        },
        "rounds": [asdict(one)["rates"] for one in rounds],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batch", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--bundle", type=Path, default=Path("bundles/mini"))
    parser.add_argument("--pictures", type=int, default=96, help="of each side in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, help="of an engine; default: all cores")
    parser.add_argument("--out", type=Path, help="write the result there too")
    parser.add_argument("--bare", action="store_true", help="the bare side alone, its rate")
    options = parser.parse_args(arguments)

    def work() -> None:
        at_least(options, dict.fromkeys(("pictures", "rounds", "batch", "threads"), 1))
        sides = (options.bundle, options.pictures, options.rounds, options.batch, options.threads)
        if options.bare:
            print(bare(options.bundle, lesions(options.pictures), options.batch, options.threads))
            return
        found = report(measure(*sides))
        result = {
            "command": "python -m benchmarks.batch",
            "bundle": str(options.bundle), "pictures": options.pictures, "batch": options.batch,
            "threads": options.threads, **found, "environment": environment(),
        }  # fmt: skip
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            files.write(options.out, (json.dumps(result, indent=2) + "\n").encode())
        print(json.dumps(result))

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
