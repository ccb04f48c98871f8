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
_HEAD: Final = """# Speed

Made by `python -m benchmarks.report` from `{folder}`; do not edit it, measure again. Ratios are
medians of ratios within a round, in which all sides took turns, with their 95 % interval. The floor
is the work's operations over the best rate of a large product of matrices on that machine in the
row's precision, or its bytes over the bandwidth of memory; a share of it over 100 % means that less
work was done. Lossy rows give up exactness for speed and are labelled in what they make.
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
    for name, why in left_out.items():
        print(f"left out {name}: {why}", file=sys.stderr)
    if not results:
        raise DermaFluxError(
            f"{settings.results} has no result that can be reported; measure one first: "
            "python -m benchmarks.suite --quick --out benchmarks/results/suite.json"
        )
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    plots: dict[str, list[tuple[str, Path]]] = {}
    if not settings.no_plots:
        plots = plotted(results, settings.out)
    text = written(results, plots, settings.results)
    files.write(settings.out, text.encode())
    print(
        json.dumps(
            {
                "benchmark": "report",
                "out": str(settings.out),
                "read": [str(one.file) for one in results],
                "left_out": left_out,
                "plots": [str(path) for each in plots.values() for _, path in each],
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
        except ValueError as error:
            left_out[file.name] = f"it is no JSON: {error}"
            continue
        kind = content.get("benchmark") if isinstance(content, dict) else None
        if kind not in KINDS:
            left_out[file.name] = f"no table is made of {kind or 'it'}"
        else:
            found.append(Result(file, content))
    return sorted(found, key=lambda one: KINDS.index(one.kind)), left_out


def plotted(results: Sequence[Result], out: Path) -> dict[str, list[tuple[str, Path]]]:
    """Plots of all results, by the name of their file: what each shows, and where it is.

    Raises:
        DermaFluxError: matplotlib is not installed.
    """
    try:
        from benchmarks import report_plots
    except ImportError as error:
        raise DermaFluxError(
            f"plots need matplotlib ({error}); pip install 'dermaflux[benchmarks]', or --no-plots"
        ) from error
    found: dict[str, list[tuple[str, Path]]] = {}
    for one in results:
        for name, words, data in report_plots.plots(one.kind, one.content):
            path = out.with_name(f"{out.stem}_{one.file.stem}_{name}.png")
            files.write(path, data)
            found.setdefault(one.file.name, []).append((words, path))
    return found


def written(
    results: Sequence[Result], plots: Mapping[str, Sequence[tuple[str, Path]]], folder: Path
) -> str:
    """The whole report in Markdown."""
    pieces = [_HEAD.format(folder=folder)]
    for one in results:
        body = report_tables.tables(one.kind, one.content)
        pictures = "\n\n".join(f"![{words}]({path.name})" for words, path in
                               plots.get(one.file.name, ()))  # fmt: skip
        machine = machine_line(one.content)
        title = report_tables.TITLES[one.kind]
        part = "**This run was stopped: it is not whole.**" if one.content.get("unfinished") else ""
        parts = (f"## {title} (`{one.file.name}`)", machine, part, pictures, body)
        pieces.append("\n\n".join(part for part in parts if part))
    return "\n\n".join(pieces).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
