"""Results as plots: PNG of some tens of kB, in colours that everyone can tell apart.

>>> for name, words, data in plots("growth", result):
...     Path(f"{name}.png").write_bytes(data)

Colours are Okabe and Ito's (2008); lossy rows are hatched as well, curves have marks of their own.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any, Final

from matplotlib.figure import Figure

from benchmarks.report_ladders import SECTIONS
from benchmarks.suite_goals import GENERATION, INT8, PRUNED

BLUE: Final = "#0072B2"
ORANGE: Final = "#E69F00"
GREEN: Final = "#009E73"
RED: Final = "#D55E00"
SKY: Final = "#56B4E9"
PINK: Final = "#CC79A7"
GREY: Final = "#999999"
_STAGES: Final = {"text": PINK, "denoise": BLUE, "decode": ORANGE, "png": GREEN}
_DPI: Final = 110
_UNITS: Final = {
    "steps": "steps", "pixels": "pixels of a picture", "batch": "pictures at once",
    "threads": "threads",
}  # fmt: skip
Result = Mapping[str, Any]
Plot = tuple[str, str, bytes]


def plots(kind: str, result: Result) -> Iterator[Plot]:
    """Name, description and PNG of every plot of a result."""
    match kind:
        case "suite":
            for name, section in result.get("sections", {}).items():
                words = f"{SECTIONS.get(name, name)}: times the first row, with intervals"
                yield name, words, ladder(name, section)
            if "generation" in result.get("sections", {}):
                rows = result["sections"]["generation"]["rows"]
                yield "stages", "Where the time of one picture goes, by stage", stages(rows)
        case "growth":
            yield (
                "curves",
                "Cost of one picture as steps, pixels, batch and cores grow",
                growth(result),
            )
        case "cold_start":
            found = [kind for kind in result["medians"] if "by stage" in kind]
            if found:
                yield "stages", "The first answer after the start, by stage", cold_start(result)
        case "http_classify":
            yield "rates", "Photographs classified a second over HTTP", http(result)
        case "gpu":
            if any("median_s" in row for row in result["rows"].values()):
                yield "seconds", "Seconds of one image, floors and goals", gpu(result)
        case _:
            return


def ladder(name: str, section: Result) -> bytes:
    """Bars of the ratio to the first row, with intervals, and the goals as lines."""
    rows = section["rows"]
    figure, axes = _figure(7.5, 1.2 + 0.36 * len(rows))
    for place, row in enumerate(rows):
        times = row["times_baseline"]
        colour = BLUE if row["ours"] else ORANGE
        axes.barh(place, times["median"], color=colour, height=0.7,
                  hatch="///" if row["lossy"] else None, edgecolor="white")  # fmt: skip
        error = [[times["median"] - times["low"]], [times["high"] - times["median"]]]
        axes.errorbar(times["median"], place, xerr=error, color="black", capsize=3, linewidth=1)
        axes.annotate(f"{times['median']:.2f}", (times["high"], place), (5, 0), va="center",
                      textcoords="offset points", fontsize=8)  # fmt: skip
    for goal in _goals_of(name, section):
        axes.axvline(goal, color=RED, linestyle="--", linewidth=1)
        axes.annotate(f"goal {goal:g}", (goal, -0.8), (3, 0), color=RED, fontsize=8,
                      textcoords="offset points")  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(
        range(len(rows)), [row["name"] + (" (lossy)" if row["lossy"] else "") for row in rows]
    )
    axes.set_ylim(len(rows) - 0.4, -1.1)
    axes.set_xlim(0, 1.12 * max(*(row["times_baseline"]["high"] for row in rows),
                                *_goals_of(name, section), 1.0))  # fmt: skip
    axes.set_xlabel(f"times {rows[0]['name']} (blue: ours, orange: others; lines: 95 % interval)")
    axes.set_title(
        SECTIONS.get(name, name)
        + (f", {section['architecture']}" if "architecture" in section else "")
    )
    return _png(figure)


def _goals_of(name: str, section: Result) -> tuple[float, ...]:
    if name == "generation":
        return (GENERATION,)
    if section.get("architecture") == "vit_base_patch16_224":
        return (INT8, PRUNED)
    return ()


def stages(rows: Any) -> bytes:
    """One bar a row, its stages after each other."""
    figure, axes = _figure(7.5, 1.4 + 0.36 * len(rows))
    for place, row in enumerate(rows):
        left = 0.0
        for stage, colour in _STAGES.items():
            width = row["stages_ms"].get(stage, 0.0)
            axes.barh(place, width, left=left, color=colour, height=0.7, edgecolor="white",
                      label=stage if place == 0 else None)  # fmt: skip
            left += width
        if "floor" in row:
            axes.plot([row["floor"]["ms"]] * 2, [place - 0.4, place + 0.4], color="black",
                      linewidth=1.5, label="floor" if place == 0 else None)  # fmt: skip
        axes.annotate(f"{left:.0f}", (left, place), (4, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of one picture, medians")
    axes.margins(x=0.08)
    axes.legend(fontsize=8, loc="lower right")
    axes.set_title("Where the time goes")
    return _png(figure)


def growth(result: Result) -> bytes:
    """A panel an axis, in logarithms; cores as a speed-up."""
    found = result["axes"]
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), dpi=_DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(found):]:  # fmt: skip
        panel.set_visible(False)
    for panel, (axis, one) in zip(panels, found.items(), strict=False):
        points = one["points"]
        x = [point["x"] for point in points]
        if axis == "threads":
            _speed_up(panel, points)
        else:
            exponents = one.get("exponents", {})
            curves = (
                ("theirs_ms", result["theirs"], ORANGE, "s-"),
                ("ours_ms", result["ours"], BLUE, "o-"),
                ("floor_ms", "our floor", "black", ":"),
            )
            for key, label, colour, style in curves:
                if all(point.get(key) for point in points):
                    power = f" (power {exponents[key]:.2f})" if key in exponents else ""
                    panel.plot(x, [point[key] for point in points], style, color=colour,
                               label=label + power, markersize=4, linewidth=1.3)  # fmt: skip
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_ylabel("ms of one picture")
            panel.xaxis.set_minor_formatter("")
        panel.set_xticks(
            x, [f"{value:,}" if axis != "pixels" else f"{round(value**0.5)}²" for value in x]
        )
        panel.set_xlabel(_UNITS.get(axis, axis))
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        panel.legend(fontsize=7)
    return _png(figure)


def _speed_up(panel: Any, points: Any) -> None:
    x = [point["x"] for point in points]
    for key, colour, style in (("theirs_ms", ORANGE, "s-"), ("ours_ms", BLUE, "o-")):
        first = points[0][key]
        panel.plot(x, [first / point[key] for point in points], style, color=colour,
                   label=key.removesuffix("_ms"), markersize=4)  # fmt: skip
    panel.plot(x, [value / x[0] for value in x], ":", color="black", label="in proportion")
    panel.set_ylabel("times as fast as on one")


def cold_start(result: Result) -> bytes:
    """Starts by stage, in seconds."""
    kinds = {k: v for k, v in result["medians"].items() if "by stage" in k}
    colours = (BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY)
    figure, axes = _figure(7.5, 1.6 + 0.55 * len(kinds))
    names = [name for name in dict.fromkeys(n for one in kinds.values() for n in one)
             if name.removesuffix("_s") not in ("total", "cpu", "written", "wall")]  # fmt: skip
    for place, spent in enumerate(kinds.values()):
        left = 0.0
        for number, name in enumerate(names):
            width = spent.get(name, 0.0)
            label = name.removesuffix("_s").replace("_", " ") if place == 0 else None
            axes.barh(place, width, left=left, color=colours[number % len(colours)], height=0.6,
                      hatch="//" if number >= len(colours) else None, edgecolor="white",
                      label=label)  # fmt: skip
            left += width
        axes.annotate(f"{left:.2f} s", (left, place), (4, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.axvline(result["goal_s"], color=RED, linestyle="--", linewidth=1, label="goal")
    axes.set_yticks(range(len(kinds)), [kind.removesuffix(", by stage") for kind in kinds])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds from the start of the process")
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    return _png(figure)


def http(result: Result) -> bytes:
    """Rates of all sides."""
    sides = {
        name + " (lossy)" * bool(one.get("lossy")): one["images_per_s"]
        for name, one in result["sides"].items()
        if one.get("images_per_s") is not None
    }
    figure, axes = _figure(7.5, 1.2 + 0.4 * len(sides))
    for place, (name, rate) in enumerate(sides.items()):
        ours = "ours" in name or "dermaflux" in name.lower() or "process" in name
        axes.barh(place, rate, color=BLUE if ours else ORANGE, height=0.7)
        axes.annotate(f"{rate:.1f}", (rate, place), (4, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(sides)), list(sides))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("photographs a second, medians of rounds")
    return _png(figure)


def gpu(result: Result) -> bytes:
    """Seconds an image of every row, with floors and goals."""
    rows = {name: row for name, row in result["rows"].items() if "median_s" in row}
    figure, axes = _figure(7.5, 1.4 + 0.36 * len(rows))
    for place, (name, row) in enumerate(rows.items()):
        axes.barh(place, row["median_s"], color=ORANGE if "diffusers" in name else BLUE, height=0.7)
        marks = (("floor_s", "black", "-"), ("goal_s", RED, "--"))
        for key, colour, style in marks:
            if row.get(key) is not None:
                axes.plot([row[key]] * 2, [place - 0.45, place + 0.45], style, color=colour)
        axes.annotate(f"{row['median_s']:.3g}", (row["median_s"], place), (4, 0),
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds an image (black line: floor; red: goal)")
    if not result.get("gpu_figure"):
        axes.set_title("NOT A GPU FIGURE: a CPU at a reduced shape", color=RED)
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    # Without the version of the program: equal results give equal files.
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
