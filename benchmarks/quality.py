"""What speed costs in quality: every precision and tier of a bundle beside its reference.

    python -m benchmarks.quality --checkpoint models/mini --tier int8,cached
    python -m benchmarks.quality --photographs datasets/isic2017 --fail-under 42
    python -m benchmarks.quality --out benchmarks/results/quality.json

The same prompts and seeds are drawn by all: PSNR and SSIM of each image against eager torch in fp32
(`--checkpoint`) or, without torch, against the fp32 file; and what the bundle's classifier says of
either picture. Beside each variant stands its control, the picture that fewer steps make: the
fastest fp32 engine with as many steps as fit in the variant's time, for what is worse than that at
the same time is not worth having. A tier that forecasts steps has two more, by its own engine: as
many steps as fit in its time, and as many as the transformer was called for it, which no noise of a
machine changes. Times are of rounds in which all take turns, prompt after prompt.

`--photographs` compares the classifier's own precisions on a dataset's pictures: AUC with a paired
bootstrap over patients or lesions, probabilities, decisions and the gate's. `--fail-under` ends in
status 1 where the median PSNR of any variant is less. Progress goes to stderr; the last line of
stdout is one JSON object.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from benchmarks import quality_classifier
from benchmarks.captions import captions
from benchmarks.machine import before_measuring
from benchmarks.measuring import ratio
from benchmarks.quality_classifier import Photograph
from benchmarks.quality_sides import Asked, Side, controls, fewer_steps, measure
from benchmarks.results_file import finish, require_place
from benchmarks.similarity import pictures
from benchmarks.stages import counted
from benchmarks.variants import Variant, classifiers, listed
from dermaflux.bundle import Bundle
from dermaflux.classifier import Classifier
from dermaflux.command import at_least, ended, option, parsed
from dermaflux.engines import Choice
from dermaflux.errors import EngineError
from dermaflux.request import validate

TOO_FAR: Final = 1
"""Exit status where a variant is under `--fail-under`."""
_CALIBRATION: Final = 3
"""Rounds that tell how many steps fit in a variant's time."""


@dataclass(frozen=True)
class Settings:
    """The command line of `benchmarks.quality`."""

    bundle: Path = option("the bundle's folder", Path("bundles/mini"))
    checkpoint: Path | None = option("weights for eager torch, the reference", None)
    precision: tuple[str, ...] = option("comma-separated; default: all of the bundle", ())
    tier: tuple[str, ...] = option("comma-separated tiers to compare too", ())
    prompts: int = option("images of each variant", 16)
    steps: int | None = option("default: the bundle's", None)
    size: int | None = option("pixels of both sides; default: the bundle's", None)
    seed: int = option("of the prompts, and the first image's", 0)
    threads: int | None = option("of an engine; default: all cores", None)
    photographs: Path | None = option("dataset to compare the classifier's precisions on", None)
    split: str = option("of that dataset", "test")
    most: int | None = option("photographs at most, evenly spread; default: all", None)
    fail_under: float | None = option("least median PSNR in dB; less ends in status 1", None)
    out: Path | None = option("write the result there too", None)


def chosen(bundle: Bundle, settings: Settings) -> list[Variant]:
    """What is compared, the reference first.

    Raises:
        BundleError: the checkpoint is of another model.
        EngineError: a precision is not in the bundle, or there is no reference.
    """
    files = bundle.parts["transformer"].files
    for name in settings.precision:
        if name not in files:
            raise EngineError(
                f"precision {name!r} is not in {bundle.path}; its transformer has "
                f"{', '.join(files)}"
            )
    found = listed(bundle, settings.checkpoint, settings.tier)
    exact = (one for one in found if one.tier is None and one.precision in ("fp32", None))
    reference = next(exact, None)
    if reference is None:
        raise EngineError(
            f"{bundle.path} has no fp32 file that runs here to compare with; name the weights with "
            "--checkpoint"
        )
    wanted = settings.precision or tuple(files)
    # Controls are drawn in fp32, so that stays whatever is asked for.
    kept = [one for one in found if one.tier or one.precision in (*wanted, "fp32", None)]
    return [reference, *(one for one in kept if one != reference)]


def judged(bundle: Bundle, sides: Mapping[str, Side]) -> dict[str, list[tuple[str, float]]]:
    """What the bundle's classifier says of every picture; nothing where it has none."""
    if bundle.classifier is None:
        return {}
    exact = "fp32" if "fp32" in bundle.parts["classifier"].files else None
    # Without its gate: drawn pictures are no photographs, and the question is who tells them apart.
    classifier = Classifier.open(bundle, precision=exact, gated=False)
    found = {}
    for name, side in sides.items():
        images = [Image.fromarray(side.made[number]) for number in sorted(side.made)]
        found[name] = [(one.label, one.probability) for one in classifier.classify(images)]
    return found


