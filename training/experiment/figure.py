"""The report's picture, in the layout of the paper's figure: ratio to the right, a line a size.

    >>> draw(Results.read(Path("runs/experiment")), Path("docs/experiment.png"))

A panel a model, generator and test. Points are means over seeds, bars their standard deviation. The
colours can be told apart by people who are colour-blind (Okabe and Ito, 2008), and lines differ by
their strokes and marks as well.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dermaflux import files
from training.experiment.config import ADDED, CLASSIC, ONLY, REAL
from training.experiment.key import Key
from training.experiment.results import Results, View
from training.experiment.tables import ratios, sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS: Final = ("o", "s", "^", "D", "v", "P", "X")
_STROKES: Final = ("-", "--", "-.", ":")
_STYLE: Final[Any] = {
    "font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10, "legend.fontsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans",
}  # fmt: skip
_DOTS: Final = 160
_PANEL: Final = (4.6, 3.4)  # inches


def draw(results: Results, file: Path) -> None:
    """Write the PNG.

    Raises:
        OSError: the folder takes no files.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(view, "auc") for view in results.views()]
    panels.insert(1, (panels[0][0], "accuracy"))
    models = list(dict.fromkeys(cell.model for cell in results.cells))
    rows = [
        (model, generator)
        for model in models
        for generator in dict.fromkeys(
            cell.generator for cell in results.cells if cell.arm in (ADDED, ONLY)
        )
    ] or [(model, "") for model in models]
    with matplotlib.rc_context(_STYLE):
        wide, high = _PANEL[0] * len(panels), _PANEL[1] * len(rows) + 0.7
        figure = Figure(figsize=(wide, high), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(rows), len(panels), squeeze=False)
        for column, (view, measure) in enumerate(panels):
            # One scale for all generators: panels of a column are there to be compared.
            lows, highs = [], []
            for row, (model, generator) in enumerate(rows):
                _panel(grid[row, column], results, model, generator, view, measure)
                low, high = grid[row, column].get_ylim()
                lows.append(low)
                highs.append(high)
            for row in range(len(rows)):
                grid[row, column].set_ylim(min(lows), max(highs))
        entries: dict[str, Any] = {}
        for axes in grid.flat:
            handles, labels = axes.get_legend_handles_labels()
            entries |= {label: h for h, label in zip(handles, labels, strict=True)}
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower center",
            ncols=min(5, max(1, len(entries))), frameon=False,
        )  # fmt: skip
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=_DOTS)
    files.write(file, stream.getvalue())


def _panel(
    axes: Axes, results: Results, model: str, generator: str, view: View, measure: str
) -> None:
    columns = ratios(results)
    # Sizes keep their colour in every panel, whether a generator was tried with them or not.
    listed = sizes(results, model, (REAL, ADDED, ONLY, CLASSIC))
    for number, size in enumerate(listed):
        # A little to the side, so that no bar hides another's.
        aside = 0.015 * max([1.0, *columns]) * (number - (len(listed) - 1) / 2)
        colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
        stroke = _STROKES[number % len(_STROKES)]
        real = Key(REAL, "", model, size, 0.0, 0)
        cells = [real, *(Key(ADDED, generator, model, size, ratio, 0) for ratio in columns)]
        _line(axes, results, cells, view, measure, aside, label=f"{size:,} real", color=colour,
              marker=mark, linestyle=stroke, markersize=5)  # fmt: skip
        alone = [Key(ONLY, generator, model, size, ratio, 0) for ratio in columns]
        _line(axes, results, alone, view, measure, aside, color=colour, marker=mark,
              linestyle="none", markersize=5, markerfacecolor="white",
              label="synthetic only (same mark, hollow)",
              only_first_label=number > 0)  # fmt: skip
        classic = Key(CLASSIC, "", model, size, 0.0, 0)
        if classic in results.cells:
            beside = aside - 0.07 * max([1.0, *columns])
            axes.plot([beside], [_mean(results, classic, view, measure)], marker="*", color=colour,
                      linestyle="none", markersize=9,
                      label="_" if number else "classic augmentation (star)")  # fmt: skip
    for cell, figures in results.bounds(model).items():
        if cell.generator == generator:
            axes.axhline(_mean(results, figures, view, measure), color="#6e6e6e", linewidth=1.2,
                         linestyle=(0, (6, 3)),
                         label=f"all {cell.size:,} real that {generator} saw")  # fmt: skip
    pictures, malignant = results.counts(view)
    of = f"{view.test}{', histology alone' * view.confirmed}"
    axes.set_title(
        f"{model}{' + ' * bool(generator)}{generator}\n{of} (n={pictures:,}, {malignant} malignant)"
    )
    axes.set_xlabel("synthetic pictures for each real one")
    axes.set_ylabel("AUC" if measure == "auc" else "accuracy")
    axes.set_xticks([0, *columns], [f"{ratio:g}" for ratio in (0, *columns)])
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _line(
    axes: Axes, results: Results, cells: list[Key], view: View, measure: str, aside: float,
    only_first_label: bool = False, **style: Any,
) -> None:  # fmt: skip
    known = [cell for cell in cells if cell in results.cells]
    if not known:
        return
    values = [results.values(cell, view, measure) for cell in known]
    label = style.pop("label")
    axes.errorbar(
        [cell.ratio + aside for cell in known], [float(np.mean(v)) for v in values],
        yerr=[float(v.std(ddof=1)) if len(v) > 1 else 0.0 for v in values],
        capsize=2.5, elinewidth=1, label="_" if only_first_label else label, **style,
    )  # fmt: skip


def _mean(results: Results, cell: Key, view: View, measure: str) -> float:
    return float(np.mean(results.values(cell, view, measure)))
