"""The experiment's report: sentences, tables, a figure; nothing that was not run.

    python -m training.experiment --report runs/experiment --out docs/experiment.md

Every number is computed anew from the runs' raw scores. The figure lies beside the text, under the
same name with `.png`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dermaflux import files
from dermaflux.dataset import writing
from dermaflux.errors import DatasetError
from training import bootstrap, paper
from training.experiment import figure, findings, tables
from training.experiment.config import ADDED, CLASSIC, ONLY, WEIGHTS
from training.experiment.key import Key
from training.experiment.results import Results, View

_CONVENTIONS = (
    "Every run takes the same number of optimizer steps, whatever it learns from. The real "
    "pictures of a size are the same for all arms and seeds, and within those of larger sizes; "
    "seeds vary the first weights, the order, the augmentation, and which synthetic pictures are "
    "taken. Where the settings look at the validation split (`evaluate`), the averaged weights of "
    "the best look are a run's result, in every arm alike.",
    "Arms: `real` real pictures alone; `added` synthetic ones beside them; `synthetic-only` the "
    "same synthetic ones alone; `classic` real ones with strong augmentation (any turn, crops, "
    "light), against the light one of all other arms; `class-weights` real ones with the loss "
    "weighed by 1 / share of the label; `upper` all the labelled real training pictures that the "
    "generator saw, without any synthetic one: what the generator's own data gives directly.",
    "Accuracy is that of the more probable class, as the paper's must be. Columns with * are at "
    "the threshold that makes balanced accuracy largest on the validation split. Brier score and "
    "expected calibration error (15 bins of equal mass) are of probabilities after Platt's "
    "scaling on the validation split.",
    "Values are mean ± standard deviation over seeds. Intervals are 95 %, paired, by drawing the "
    "test's lesions and the seeds; they are rounded outwards. They are not corrected for the "
    "number of comparisons, and with five seeds somewhat too narrow, for five runs vary by 4/5 of "
    "what many would.",
    "Auxiliary heads are off: they learn from masks and structures, which synthetic pictures have "
    "not, so arms would differ in more than their pictures.",
)


def write(folder: Path, out: Path, draws: int = bootstrap.DRAWS) -> dict[str, Any]:
    """Write the report to `out` and its figure beside it; what the command's last line says.

    Raises:
        DatasetError: the folder has no runs, scores are not those that a run wrote, or the report
            cannot be written.
    """
    if out.is_dir() or out.suffix != ".md":
        raise DatasetError(f"--out {out}: give the report's file, such as docs/experiment.md")
    results = Results.read(folder, draws)
    picture = out.with_suffix(".png")
    said = findings.told(results)
    lines = [
        "# Do synthetic lesions help?", "",
        *(f"- {sentence}" for sentence in said), "",
        f"![Mean over seeds by ratio of synthetic pictures]({picture.name})", "",
        *_tests(results),
    ]  # fmt: skip
    for model in dict.fromkeys(cell.model for cell in results.cells):
        lines += _model(results, model)
    lines += ["## What each generator saw", "", *_generators(results)]
    lines += ["## Cost", "", *tables.cost(results), ""]
    lines += ["## The paper's values", ""]
    lines += [*(f"- {caveat}" for caveat in paper.CAVEATS), "", *tables.published(), ""]
    lines += ["## How it was made", "", *(f"- {one}" for one in _CONVENTIONS), ""]
    lines += _commands(results, folder, out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.draw(results, picture)
        files.write(out, ("\n".join(lines).rstrip() + "\n").encode())
    return {
        "out": str(out), "figure": str(picture), "runs": len(results.lines),
        "cpu_hours": round(results.hours(list(results.lines))["cpu_"], 2),
    }  # fmt: skip


def _tests(results: Results) -> list[str]:
    lines = ["## Tests", ""]
    about = results.about
    for name, pictures in results.pictures.items():
        left: dict[str, Any] = {}
        for one in about["left_out"].get(name, ()):
            left.setdefault(one["file"], one)  # seen by several: the classifiers' own data first
        count, malignant = results.counts(View(name)) if pictures else (0, 0)
        benign = f"; calling all benign is right for {1 - malignant / count:.3f}" if count else ""
        lines.append(
            f"- `{name}`: {len(pictures):,} pictures, {malignant} malignant, of "
            f"{about['tests'][name]:,}{benign}; {len(left)} left out because they were seen in "
            f"training{':' if left else '.'}"
        )
        lines += [
            f"  - {one['file']} = {Path(one['seen']).name} ({one['why']}; {one['by']})"
            for one in left.values()
        ]
        more = about["tests"][name] - len(left) - len(pictures)
        if more:
            lines.append(f"  - {more} more that not every run was tested on are not counted.")
    if about["val_copies"]:
        lines.append(
            f"- {about['val_copies']} validation pictures have a copy among the training ones; "
            "they choose thresholds, and no figure is of them."
        )
    return [*lines, ""]


def _model(results: Results, model: str) -> list[str]:
    lines = [f"## Model `{model}`", ""]
    recipe = next(v["settings"]["recipe"] for k, v in results.lines.items() if k.model == model)
    lines += [
        f"{recipe['architecture']} {recipe['model_args'] or ''} at {recipe['size']} pixels, "
        f"{recipe['steps']} steps of {recipe['batch']}, {recipe['optimizer']} at "
        f"{recipe['rate']:g}, "
        + ("from random weights." if _pretrained(results, model) is None
           else f"from {_pretrained(results, model)}, {_weights_saw(results, model)}."),
        "",
    ]  # fmt: skip
    for view in results.views():
        of = f"`{view.test}`{', histology-confirmed alone' * view.confirmed}"
        for measure, name in (("auc", "AUC"), ("accuracy", "Accuracy")):
            lines += [f"### {name} on {of}", ""]
            lines += _grids(results, model, view, measure)
    lines += ["### All figures on `test`", "", *tables.everything(results, model, View("test")), ""]
    lines += ["### Controls (AUC)", "",
              "A model that tells the labels apart by the border alone, or with the lesion painted "
              "over, knows cameras and habits; on the whole picture it may know no more.", "",
              *tables.controls(results, model), ""]  # fmt: skip
    return lines


def _grids(results: Results, model: str, view: View, measure: str) -> list[str]:
    lines: list[str] = []
    show = partial(tables.mean, results, view=view, measure=measure)

    def change(cell: Key, real: Key | None = None) -> str:
        against = results.real(cell) if real is None else real
        return tables.difference(results, cell, against, view, measure)

    for arm, title in ((ADDED, "added"), (ONLY, "synthetic alone")):
        for generator in dict.fromkeys(c.generator for c in tables.cells_of(results, arm)):
            first = arm == ADDED
            lines += [f"{generator}, {title}:", ""]
            lines += [*tables.grid(results, model, generator, arm, show, first), ""]
            lines += ["less real alone:", ""]
            lines += [*tables.grid(results, model, generator, arm, change, False), ""]
    lines += ["without synthetic pictures:", ""]
    lines += [*tables.others(results, model, lambda cell, real: show(cell)), ""]
    if any(c.arm in (CLASSIC, WEIGHTS) for c in results.cells) or results.bounds(model):
        lines += ["less real alone:", "", *tables.others(results, model, _changed(change)), ""]
    return lines


def _changed(change: Any) -> Any:
    return lambda cell, real: tables.NONE if cell == real else change(cell, real)


def _pretrained(results: Results, model: str) -> str | None:
    found = next(v["settings"]["pretrained"] for k, v in results.lines.items() if k.model == model)
    return None if found is None else str(found)


def _weights_saw(results: Results, model: str) -> str:
    config = results.about["config"]
    said = (config.get("models") or {}).get(model) or config.get("model") or {}
    saw = said.get("saw") or []
    names = [saw] if isinstance(saw, str) else saw
    return f"which saw {', '.join(names)}" if names else "which saw no lesion"


def _generators(results: Results) -> list[str]:
    about = results.about
    lines = []
    for name, saw in about["generators"].items():
        sources = "; ".join(f"{source} ({licence})" for source, licence in saw["sources"])
        lines.append(
            f"- `{name}`: saw {saw['pictures']:,} pictures"
            + (f" of {sources}" if sources else "")
            + f", of which {saw['labelled']:,} are labelled real training pictures known here; "
            f"{saw['made']:,} generated pictures to draw from."
        )
        bundle = saw.get("bundle")
        if isinstance(bundle, Mapping):
            lines.append(f"  - made with the bundle {bundle.get('name')} ({bundle.get('id')})")
        for one in saw.get("ingredients", ()):
            if isinstance(one, Mapping):
                lines.append(f"  - ingredient: {one.get('name')} ({one.get('licence')})")
        if saw["unknown"]:
            lines.append(
                f"  - {saw['unknown']:,} of the pictures it saw are not known here, so the upper "
                "bound lacks them"
            )
        for size, inside in saw["in_subset"].items():
            lines.append(
                f"  - {inside:,} of the {saw['pictures']:,} are in the real subset of {int(size):,}"
            )
        dropped = about.get("dropped", {}).get(name, ())
        if dropped:
            lines.append(f"  - {len(dropped):,} generated pictures were not learnt, for:")
        lines += [
            f"    - {one['file']} = {one['seen']} of {one['by']} ({one['why']})" for one in dropped
        ]
        if name in about["same_as_real"]:
            size = about["same_as_real"][name]
            lines.append(f"  - its upper bound is the arm `real` at {size:,}: the same pictures")
    return [*(lines or ["No generator."]), ""]


def _commands(results: Results, folder: Path, out: Path) -> list[str]:
    report = shlex.join(
        ["python", "-m", "training.experiment", "--report", str(folder), "--out", str(out)]
    )
    return [
        "```", *results.about.get("commands", ()), report, "```", "",
        f"{len(results.lines)} runs; {tables.most(results)} seeds where there are most.",
    ]  # fmt: skip
