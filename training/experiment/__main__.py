"""The paper's experiment: do synthetic lesions beside real ones make a better classifier?

    python -m training.experiment docs/experiment.yaml --out runs/experiment --leave-out
    python -m training.experiment docs/experiment.yaml --out runs/experiment --list
    python -m training.experiment --report runs/experiment --out docs/experiment.md
    python -m training.experiment docs/experiment.yaml --subset 500 --out runs/subset500

A grid of real pictures x synthetic ones for each x seeds, by arm (`training.experiment.config`),
every run with the same number of optimizer steps, on a test that nothing has seen. It goes on where
it was stopped; more sizes, ratios, seeds or arms add runs to those that are there.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermaflux.command import ended, option, parsed
from dermaflux.errors import DatasetError
from training.experiment.config import Config
from training.experiment.key import Only


@dataclass(frozen=True)
class Settings:
    """What the command is told."""

    out: Path = option(
        "folder of runs, the report's file (.md) or the subset's folder", position=False
    )
    config: Path | None = option("YAML file of the experiment", None, position=True)
    only: str = option("runs to make, as arm=added,size=500; a field twice: either value", "")
    leave_out: bool = option(
        "take pictures that were seen in training out of the tests, and generated ones that are a "
        "test's out of what is learnt",
        False,
    )
    processes: int = option("runs at a time, each with one thread", 1)
    list: bool = option("say what would be run, and run nothing", False)
    report: Path | None = option("write the report of the runs in this folder", None)
    subset: int | None = option("write the real subset of this size as a dataset", None)


def work(settings: Settings, command: str = "") -> int:
    """Do what is asked; the last line on stdout is JSON. `command` is written into the report."""
    if settings.report is not None:
        from training.experiment.report import write

        print(json.dumps(write(settings.report, settings.out)))
        return 0
    if settings.config is None:
        raise DatasetError("give the experiment's YAML file, or --report FOLDER")
    config = Config.read(settings.config)
    if settings.subset is not None:
        from training.experiment.subset import write_subset

        print(json.dumps(write_subset(config, settings.subset, settings.out)))
        return 0
    if settings.processes < 1:
        raise DatasetError(f"--processes {settings.processes}: 1 or more")
    only = Only.parsed(settings.only)
    if settings.list:
        print(json.dumps(_listed(config, only, settings)))
        return 0
    # A worker has one thread for its arithmetic, whatever library does it.
    if settings.processes > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    from training.experiment.run import run

    made = run(
        config, settings.out, only, leave_out=settings.leave_out,
        processes=settings.processes, command=command,
    )  # fmt: skip
    print(
        json.dumps(
            {"out": str(settings.out), "done": made.done, "made": made.made, "failed": made.failed}
        )
    )
    return 1 if made.failed else 0


def _listed(config: Config, only: Only, settings: Settings) -> dict[str, Any]:
    from training.experiment.plan import plan
    from training.experiment.run import as_recorded
    from training.experiment.sets import Sets

    # To look for copies of tests again takes minutes: those that were found are known.
    sets = as_recorded(Sets.read(config), settings.out)
    asked = plan(config, sets, settings.out, only)
    missing = set(asked.missing)
    for key in asked.wanted:
        print("to do" if key in missing else "done ", key.file)
    return {
        "runs": len(asked.wanted), "done": len(asked.wanted) - len(missing),
        "hours": round(asked.hours / settings.processes, 2), "of_unknown_time": asked.unknown,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    settings = parsed(Settings, "python -m training.experiment", __doc__ or "", arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "training.experiment", *given])
    return ended(
        lambda: work(settings, command),
        "stopped; what was done is kept: the same command goes on with it",
    )


if __name__ == "__main__":
    sys.exit(main())
