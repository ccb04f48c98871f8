"""The whole comparison in one run: ladders of generation, classification and batches, and goals.

    python -m benchmarks.suite --quick
    python -m benchmarks.suite --bundle bundles/mini --checkpoint models/mini \\
        --classifier-bundle bundles/b16 --out benchmarks/results/suite_cpu.json

What a user would pick instead is measured in the same rounds as ours, on the same weights, prompts,
noise, steps, guidance, text length and threads (`benchmarks.rivals`); each row is one technique
with its ratio to the first and to the row before, both with an interval, the floor and the share of
it that is reached, how like the first one's its pictures are, and evidence of what ran. `--out` is
written after every section, so a run that is stopped keeps what it has. `--quick` leaves out what
is compiled, takes smaller batches and few rounds: three minutes instead of twenty-five.

`goals` says which were met. A side that drew another picture than the first one ends the command
with status 1, and so does a missed goal with `--fail-on-goals`. Progress and tables go to stderr;
the last line of stdout is one JSON object. `python -m benchmarks.report` makes tables of it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import ladder_classification as judging
from benchmarks import ladder_generation as drawing
from benchmarks.floors import Limits
from benchmarks.ladder import Alike, Effort, Ladder, climb, table
from benchmarks.ladder_batches import SIZES, batches
from benchmarks.machine import before_measuring, load
from benchmarks.others import quiet, told
from benchmarks.results_file import finish, keep, require_place
from benchmarks.rivals.task import Task
from benchmarks.suite_goals import goals_of
from benchmarks.variants import same_model
from dermaflux.bundle import Bundle
from dermaflux.command import at_least, ended, option, parsed
from dermaflux.engines import usable_cores
from dermaflux.errors import BundleError, DermaFluxError

SECTIONS: Final = ("generation", "classification", "classification_other", "batches")


@dataclass(frozen=True)
class Settings:
    """The command line of `benchmarks.suite`."""

    bundle: Path = option("the bundle's folder", Path("bundles/mini"))
    checkpoint: Path = option("the weights that it was exported from", Path("models/mini"))
    classifier_bundle: Path | None = option("one more bundle, to measure its classifier", None)
    classifier_checkpoint: Path | None = option(
        "the weights of that one; default: runs/ and its name", None
    )
    sections: tuple[str, ...] = option(f"comma-separated, of {', '.join(SECTIONS)}", SECTIONS)
    rounds: int = option("of each ladder at most; fewer where one takes long", 30)
    batch: int = option("pictures that are classified at once", 8)
    steps: int | None = option("default: the bundle's", None)
    threads: int | None = option("of every side; default: all cores", None)
    quick: bool = option("three minutes: nothing compiled, small batches, few rounds", False)
    fail_on_goals: bool = option("status 1 where a goal was missed", False)
    out: Path | None = option("write the result there too, after every section", None)


@dataclass(frozen=True)
class Section:
    """A ladder to be opened and climbed; `about` is told beside its rows."""

    opened: AbstractContextManager[Ladder]
    alike: Alike
    seconds: float
    about: Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the result is the last line of stdout."""
    settings = parsed(Settings, "python -m benchmarks.suite", __doc__ or "", arguments)
    words = sys.argv[1:] if arguments is None else arguments
    return ended(lambda: run(settings, words))


