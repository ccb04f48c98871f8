"""The report on the embedded default's weights: every figure with its goal, met or missed.

    python -m training.vit --data ISIC2017 --out runs/mini/judge
    python -m training.mini --data ISIC2017 --report --judge runs/mini/judge

Images are drawn as users draw them (`dermaflux.pipeline`, eager float32, the checkpoint's own
defaults) from the captions of held-out lesions, and measured by two that never saw them: the
attributes' measure (`training.obedience`) and the judge, a classifier of real images
(`training.realism`). All drawn images are kept in the work folder by weights and request: a report
that was stopped goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dermaflux import attributes, files
from dermaflux.pipeline import Pipeline
from dermaflux.prompt import LABELS, Lesion, caption
from training import checkpoint, data, distillation, obedience, realism
from training.drawing import Asked, fingerprint, sampled
from training.figures import Figure, Pixels, kept, table
from training.generator import GUIDANCE_RANGE
from training.judge import Judge, label_figures, malignant

_PSNR_GOAL = 30.0  # dB


@dataclass(frozen=True)
class Plan:
    """What a report is made of; with the default `samples` it draws some 1,600 images."""

    dataset: Path
    checkpoint: Path
    judge: Path
    work: Path
    first: Path | None = None
    """An older checkpoint, whose distance to real images stands beside."""
    samples: int = 64
    """Pairs per attribute; all other counts follow."""

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise data.DatasetError(f"{self.samples} samples make no figure; use 2 or more")

    @property
    def labels(self) -> int:
        """Images per label, nothing else asked for."""
        return -(-3 * self.samples // 2)

    @property
    def guided(self) -> int:
        """Pairs per attribute at guidances other than the default."""
        return -(-5 * self.samples // 8)

    @property
    def captions(self) -> int:
        """Images from the captions of held-out lesions, at most: one of each."""
        return 10 * self.samples


@dataclass(frozen=True)
class _Held:
    """What several figures are measured on: real images of the test split, and those drawn."""

    pipeline: Pipeline
    weights: str
    guidance: float  # the checkpoint's default
    folder: Path  # of the drawn images
    test: list[data.Sample]
    real: Pixels  # of `test`
    of: list[data.Sample]  # whose captions were drawn from
    described: Pixels  # one image for each of `of`
    asked: Asked  # the captions and seeds of those
    architecture: Mapping[str, Any]  # the generator's
    first: Pipeline | None  # older weights


def make(plan: Plan, known: Mapping[str, Any]) -> str:
    """Measure everything, write the checkpoint's `report.json`, return the table in Markdown.

    `known` is what `training.mini.evaluate` gives, and goes into the report as it is.

    Raises:
        DatasetError: no judge, or a dataset that cannot be used.
        BundleError: a checkpoint cannot be opened.
    """
    judge = Judge.open(plan.judge)
    held = _draw(plan)
    figures = [_autoencoder(known), *_obedience(plan, held)]
    figures += _labels(plan, held, judge)
    figures += _likeness(plan, held, judge)
    goals = [figure.met for figure in figures if figure.met is not None]
    document = {
        **known,
        "weights": held.weights,
        "judge": {"weights": judge.weights, "saw": list(judge.saw)},
        "samples": plan.samples,
        "goals": {"met": sum(goals), "of": len(goals)},
        "figures": [figure.document() for figure in figures],
    }
    text = json.dumps(document, indent=2) + "\n"
    files.write(plan.checkpoint / "report.json", text.encode())
    return (
        f"# Report on {plan.checkpoint}, weights {held.weights}\n\n"
        "Made by `python -m training.mini --report`; the same numbers stand in `report.json`.\n"
        f"{sum(goals)} of {len(goals)} goals met. "
        f"The judge saw {len(judge.saw)} sources: {'; '.join(judge.saw)}.\n\n{table(figures)}"
    )


def _draw(plan: Plan) -> _Held:
    """Open the checkpoint and the test split, and draw one image from each caption."""
    pipeline = Pipeline.from_checkpoint(plan.checkpoint)
    guidance = pipeline.defaults.guidance
    if guidance is None:
        raise data.DatasetError(f"{plan.checkpoint} takes no guidance, which this report varies")
    architecture = checkpoint.trained(plan.checkpoint)["architecture"]
    first = None if plan.first is None else Pipeline.from_checkpoint(plan.first)
    earlier(plan.checkpoint)
    weights = fingerprint(plan.checkpoint)
    folder = plan.work / "report" / weights
    test = data.read(plan.dataset, "test")
    if len(labels := {sample.lesion.label for sample in test}) < len(LABELS):
        raise data.DatasetError(
            f"{plan.dataset} has {', '.join(map(str, labels))} lesions alone in split 'test'; the "
            f"judge needs both {' and '.join(LABELS)} to be measured itself"
        )
    rows = _some(len(test), plan.captions)
    asked = [(caption(test[row].lesion), row) for row in rows]
    return _Held(
        pipeline, weights, guidance, folder, test,
        data.load_images(test, pipeline.defaults.height),
        [test[row] for row in rows], sampled(pipeline, asked, folder), asked,
        architecture, first,
    )  # fmt: skip


def _labels(plan: Plan, held: _Held, judge: Judge) -> list[Figure]:
    """Malignant against benign, with nothing else asked for and with real lesions' captions."""
    alone = [
        sampled(
            held.pipeline, [(caption(Lesion(label)), n) for n in range(plan.labels)], held.folder
        )
        for label in LABELS
    ]
    asked = np.repeat([label == "malignant" for label in LABELS], plan.labels)
    return label_figures(
        (judge.malignant(held.real), malignant(held.test)),
        {
            "only the label asked for": (judge.malignant(np.concatenate(alone)), asked),
            "captions of real lesions": (judge.malignant(held.described), malignant(held.of)),
        },
    )