def agreement(
    ours: Sequence[tuple[str, float]], theirs: Sequence[tuple[str, float]]
) -> dict[str, float]:
    """The share of equal labels, and changes of the probability."""
    moved = [abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)]
    same = [a[0] == b[0] for a, b in zip(ours, theirs, strict=True)]
    return {
        "labels_equal": round(float(np.mean(same)), 4),
        "probability_change_median": round(statistics.median(moved), 5),
        "probability_change_most": round(max(moved), 5),
    }


def table(
    bundle: Bundle,
    sides: Mapping[str, Side],
    seconds: Mapping[str, Sequence[float]],
    reference: str,
    drawn_with: Mapping[str, Mapping[str, str]],
) -> dict[str, dict[str, Any]]:
    """Every variant beside the reference, and its controls beside it."""
    said = judged(bundle, sides)
    rows = {}
    for name in drawn_with:
        rows[name] = _row(sides, said, name, reference)
        rows[name]["times_reference"] = _ratio(seconds[reference], seconds[name])
        for kind, base in drawn_with[name].items():
            control = f"{name}: {kind}"
            row = _row(sides, said, control, reference)
            row |= {
                "drawn_with": base,
                "steps": sides[control].steps,
                # More than 1: the control takes longer, so is given more than the variant.
                "seconds_beside_variant": _ratio(seconds[control], seconds[name]),
            }
            rows[name][kind] = row
            rows[name][f"beats_{kind}"] = rows[name]["psnr_db"]["median"] > row["psnr_db"]["median"]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; the result is the last line of stdout."""
    settings = parsed(Settings, "python -m benchmarks.quality", __doc__.split("\n\n")[0], arguments)
    words = sys.argv[1:] if arguments is None else arguments
    return ended(lambda: run(settings, words))


def run(settings: Settings, words: Sequence[str]) -> int:
    """What the command does; `words` are those of its command line.

    Raises:
        DermaFluxError: an option is out of range, or something of it cannot be had.
    """
    bounds = dict.fromkeys(("prompts", "steps", "size", "threads", "most"), 1)
    at_least(settings, {**bounds, "seed": 0, "fail_under": 0})
    require_place(settings.out)
    bundle = Bundle.open(settings.bundle)
    rules = (bundle.defaults, bundle.limits, bundle.model)
    size, prompts = settings.size, captions(settings.prompts, settings.seed)
    one = validate(*rules, prompts[0], settings.seed, settings.steps, None, size, size)
    photographs: Sequence[Photograph] = ()
    readers: Sequence[Choice] = ()
    if settings.photographs is not None:
        # Before minutes of drawing: they may not be there.
        photographs = quality_classifier.photographs(
            settings.photographs, settings.split, settings.most
        )
        readers = classifiers(bundle)
    before = before_measuring()
    variants = chosen(bundle, settings)
    sides = {
        variant.name: Side(
            counted(variant.pipeline(bundle, settings.checkpoint, settings.threads)), one.steps
        )
        for variant in variants
    }
    asked = Asked(prompts, settings.seed, size)
    measure(sides, asked, min(_CALIBRATION, settings.prompts))
    drawn_with = controls(sides, variants)
    fewer = {
        f"{name}: {kind}": Side(sides[base].pipeline, fewer_steps(kind, sides[base], sides[name]))
        for name, kinds in drawn_with.items()
        for kind, base in kinds.items()
    }
    everyone = {**sides, **fewer}
    seconds = measure(everyone, asked, settings.prompts)
    rows = table(bundle, everyone, seconds, variants[0].name, drawn_with)
    result: dict[str, Any] = {
        "environment": before,
        "reference": variants[0].name,
        "size": [one.height, one.width],
        "steps": one.steps,
        "prompts": settings.prompts,
        "seed": settings.seed,
        "reference_s": round(statistics.median(seconds[variants[0].name]), 4),
        "variants": rows,
    }
    if photographs:
        result["classifier"] = quality_classifier.compared(
            bundle, readers, photographs, settings.checkpoint, settings.threads
        )
    finish("quality", result, words, settings.out, bundle)
    low = {name: row["psnr_db"]["median"] for name, row in rows.items()}
    failed = {name: db for name, db in low.items() if db < (settings.fail_under or 0)}
    for name, db in failed.items():
        print(f"{name} is {db} dB from the reference, under {settings.fail_under}", file=sys.stderr)
    return TOO_FAR if failed else 0


def _ratio(base: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in asdict(ratio(base, other)).items()}


def _row(
    sides: Mapping[str, Side],
    said: Mapping[str, Sequence[tuple[str, float]]],
    name: str,
    reference: str,
) -> dict[str, Any]:
    numbers = sorted(sides[reference].made)
    row: dict[str, Any] = pictures(
        [sides[name].made[number] for number in numbers],
        [sides[reference].made[number] for number in numbers],
    )
    spent = sides[name].spent
    row["seconds"] = round(statistics.median(one.total for one in spent), 4)
    calls = [one.calls for one in spent if one.calls is not None]
    if calls:
        row["transformer_calls"] = statistics.median(calls)
    if said:
        row["classifier"] = agreement(said[name], said[reference])
    return row


if __name__ == "__main__":
    sys.exit(main())
