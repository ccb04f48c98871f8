"""Classification over HTTP: our service beside LitServe and FastAPI with the same model in torch.

    python -m benchmarks.classifiers vit_base_patch16_224 --out runs/b16
    python -m export runs/b16 --out bundles/b16 --prompts 8
    python -m benchmarks.http_classify --bundle bundles/b16 --checkpoint runs/b16 \\
        --precision int8,int8-pruned

`--precision` and `--tier` name several of ours, each a service of its own beside the same rivals
and held to the same goals; without them it is what the service takes by itself. Lossy ones, which
do less work than the model has, are named so.

Each side is started as its users start it and measured alone, one after the other: on a machine of
few cores they would take them from each other. They take turns over rounds, and speed is a ratio
within a round. Of each rival several settings are tried in the first round; the best is its side
from then on. Beside them stands what the bundle's classifier does in a process of its own without
any service (`benchmarks.classify_rate`), in the same rounds.

A closed loop of callers gives images a second (a caller's own rate over its whole requests, added
up: batches that end just before or after a moment make no difference). An open loop of Poisson
arrivals at half of that gives what a caller waits. The load generator runs on the same machine, and
takes its share of it from every side alike.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import machine, measuring, results_file
from benchmarks.classify_rate import photographs
from benchmarks.http_contenders import PACKAGES, contenders, interpreter_of, versions
from benchmarks.http_figures import goals, same_answers, table
from benchmarks.http_ours import kinds
from benchmarks.http_rounds import Rounds
from dermaflux.bundle import Bundle
from dermaflux.command import at_least, ended, option, parsed
from dermaflux.errors import BundleError, DermaFluxError


@dataclass(frozen=True)
class Settings:
    """The command line of `benchmarks.http_classify`."""

    bundle: Path = option("bundle with a classifier", Path("bundles/mini"))
    checkpoint: Path | None = option("its checkpoint, for the rivals; without: ours alone", None)
    images: Path | None = option("folder of photographs, instead of drawn ones", None)
    rounds: int = option("turns of every side", 3)
    callers: tuple[str, ...] = option("of the closed loop; the last decides", ("1", "4", "8", "16"))
    seconds: float = option("of a closed loop at the most callers", 8.0)
    few_seconds: float = option("of a closed loop at fewer callers, which is run once", 4.0)
    open_seconds: float = option("of the open loop, which is run once; 0: none", 20.0)
    warm_up: float = option("seconds before each of them, which do not count", 2.0)
    engine: str | None = option("force one engine of ours", None)
    precision: tuple[str, ...] = option(
        "of ours; several: a service of each; default: the fastest that is not lossy", ()
    )
    tier: tuple[str, ...] = option("of ours, likewise, beside --precision", ())
    port: int | None = option("to serve on; default: a free one", None)
    rivals_python: Path | None = option(
        "interpreter that has litserve and fastapi; default: that of .venv-rivals, or this one",
        None,
    )
    seed: int = option("of drawn photographs and of arrivals", 0)
    out: Path | None = option("write the result there too", None)


_LEAST: Final = {
    "rounds": 1, "seconds": 0.1, "few_seconds": 0, "open_seconds": 0, "warm_up": 0, "port": 1,
}  # fmt: skip


def levels(callers: Sequence[str]) -> list[int]:
    """Numbers of callers, ascending.

    Raises:
        DermaFluxError: one is no number, or out of range.
    """
    found = []
    for text in callers:
        if not text.isdecimal() or not 1 <= int(text) <= 1000:
            raise DermaFluxError(f"--callers {text} is no number of callers; use 1 to 1000")
        found.append(int(text))
    if not found:
        raise DermaFluxError("--callers names none; use numbers such as 1,4,8,16")
    return sorted(set(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    assert __doc__ is not None
    words = "python -m benchmarks.http_classify"
    settings = parsed(Settings, words, __doc__.split("\n\n")[0], arguments)
    return ended(lambda: run(settings, list(sys.argv[1:] if arguments is None else arguments)))


def run(settings: Settings, words: Sequence[str]) -> None:
    """Measure, and print the result as one line of JSON.

    Raises:
        DermaFluxError: a setting is out of range, or a side cannot be started.
        BundleError: the bundle cannot be opened or has no classifier.
    """
    at_least(settings, _LEAST)
    counts = levels(settings.callers)
    results_file.require_place(settings.out)
    bundle = Bundle.open(settings.bundle)
    if bundle.classifier is None:
        raise BundleError(
            f"the bundle {bundle.name} has no classifier; add one to the checkpoint (classifier/) "
            "and export again"
        )
    ours = kinds(settings, bundle)
    environment = machine.before_measuring()
    families, left_out = contenders(settings, ours)
    for reason in left_out.values():
        print(f"left out: {reason}", file=sys.stderr)
    files = photographs(settings.images, settings.seed)
    with tempfile.TemporaryDirectory(prefix="dermaflux-http-") as folder:
        rounds = Rounds(settings, counts, families, ours, files, Path(folder))
        for number in range(settings.rounds):
            for name in measuring.turn(rounds.names, number):
                asyncio.run(rounds.turn(name, number))
    sides = table(rounds.found, rounds.alone, ours, counts)
    result = {
        "environment": environment,
        "photographs": {
            "source": "drawn" if settings.images is None else "a folder",
            "count": len(files),
            "mean_bytes": round(sum(len(data) for data, _ in files) / len(files)),
        },
        "rounds": settings.rounds,
        "sides": sides,
        "left_out": left_out,
        "rival_versions": versions(interpreter_of(settings), PACKAGES)
        if len(families) > len(ours)
        else {},
        "answers": same_answers(rounds, ours),
        **goals(rounds, ours, counts[-1]),
    }
    for one in result["goals"]:
        state = {True: "met", False: "missed", None: "not measured"}[one["met"]]
        print(f"{state}: {one['goal']}: {one['found']}", file=sys.stderr)
    results_file.finish("http_classify", result, words, settings.out, bundle)


if __name__ == "__main__":
    sys.exit(main())
