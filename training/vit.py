"""Fine-tune (or train) a timm classifier to tell benign from malignant lesions, and calibrate it.

    python -m training.vit --data ISIC2017 --data HAM10000 --out models/mini/classifier
    python -m training.vit --data ISIC2017 --synthetic generated --ratio 1.75 --limit 500 \\
        --pretrained weights/resnext50_32x4d --epochs 20 --out runs/resnext
    torchrun --nproc_per_node 2 -m training.vit --data ISIC2017 --out runs/vit --steps 2000

Writes timm's own layout, `config.json` and `model.safetensors`, with the calibration beside them
(temperature, threshold for 95 % sensitivity on the validation split, abstention band), and
`report.json`. Batches are balanced over (source, how the label is known, label), since follow-up
images are all benign and come from other cameras: unbalanced, a model learns the camera. Synthetic
pictures are learnt and never tested on. With `--steps` or `--epochs` and one seed, a CPU gives the
same weights to the bit, in one go or resumed; with `--hours` the clock decides. With `--work FILE`
the run is saved there every few minutes, and taken up again; `--start FILE` begins
with the weights of another run, and the report names what those saw as well. All that can be
refused is refused before the training. N processes of torchrun are equal to `--accumulate N`, not
to one pass over the batch: drop path draws for each part, and batch normalisation sees its share.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dermaflux.command import ended
from dermaflux.prompt import LABELS
from training import classifier, data, leaks, mixing, resuming, scores, supervise
from training.checkpoint import add_classifier
from training.classifier import Recipe
from training.heads import Supervised
from training.pictures import Pictures
from training.pretrained import Pretrained
from training.ranks import Ranks, joined, parts_of
from training.vit_options import parser, recipe_of

log = logging.getLogger(__name__)

Splits = dict[str, list[data.Sample]]


@dataclass(frozen=True)
class Choice:
    """Which pictures are learnt: `limit` real ones, and `ratio` times as many of `synthetic`."""

    synthetic: Sequence[data.Sample] = ()
    ratio: float | None = None
    ratio_by: str = "real"
    limit: int | None = None

    def of(self, real: list[data.Sample], made: list[data.Sample], seed: int) -> Splits:
        """The real and the synthetic pictures that are learnt.

        Raises:
            DatasetError: there are fewer than are asked for.
        """
        if self.limit is not None:
            real = mixing.limited(real, self.limit, seed)
        if self.ratio is not None:
            made = mixing.synthetic(made, real, self.ratio, seed, self.ratio_by)
        return {"real": real, "synthetic": made}


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
    data.load_images(splits["test"], recipe.whole)
    return splits


def run(
    everything: list[data.Sample], recipe: Recipe, out: Path, work: Path | None = None,
    start: Path | None = None, *, leave_out: bool = False, seen: Path | None = None,
    choice: Choice = Choice(), weights: Pretrained | None = None,  # noqa: B008 (frozen)
) -> tuple[dict[str, Any], dict[str, Any]] | None:  # fmt: skip
    """Train, calibrate, report and save; returns (calibration, the test splits' figures).

    `everything` is real. Learnt pictures that stand in a test split too are left out where
    `leave_out` says so; an index of those learnt is written to `seen`. Of several processes the
    first calibrates and writes; the others return None.

    Raises:
        DatasetError: what `check`, `leaks.apart`, `training.mixing` and `supervise.fit` refuse, or
            a picture cannot be read.
        RecipeError: the model cannot be built as the recipe says.
    """
    ranks = Ranks.here(recipe.device)
    ranks.once(lambda: check(everything, recipe, out, work))
    made = mixing.only_training(choice.synthetic, everything)
    # What cannot be built is refused before all pictures are looked at.
    trial = Supervised(recipe)
    classifier.described(trial.vit, recipe)
    parts_of(trial, recipe, ranks)
    if weights is not None:
        weights.into(trial.vit, recipe.architecture)

    def apart() -> set[Path]:
        kept = leaks.apart([*everything, *made], leave_out, recipe.threads)
        return {sample.file for sample in kept}

    kept = ranks.once(apart)
    if lost := len(everything) + len(made) - len(kept):
        log.info("%d pictures left out: they stand in a test split", lost)
    splits = ranks.once(lambda: check([s for s in everything if s.file in kept], recipe, out, work))
    chosen = choice.of(splits["train"], [s for s in made if s.file in kept], recipe.seed)
    learnt = [*chosen["real"], *chosen["synthetic"]]
    if seen is not None and ranks.first:
        leaks.index([*learnt, *splits["val"]], recipe.threads).save(seen)
    resuming.check(learnt, recipe, work, start, weights)
    log.info("%d real and %d synthetic pictures are learnt", *map(len, chosen.values()))
    pictures = Pictures(recipe.threads)
    validation = pictures.images(splits["val"], recipe.whole)
    model, history = supervise.fit(
        learnt, recipe, splits["val"], pictures=pictures, weights=weights, state_file=work,
        start=start,
    )  # fmt: skip
    if not ranks.first:
        return None
    classifier.as_shipped(model)
    labels = np.array([LABELS.index(str(s.lesion.label)) for s in splits["val"]])
    scale, shift = scores.platt(classifier.logits_of(model, validation), labels)
    classifier.shift_logit(model, shift)
    classifier.as_shipped(model)
    logits = classifier.logits_of(model, validation)
    calibration = scores.calibrate(logits, labels, scale, recipe)
    calibration["shift"] = scores.significant(shift)
    logits_of = partial(classifier.logits_of, model)
    figures = scores.report(
        logits_of, splits["test"], calibration, recipe.whole, validation=splits["val"], out=out
    )
    classifier.save(model, recipe, calibration, figures, history, out, _counted(chosen, choice))
    add_classifier(out.parent, history.saw, history.made_of, history.begun)
    return calibration, figures


def _counted(chosen: Splits, choice: Choice) -> dict[str, Any]:
    """Which pictures were learnt, for the report."""
    return {
        **{
            name: {label: sum(s.lesion.label == label for s in some) for label in LABELS}
            for name, some in chosen.items()
        },
        "limit": choice.limit,
        "ratio": choice.ratio,
        "ratio_by": choice.ratio_by if choice.ratio else None,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parser("python -m training.vit", __doc__).parse_args(arguments)

    def work() -> None:
        with joined():
            first = Ranks.here("cpu").first
            logging.basicConfig(
                level=logging.INFO if first else logging.WARNING,
                format="%(asctime)s %(name)s %(message)s",
            )
            if options.pretrained and options.start:
                raise data.DatasetError("--pretrained and --start are both weights; give one")
            if options.ratio and not options.synthetic:
                raise data.DatasetError("--ratio is of synthetic pictures; give --synthetic")
            weights = Pretrained.open(options.pretrained) if options.pretrained else None
            recipe = recipe_of(options, weights)
            everything = [sample for folder in options.data for sample in data.read(folder)]
            made = [sample for folder in options.synthetic for sample in data.read(folder)]
            done = run(
                everything, recipe, options.out, options.work, options.start,
                leave_out=options.leave_out, seen=options.seen, weights=weights,
                choice=Choice(made, options.ratio, options.ratio_by, options.limit),
            )  # fmt: skip
        if done is not None:
            calibration, figures = done
            print(json.dumps({"out": str(options.out), "calibration": calibration,
                              "test": scores.brief(figures)}))  # fmt: skip

    return ended(work, "stopped; with --work the same command goes on from the last saved state")


if __name__ == "__main__":
    sys.exit(main())
