"""Results to tables and plots: every figure of `docs/speed.md` comes from a file of results.

    python -m benchmarks.report benchmarks/results --out docs/speed.md

Reads what the commands of this folder wrote with `--out` (suite, growth, latency, quality,
cold_start, http_classify, gpu), and makes Markdown with the machine's line above each table, since
figures of two machines say nothing beside each other, and plots beside it, named after it. A run
that was stopped is shown as far as it came, and says so. Results of other commands and damaged
files are named on stderr and left out. The last line of stdout is one JSON object: what was read
and written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import report_tables
from benchmarks.report_markdown import machine_line
from dermaflux import files
from dermaflux.command import ended, option, parsed
from dermaflux.errors import DermaFluxError

KINDS: Final = ("suite", "growth", "latency", "quality", "cold_start", "http_classify", "gpu")
"""Benchmarks that are reported, in the order of the report."""
_DAMAGED: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a table or a plot of a result ends with that lacks something, or has it of another kind."""
_HEAD: Final = """# Speed

Made by `python -m benchmarks.report` from `{folder}`; do not edit it, measure again. Ratios are
medians of ratios within a round, in which all sides took turns, with their 95 % interval (of fewer
than six rounds it is their range). The floor is the work's operations over the best rate of a large
product of matrices on that machine in the row's precision, or its bytes over the bandwidth of
memory; a share of it over 100 % means that less work was done. Lossy rows give up exactness for
speed and are labelled in what they make.
"""


@dataclass(frozen=True)
class Settings:
    """The command line of `benchmarks.report`."""

    results: Path = option("folder with results, or one of them", Path("benchmarks/results"),
                           position=True)  # fmt: skip
    out: Path = option("Markdown to write; plots go beside it", Path("docs/speed.md"))
    no_plots: bool = option("tables alone, without matplotlib", False)


@dataclass(frozen=True)
class Result:
    """What a file of results holds, and where it was."""

    file: Path
    content: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.content["benchmark"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, write; what was done is the last line of stdout."""
    settings = parsed(Settings, "python -m benchmarks.report", __doc__ or "", arguments)
    return ended(lambda: run(settings))


def run(settings: Settings) -> None:
    """What the command does.

    Raises:
        DermaFluxError: there is no result that can be reported.
    """
    results, left_out = read(settings.results)
    parts: list[str] = []
    plots: dict[Path, bytes] = {}
    whole: list[Result] = []
    for one in results:
        try:
            drawn = {} if settings.no_plots else plotted(one, settings.out)
            parts.append(part(one, {path.name: words for path, (words, _) in drawn.items()}))
        except _DAMAGED as error:
            why = f"{type(error).__name__} {error}"
            left_out[one.file.name] = f"it is not what benchmarks.{one.kind} writes: {why}"
            continue
        whole.append(one)
        plots |= {path: data for path, (_, data) in drawn.items()}
    for name, why in left_out.items():
        print(f"left out {name}: {why}", file=sys.stderr)
    if not whole:
        raise DermaFluxError(
            f"{settings.results} has no result that can be reported; measure one first: "
            "python -m benchmarks.suite --quick --out benchmarks/results/suite.json"
        )
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    for path, data in plots.items():
        files.write(path, data)
    text = "\n\n".join([_HEAD.format(folder=settings.results), *parts]).rstrip() + "\n"
    files.write(settings.out, text.encode())
    print(
        json.dumps(
            {
                "benchmark": "report",
                "out": str(settings.out),
                "read": [str(one.file) for one in whole],
                "left_out": left_out,
                "plots": [str(path) for path in plots],
            }
        )
    )


def read(place: Path) -> tuple[list[Result], dict[str, str]]:
    """The results of a folder in the report's order, and files that are none, each with why.

    Raises:
        DermaFluxError: there is no such folder.
    """
    if not place.exists():
        raise DermaFluxError(f"{place} is not there; name a folder of results")
    found: list[Result] = []
    left_out: dict[str, str] = {}
    for file in sorted(place.glob("*.json")) if place.is_dir() else [place]:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            left_out[file.name] = f"it is no JSON: {error}"
            continue
        kind = content.get("benchmark") if isinstance(content, dict) else None
        if kind not in KINDS:
            left_out[file.name] = f"no table is made of {kind or 'it'}"
        else:
            found.append(Result(file, content))
    return sorted(found, key=lambda one: KINDS.index(one.kind)), left_out


def plotted(one: Result, out: Path) -> dict[Path, tuple[str, bytes]]:
    """Its plots, by where they are to be: what each shows, and the PNG.

    Raises:
        DermaFluxError: matplotlib is not installed.
    """
    try:
        from benchmarks import report_plots
    except ImportError as error:
        raise DermaFluxError(
            f"plots need matplotlib ({error}); pip install 'dermaflux[benchmarks]', or --no-plots"
        ) from error
    return {
        out.with_name(f"{out.stem}_{one.file.stem}_{name}.png"): (words, data)
        for name, words, data in report_plots.plots(one.kind, one.content)
    }


def part(one: Result, plots: Mapping[str, str]) -> str:
    """Its part of the report in Markdown; `plots` are names of files, and what they show."""
    title = report_tables.TITLES[one.kind]
    stopped = one.content.get("unfinished") or one.content.get("stopped")
    pieces = (
        f"## {title} (`{one.file.name}`)",
        machine_line(one.content),
        "**This run was stopped: it is not whole.**" if stopped else "",
        "\n\n".join(f"![{words}]({name})" for name, words in plots.items()),
        report_tables.tables(one.kind, one.content),
    )
    return "\n\n".join(piece for piece in pieces if piece)


if __name__ == "__main__":
    sys.exit(main())
