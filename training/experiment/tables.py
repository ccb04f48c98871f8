"""Tables of the report, in Markdown.

>>> grid(results, cells, View("test"), "auc")     # rows: sizes; columns: ratios
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from training import paper
from training.experiment.config import ADDED, CLASSIC, ONLY, REAL, WEIGHTS
from training.experiment.key import Key
from training.experiment.results import Results, View
from training.experiment.sentences import outward, signed
from training.figures import Floats

NONE = "–"
"""What was not run."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def spread(values: Floats, seeds: int) -> str:
    """Mean and standard deviation over seeds; how many they are, where fewer than elsewhere."""
    known = values[np.isfinite(values)]
    if not len(known):
        return NONE
    text = f"{known.mean():.3f}"
    if len(known) > 1:
        text += f" ± {known.std(ddof=1):.3f}"
    return text if len(known) == seeds else f"{text} (n={len(known)})"


def most(results: Results) -> int:
    """Seeds of the cell that has most."""
    return max(map(len, results.cells.values()))


def mean(results: Results, cell: Key, view: View, measure: str) -> str:
    """A cell's figure; a dash where it was not run."""
    if cell not in results.cells:
        return NONE
    return spread(results.values(cell, view, measure), most(results))


def difference(results: Results, cell: Key, real: Key, view: View, measure: str) -> str:
    """Difference to real pictures alone with its interval."""
    found = results.difference(cell, real, view, measure)
    if found is None or found["value"] is None:
        return NONE
    if found["interval"] is None:
        return signed(found["value"])
    low, high = outward(found["interval"])
    return f"{signed(found['value'])} [{signed(low)}, {signed(high)}]"


def sizes(results: Results, model: str, arms: Sequence[str]) -> list[int]:
    """Numbers of real pictures that were run."""
    return sorted({c.size for c in results.cells if c.model == model and c.arm in arms})


def ratios(results: Results) -> list[float]:
    """Ratios that were run, but 0."""
    return sorted({cell.ratio for cell in results.cells if cell.ratio > 0})


def grid(
    results: Results, model: str, generator: str, arm: str,
    show: Callable[[Key], str], first: bool = True,
) -> list[str]:  # fmt: skip
    """The paper's layout: a row a size, a column a ratio; `first`: the column of ratio 0 too."""
    columns = ratios(results)
    rows = []
    for size in sizes(results, model, (REAL, arm)):
        cells = [Key(arm, generator, model, size, ratio, 0) for ratio in columns]
        begin = [show(Key(REAL, "", model, size, 0.0, 0))] if first else []
        rows.append([f"{size:,}", *begin, *(show(cell) for cell in cells)])
    head = ["real", *(["1 : 0"] if first else []), *(f"1 : {ratio:g}" for ratio in columns)]
    return table(head, rows)


def others(results: Results, model: str, show: Callable[[Key, Key], str]) -> list[str]:
    """The arms without synthetic pictures; `show` is given a cell and that of real alone."""
    bounds = results.bounds(model)
    head = ["real", "real alone", "classic augmentation", "class weights"]
    head += [f"all {c.size:,} real that {c.generator} saw" for c in bounds]
    rows = []
    for size in sizes(results, model, (REAL, CLASSIC, WEIGHTS)):
        real = Key(REAL, "", model, size, 0.0, 0)
        asked = [Key(arm, "", model, size, 0.0, 0) for arm in (REAL, CLASSIC, WEIGHTS)]
        rows.append([f"{size:,}", *(show(cell, real) for cell in (*asked, *bounds.values()))])
    return table(head, rows)


SHORT = {
    "auc": "AUC", "pauc": "pAUC > 80 % TPR", "sensitivity_at_95_specificity": "sens. at 95 % spec.",
    "accuracy": "accuracy", "balanced_accuracy": "balanced acc.*", "sensitivity": "sens.*",
    "specificity": "spec.*", "brier": "Brier", "calibration_error": "ECE",
}  # fmt: skip