def run(settings: Settings, words: Sequence[str]) -> int:
    """What the command does; the exit status.

    Raises:
        DermaFluxError: an option is out of range, or there is nothing to compare with.
    """
    at_least(settings, dict.fromkeys(("rounds", "batch", "threads", "steps"), 1))
    unknown = [name for name in settings.sections if name not in SECTIONS]
    if unknown or not settings.sections:
        raise DermaFluxError(
            f"--sections {','.join(unknown)} is not known; use {', '.join(SECTIONS)}"
        )
    require_place(settings.out)
    bundle = Bundle.open(settings.bundle)
    same_model(bundle, settings.checkpoint)
    task = Task.of(bundle, settings.steps)
    began = time.perf_counter()
    before = before_measuring()
    alone = quiet(before) is not False
    if not alone:
        print(f"not a quiet machine: {told(before)}. Torch with a thread a core suffers most from "
              "that, so ratios to it are too large", file=sys.stderr)  # fmt: skip
    threads = settings.threads or usable_cores()
    limits = Limits.measured()
    result: dict[str, Any] = {
        "environment": before,
        "quick": settings.quick,
        "quiet_machine": alone,
        "threads": threads,
        "task": task.told(),
        "machine_limits": limits.told(),
        "sections": {},
    }
    sections = plan(settings, bundle, task, limits, threads)
    if not sections:
        raise DermaFluxError(
            f"nothing of --sections {','.join(settings.sections)} can be measured: {bundle.path} "
            "has no classifier, or no --classifier-bundle was given"
        )
    for name, section in sections.items():
        print(f"section {name}", file=sys.stderr)
        started = time.perf_counter()
        with section.opened as ladder:
            ladder.try_out()
            rounds = min(settings.rounds, 8) if settings.quick else settings.rounds
            rows = climb(ladder.rungs, Effort(rounds, section.seconds), ladder.floor, section.alike)
        print(table(rows), file=sys.stderr)
        for side, why in ladder.left_out.items():
            print(f"left out {side}: {why}", file=sys.stderr)
        result["sections"][name] = {
            **section.about,
            "rows": rows,
            "left_out": ladder.left_out,
            "took_s": round(time.perf_counter() - started, 1),
            "load_after": load(),
        }
        result["goals"] = goals_of(result["sections"])
        result["took_s"] = round(time.perf_counter() - began, 1)
        keep("suite", result, settings.out)
    for goal in result["goals"]:
        print(
            f"{goal['goal']}: {goal['value']} {'met' if goal['met'] else 'MISSED'}", file=sys.stderr
        )
    finish("suite", result, words, settings.out, bundle)
    rows = [row for one in result["sections"].values() for row in one["rows"]]
    wrong = [row["name"] for row in rows if row["wrong"]]
    if wrong:
        print(f"error: {', '.join(wrong)} made something else than was asked", file=sys.stderr)
    missed = settings.fail_on_goals and any(not goal["met"] for goal in result["goals"])
    return int(bool(wrong) or missed)


def plan(
    settings: Settings, bundle: Bundle, task: Task, limits: Limits, threads: int
) -> dict[str, Section]:
    """The sections that were asked for and can be had, in order. None is opened yet.

    Raises:
        BundleError: a bundle or a checkpoint is not there or of another model.
    """
    quick = settings.quick
    without = ("diffusers compiled", judging.COMPILED) if quick else ()
    found: dict[str, Section] = {}
    if "generation" in settings.sections:
        options = drawing.Options(threads, settings.rounds, without)
        opened = drawing.generation(bundle, settings.checkpoint, task, limits, options)
        found["generation"] = Section(opened, drawing.alike, 40 if quick else 240, task.told())
    judged = [("classification", bundle, settings.checkpoint)]
    if settings.classifier_bundle is not None:
        other = Bundle.open(settings.classifier_bundle)
        weights = settings.classifier_checkpoint or Path("runs") / other.name
        judged.append(("classification_other", other, weights))
    for name, one, weights in judged:
        if name not in settings.sections or one.classifier is None:
            continue
        big = name == "classification_other"
        batch = min(settings.batch, 4) if quick and big else settings.batch
        choice = judging.Options(threads, batch, without)
        found[name] = Section(
            judging.judged(one, weights, limits, choice), judging.same_answers,
            (30 if quick else 240) if big else (10 if quick else 60),
            {"bundle": one.name, "bundle_id": one.id, "architecture": architecture(weights),
             "batch": batch},
        )  # fmt: skip
    if "batches" in settings.sections:
        sizes = (1, 4) if quick else SIZES
        opened = batches(bundle, settings.checkpoint, task, limits, threads, sizes)
        found["batches"] = Section(opened, drawing.alike, 25 if quick else 150, task.told())
    return found


def architecture(checkpoint: Path) -> str:
    """timm's name of a checkpoint's classifier.

    Raises:
        BundleError: there is none.
    """
    file = checkpoint / "classifier/config.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["architecture"])
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(
            f"{file} names no architecture ({error}); name the checkpoint that the classifier's "
            "bundle was exported from with --classifier-checkpoint"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