def _autoencoder(known: Mapping[str, Any]) -> Figure:
    psnr = known["psnr_db"]
    return Figure(
        "autoencoder", "autoencoder, real test images, PSNR in dB", psnr["encode_decode"],
        known["test_images"], goal=_PSNR_GOAL,
        beside={"from exact latents": psnr["decode_exact_latents"],
                "ceiling of the latents": psnr["linear_ceiling"]},
    )  # fmt: skip


def _obedience(plan: Plan, held: _Held) -> list[Figure]:
    """Does it draw what is asked for, at which guidance, and as its teacher did?"""
    asked = obedience.bases(held.test, plan.samples)
    some = [obedience.ATTRIBUTES[name] for name in obedience.GUIDED]
    sides = {side for pair in some for side in (pair.present, pair.absent)}
    low, high = GUIDANCE_RANGE
    levels = sorted({low, held.guidance, min(held.guidance + 2, high)})

    def measured(name: str, guidance: float, count: int) -> list[attributes.Measured]:
        prompts = obedience.prompts(asked[:count], obedience.ASKED[name])
        images = sampled(held.pipeline, prompts, held.folder, guidance)
        return [attributes.measure(image) for image in images]

    found = {name: measured(name, held.guidance, plan.samples) for name in obedience.ASKED}
    guided = {
        level: {
            side: found[side][: plan.guided]
            if level == held.guidance
            else measured(side, level, plan.guided)
            for side in sides
        }
        for level in levels
    }
    on_real = [attributes.measure(image) for image in held.real]
    drawn = [one for several in found.values() for one in several]
    return [
        *obedience.segmentation(held.test, held.real, on_real, drawn),
        *obedience.pairs(
            found,
            {name: obedience.on_real(name, held.test, on_real) for name in obedience.ATTRIBUTES},
        ),
        obedience.rising(guided, held.guidance),
        _distilled(plan, held, levels),
    ]


def _distilled(plan: Plan, held: _Held, levels: Sequence[float]) -> Figure:
    """Against the teacher, where the work folder has it; else as the present report has it."""
    rows = _some(len(held.test), 2 * plan.samples)
    try:
        teacher = distillation.teacher_of(
            plan.work / "generator.pt", plan.checkpoint, held.architecture
        )
    except data.DatasetError as error:
        missing = Figure(
            "distilled", distillation.WHAT, None, 0, None, distillation.GOAL, "at most",
            note=str(error),
        )  # fmt: skip
        return _from_before(plan, missing, "weights", held.weights)
    return distillation.tracking(
        held.pipeline, plan.checkpoint, teacher, held.real[rows],
        [caption(held.test[row].lesion) for row in rows], held.guidance, levels,
    )  # fmt: skip


def _from_before(plan: Plan, figure: Figure, part: str, weights: str) -> Figure:
    """The present report's numbers for a figure, where its `part` has the same weights."""
    before = earlier(plan.checkpoint)
    stated = before.get(part)
    if weights != (stated["weights"] if isinstance(stated, dict) else stated):
        return figure
    for document in before.get("figures", []):
        if document["key"] == figure.key and document["value"] is not None:
            return kept(document, figure, "kept from an earlier report")
    return figure


def earlier(folder: Path) -> dict[str, Any]:
    """The report that a checkpoint has, or an empty one.

    Raises:
        DatasetError: it cannot be read.
    """
    file = folder / "report.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise data.DatasetError(f"{file} is no report ({error}); delete it") from error


def _likeness(plan: Plan, held: _Held, judge: Judge) -> list[Figure]:
    """How near the drawn images are to real ones as a whole, and to single training images."""
    side = held.real.shape[1]
    others = [s for s in data.read(plan.dataset) if s.split != "test"]
    rest = [others[row] for row in _some(len(others), len(held.described))]
    features = judge.features(held.real)
    lines = realism.kid_figures(
        judge.features(held.described), features, judge.features(data.load_images(rest, side))
    )
    first = Figure("kid.first", realism.FIRST, None, 0, note="no older checkpoint was given")
    if plan.first is None or held.first is None:
        first = _from_before(plan, first, "judge", judge.weights)
    else:
        folder = plan.work / "report" / fingerprint(plan.first)
        first = realism.first_figure(
            judge.features(sampled(held.first, held.asked, folder)), features
        )
    seen = data.load_images([s for s in others if s.split == "train"], side)
    spaces = {"pixels": realism.thumbnails, "features": lambda x: realism.unit(judge.features(x))}
    return [
        *lines,
        first,
        *(
            line
            for space, of in spaces.items()
            for line in realism.single_figures(space, of, held.described, held.real, seen)
        ),
    ]


def _some(total: int, count: int) -> list[int]:
    """`count` of `total` row numbers (all, where there are no more), in order; always the same."""
    return sorted(int(row) for row in np.random.default_rng(0).permutation(total)[:count])