def everything(results: Results, model: str, view: View) -> list[str]:
    """A row a cell with every figure, means over seeds."""
    rows = []
    for cell, seeds in results.cells.items():
        if cell.model != model:
            continue
        found = results.measured(cell, view)
        values = [found[name] for name in SHORT]
        shown = [
            f"{v[np.isfinite(v)].mean():.3f}" if np.isfinite(v).any() else NONE for v in values
        ]
        ratio = f"1 : {cell.ratio:g}"
        rows.append(
            [cell.arm, cell.generator or NONE, f"{cell.size:,}", ratio, str(len(seeds)), *shown]
        )
    return table(["arm", "generator", "real", "ratio", "seeds", *SHORT.values()], rows)


def controls(results: Results, model: str) -> list[str]:
    """A row a cell and test: AUC on whole pictures, on the border alone, on painted lesions."""
    rows = []
    for cell in results.cells:
        if cell.model != model or cell.arm == ONLY:
            continue
        for view in results.views():
            shown = [
                mean(results, cell, View(view.test, view.confirmed, control), "auc")
                for control in ("", "border", "masked")
            ]
            of = f"{view.test}{', histology' * view.confirmed}"
            name = f"{cell.arm} {cell.generator}".strip()
            rows.append([of, name, f"{cell.size:,}", f"1 : {cell.ratio:g}", *shown])
    rows.sort(key=lambda row: row[0])  # a stable sort: cells keep their order
    head = ["test", "arm", "real", "ratio", "whole picture", "border alone", "lesion painted over"]
    return table(head, rows)


def cost(results: Results) -> list[str]:
    """A row an arm and model: runs and hours."""
    groups: dict[tuple[str, str], list[Key]] = {}
    for cell, seeds in results.cells.items():
        keys = [Key(cell.arm, cell.generator, cell.model, cell.size, cell.ratio, s) for s in seeds]
        groups.setdefault((cell.model, cell.arm), []).extend(keys)
    groups["all", ""] = list(results.lines)
    rows = []
    for (model, arm), keys in groups.items():
        hours = results.hours(keys)
        rows.append([model, arm or NONE, str(len(keys)), *(f"{h:.2f}" for h in hours.values())])
    for name, said in results.about["config"]["generators"].items():
        stated = [said.get("cpu_hours"), said.get("gpu_hours")]
        shown = [NONE if one is None else f"{one:.2f}" for one in stated]
        if shown != [NONE, NONE]:
            rows.append([f"generator {name}, as stated", NONE, NONE, NONE, *shown])
    return table(["model", "arm", "runs", "wall-clock h", "CPU h", "GPU h"], rows)


def published() -> list[str]:
    """The paper's own grid and ROC figures."""
    parts: list[str] = []
    for name, values in paper.ACCURACY.items():
        rows = [
            [
                f"{size:,}",
                *(
                    f"{value:.4f}{'*' * ((name, size, ratio) in paper.HIDDEN)}"
                    for ratio, value in zip(paper.RATIOS, row, strict=True)
                ),
            ]
            for size, row in values.items()
        ]
        head = ["real", *(f"1 : {ratio:g}" for ratio in paper.RATIOS)]
        parts += [f"Accuracy of its {name} ({paper.NOTE}):", "", *table(head, rows), ""]
    names = list(next(iter(paper.ROC.values())))
    rows = [[model, *(f"{row[name]:g}" for name in names)] for model, row in paper.ROC.items()]
    return [
        *parts, "\\* marker partly hidden by another's.", "",
        "Its ROC curves (AUC of the legend; operating points digitised):", "",
        *table(["model", *names], rows),
    ]  # fmt: skip


def cells_of(results: Results, arm: str = ADDED) -> list[Key]:
    """The cells of an arm."""
    return [cell for cell in results.cells if cell.arm == arm]
