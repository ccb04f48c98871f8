"""Fine-tune (or train) a timm ViT to tell benign from malignant lesions, and calibrate it.

    python -m training.vit --data ISIC2017 --data HAM10000 --out models/mini/classifier

Writes timm's own layout, `config.json` and `model.safetensors`, with the calibration beside them
(temperature, threshold for 95 % sensitivity on the validation split, abstention band), and
`report.json`. Batches are balanced over (source, how the label is known, label), since follow-up
images are all benign and come from other cameras: unbalanced, a model learns the camera. With
`--work FILE` the run is saved there every few minutes, and taken up again; `--start FILE` begins
with the weights of another run, and the report names what those saw as well. All that can be
refused is refused before the training.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dermaflux.command import ended
from dermaflux.prompt import LABELS
from training import classifier, data, leaks, scores, supervise
from training.checkpoint import add_classifier
from training.classifier import Recipe

log = logging.getLogger(__name__)

Splits = dict[str, list[data.Sample]]


def check(everything: list[data.Sample], recipe: Recipe, out: Path, work: Path | None) -> Splits:
    """The three splits, when all that a run needs after its training is there.

    Raises:
        DatasetError: a split is empty, training or validation lack a class, a picture or mask of
            validation or test cannot be read, or `out` or `work` cannot be written.
    """
    splits = {name: [s for s in everything if s.split == name] for name in ("train", "val", "test")}
    if missing := [name for name, samples in splits.items() if not samples]:
        raise data.DatasetError(f"no sample in split {', '.join(missing)}")
    for name in ("train", "val"):
        counts = {label: sum(s.lesion.label == label for s in splits[name]) for label in LABELS}
        if lacking := [label for label, count in counts.items() if not count]:
            raise data.DatasetError(
                f"split {name} has no {lacking[0]} lesion among its {len(splits[name])}; training "
                f"and calibration need both {' and '.join(LABELS)}"
            )
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise data.DatasetError(f"--out {out}: {folder} is a file; give a folder")
    if work is not None and work.is_dir():
        raise data.DatasetError(f"--work {work} is a folder; give a file, such as {work}/vit.pt")
    for sample in (*splits["val"], *splits["test"]):
        data.load_mask(sample, recipe.size)
    data.load_images(splits["test"], recipe.size)
    return splits


def run(
    everything: list[data.Sample], recipe: Recipe, out: Path, work: Path | None = None,
    start: Path | None = None, *, leave_out: bool = False, seen: Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Train, calibrate, report and save; returns (calibration, the test splits' figures).

    Learnt pictures that stand in a test split too are left out where `leave_out` says so; an index
    of those learnt is written to `seen`.

    Raises:
        DatasetError: what `check`, `leaks.apart` and `supervise.train` refuse, or a picture cannot
            be read.
    """
    check(everything, recipe, out, work)
    kept = leaks.apart(everything, leave_out, recipe.threads)
    if len(kept) < len(everything):
        log.info("%d pictures left out: they stand in a test split", len(everything) - len(kept))
    splits = check(kept, recipe, out, work)
    if seen is not None:
        leaks.index([*splits["train"], *splits["val"]], recipe.threads).save(seen)
    supervise.check(splits["train"], recipe, work, start)
    validation = data.load_images(splits["val"], recipe.size)
    model, history = supervise.train(splits["train"], recipe, work, start)
    classifier.as_shipped(model)
    labels = np.array([LABELS.index(str(s.lesion.label)) for s in splits["val"]])
    scale, shift = scores.platt(classifier.logits_of(model, validation), labels)
    classifier.shift_logit(model, shift)
    classifier.as_shipped(model)
    logits = classifier.logits_of(model, validation)
    calibration = scores.calibrate(logits, labels, scale, recipe)
    calibration["shift"] = round(shift, 4)
    logits_of = partial(classifier.logits_of, model)
    figures = scores.report(logits_of, splits["test"], calibration, recipe.size)
    classifier.save(model, recipe, calibration, figures, history, out)
    add_classifier(out.parent, history.saw)
    return calibration, figures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.vit", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", type=Path, action="append", required=True, help="repeatable")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="state to save and resume from")
    parser.add_argument("--start", type=Path, help="another run's state, to begin from")
    parser.add_argument(
        "--leave-out", action="store_true",
        help="train without the pictures that stand, or nearly stand, in a test split too; without "
        "this they are listed and nothing is trained",
    )  # fmt: skip
    parser.add_argument(
        "--seen", type=Path, help="write an index of what was seen (python -m training.data leaks)"
    )
    parser.add_argument("--hours", type=data.positive, default=Recipe.hours)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=data.count, default=Recipe.threads)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    recipe = Recipe(hours=options.hours, threads=options.threads, seed=options.seed)

    def work() -> None:
        everything = [sample for folder in options.data for sample in data.read(folder)]
        calibration, figures = run(
            everything, recipe, options.out, options.work, options.start,
            leave_out=options.leave_out, seen=options.seen,
        )  # fmt: skip
        print(json.dumps({"out": str(options.out), "calibration": calibration, "test": figures}))

    return ended(work, "stopped; with --work the same command goes on from the last saved state")


if __name__ == "__main__":
    sys.exit(main())
