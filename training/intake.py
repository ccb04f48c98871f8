"""Fit the gate that refuses what a classifier cannot judge, and say how often it errs.

    python -m training.intake models/mini/classifier --data ISIC2017 --data HAM10000

It is fitted on training pictures, every other one prepared otherwise (`training.preparation`), its
limits are set on validation pictures in both forms, and every figure is of test pictures: how many
real ones are refused by source and label, and how many of each kind of outlier, sent as a JPEG,
pass (`training.outliers`; `--outliers FOLDER` adds pictures of your own that are no lesions).
Writes `intake.npz` (statistics) and, last, `intake.json` (limits and figures) beside the
classifier's weights, from where the export takes them into a bundle.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dermaflux import files
from dermaflux.appearance import describe, square
from dermaflux.bundle import sha256
from dermaflux.checkpoint import INTAKE, STATISTICS, classifier_spec
from dermaflux.command import ended
from dermaflux.engines import Engine, eager
from dermaflux.flow import Floats
from dermaflux.images import FORMATS
from dermaflux.intake import arrays_of
from dermaflux.manifest import ClassifierSpec, IntakeSpec
from dermaflux.thumbnails import UNREADABLE, why
from training import data
from training.intake_fit import (
    Seen,
    balance,
    fitted,
    limits,
    look,
    lowest,
    mixed,
    odds,
    rate,
    verdicts,
)
from training.outliers import KINDS
from training.preparation import compressed, prepared
from training.textures import texture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How a gate is fitted."""

    quality: float = 0.01  # shares of validation pictures refused, sources counted equally
    appearance: float = 0.01
    features: float = 0.01
    textures: float = 0.015
    axes: int = 25
    components: int = 12
    darkest: float = 64.0  # grey value: the limit of `light` is never above it
    drawn: int = 1500  # textures that lesions are told from
    lesion_axes: int = 60
    lesion_components: int = 10
    outliers: int = 100  # test pictures that each kind of outlier is made of
    seed: int = 0


@dataclass(frozen=True)
class Lesions:
    """The samples of one split and what was seen of them, as they are and prepared otherwise."""

    samples: Sequence[data.Sample]
    plain: Seen
    prepared: Seen


def run(
    classifier: Path, everything: Sequence[data.Sample], recipe: Recipe, own: Path | None = None
) -> dict[str, Any]:
    """Fit, measure and write; returns the content of `intake.json`.

    Raises:
        DatasetError: a split is empty or a picture cannot be read.
        BundleError: the folder holds no classifier that can be read.
    """
    splits = {name: [s for s in everything if s.split == name] for name in ("train", "val", "test")}
    if missing := [name for name, samples in splits.items() if not samples]:
        raise data.DatasetError(f"no sample in split {', '.join(missing)}")
    spec, engine = _opened(classifier)
    train = _training(splits["train"], spec, engine, recipe.seed)
    val, test = (
        _lesions(name, splits[name], spec, engine, recipe.seed) for name in ("val", "test")
    )
    log.info("fitting to %d training pictures", len(train))
    shown = (recipe.axes, recipe.components, recipe.seed)
    appearance, features = fitted(train.looks, *shown), fitted(train.both, *shown)

    drawn = _drawn(recipe)
    lesions = fitted(train.looks, recipe.lesion_axes, recipe.lesion_components, recipe.seed)
    textures = mixed(lesions, drawn, recipe.lesion_components, recipe.seed)
    densities = (appearance, features, lesions, textures)

    known = _joined(val.plain, val.prepared)
    weights = balance([s.source for s in val.samples] * 2)
    gate = IntakeSpec(
        file=STATISTICS,
        min_side=min(spec.input_size[1:]) // 2,
        **limits(known, weights, recipe.quality, recipe.darkest),
        appearance=_down(lowest(appearance.score_all(known.looks), weights, recipe.appearance)),
        features=_down(lowest(features.score_all(known.both), weights, recipe.features)),
        textures=_down(lowest(odds(known, lesions, textures), weights, recipe.textures)),
    )

    def refused(of: Seen) -> dict[str, NDArray[np.bool_]]:
        return dict(verdicts(of, gate, densities)) if len(of) else {}

    document: dict[str, Any] = {
        "weights": sha256(classifier / "model.safetensors"),
        "limits": {k: v for k, v in asdict(gate).items() if k != "file"},
        "recipe": asdict(recipe),
        "fitted_on": {
            "pictures": len(train),
            "sources": sorted({s.source for s in splits["train"]}),
        },
        "validation": _false_alarms(val, refused),
        "test": _false_alarms(test, refused),
        "outliers": {},
    }
    for name, kind in KINDS.items():
        of = look(_made(name, splits["test"], recipe), spec, engine)
        document["outliers"][name] = {
            "group": kind.group, "about": kind.about, **_by_reason(refused(of)),
        }  # fmt: skip
    if own is not None:
        of = look(_own(own), spec, engine)
        document["outliers"]["own"] = {
            "group": "content", "about": f"pictures of {own.name}", **_by_reason(refused(of)),
        }  # fmt: skip
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **arrays_of(densities))
    report = classifier / Path(INTAKE).name
    report.unlink(missing_ok=True)
    files.write(classifier / Path(STATISTICS).name, stream.getvalue())
    files.write(report, (json.dumps(document, indent=2) + "\n").encode())
    return document


def _opened(classifier: Path) -> tuple[ClassifierSpec, Engine]:
    if classifier.name != "classifier" or not (classifier / "config.json").is_file():
        raise data.DatasetError(
            f"{classifier} is no checkpoint's classifier/ with a config.json; name one, such as "
            "models/mini/classifier (python -m training.vit makes it)"
        )
    spec = classifier_spec(classifier.parent, gate=False)
    assert spec is not None
    return spec, eager.load(classifier.parent, "classifier")


def _training(
    samples: Sequence[data.Sample], spec: ClassifierSpec, engine: Engine, seed: int
) -> Seen:
    """As many of every source; every other one prepared otherwise."""
    random = np.random.default_rng(seed)
    rows = _even(np.array([s.source for s in samples]), random)
    pictures = _opened_all([samples[row] for row in rows])
    mixed = (prepared(one, random) if number % 2 else one for number, one in enumerate(pictures))
    return look(tqdm(mixed, "train", len(rows)), spec, engine)


def _drawn(recipe: Recipe) -> Floats:
    """Descriptions of drawn textures, prepared as lesions are: else what tells them apart would be
    that no camera or JPEG was between."""
    looks = []
    for number in tqdm(range(recipe.drawn), "textures"):
        random = np.random.default_rng([recipe.seed, number])
        looks.append(describe(square(prepared(texture(random), random))))
    return np.stack(looks)


def _lesions(
    name: str, samples: Sequence[data.Sample], spec: ClassifierSpec, engine: Engine, seed: int
) -> Lesions:
    # A split's name draws its own numbers: what test shows must not hang on training's length.
    key = [seed, *name.encode()]
    plain = look(tqdm(_opened_all(samples), name, len(samples)), spec, engine)
    other = (
        prepared(picture, np.random.default_rng([*key, number]))
        for number, picture in enumerate(_opened_all(samples))
    )
    return Lesions(samples, plain, look(tqdm(other, f"{name} anew", len(samples)), spec, engine))


def _opened_all(samples: Sequence[data.Sample]) -> Iterator[Image.Image]:
    return (_picture(sample.file) for sample in samples)


def _picture(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except UNREADABLE as error:
        raise data.DatasetError(f"{file} cannot be read as a picture: {why(error)}") from error


def _made(name: str, samples: Sequence[data.Sample], recipe: Recipe) -> Iterator[Image.Image]:
    """Outliers of one kind, of test pictures spread evenly over sources."""
    rows = _even(np.array([s.source for s in samples]), np.random.default_rng(recipe.seed))
    chosen = [samples[row] for row in rows][: recipe.outliers]
    for number, sample in enumerate(tqdm(chosen, name)):
        picture = _picture(sample.file)
        mask = None
        if sample.mask is not None:
            grey = _picture(sample.mask).convert("L").resize(picture.size)
            mask = np.asarray(grey) > 127
        random = np.random.default_rng([recipe.seed, *name.encode(), number])
        made = KINDS[name].make(picture, mask, random)
        if made is not None:
            yield compressed(made, random)


def _own(folder: Path) -> Iterator[Image.Image]:
    known = tuple(f".{form.lower()}" for form in (*FORMATS, "JPG"))
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known)
    if not found:
        raise data.DatasetError(f"--outliers {folder} has no picture ({', '.join(known)})")
    return (_picture(file) for file in tqdm(found, "own"))


def _even(sources: NDArray[Any], random: np.random.Generator) -> NDArray[np.int64]:
    """Rows in a drawn order of which every source has as many, but for those under 100, which
    come whole: a large collection must not decide alone what is usual."""
    names, counts = np.unique(sources, return_counts=True)
    most = min((int(c) for c in counts if c >= 100), default=int(counts.max()))
    rows = [random.permutation(np.flatnonzero(sources == name))[:most] for name in names]
    return np.asarray(random.permutation(np.concatenate(rows)))


def _joined(first: Seen, second: Seen) -> Seen:
    return Seen(*(
        np.concatenate([a, b]) for a, b in zip(vars(first).values(), vars(second).values(),
                                               strict=True)
    ))  # fmt: skip


def _down(value: float) -> float:
    return float(np.floor(value * 100) / 100)


def _by_reason(refused: dict[str, NDArray[np.bool_]]) -> dict[str, Any]:
    any_of = np.any(list(refused.values()), axis=0) if refused else np.zeros(0, bool)
    return {**rate(any_of), "by": {k: int(v.sum()) for k, v in refused.items() if v.any()}}


def _false_alarms(lesions: Lesions, refused: Any) -> dict[str, Any]:
    """Refused real pictures by source and label, as they are and prepared otherwise."""
    results: dict[str, Any] = {}
    for way, seen in (("as_they_are", lesions.plain), ("prepared_otherwise", lesions.prepared)):
        found = refused(seen)
        results[way] = {"all": _by_reason(found)}
        for source in sorted({s.source for s in lesions.samples}):
            for label in (None, "benign", "malignant"):
                rows = np.array([
                    s.source == source and label in (None, s.lesion.label)
                    for s in lesions.samples
                ])  # fmt: skip
                part = {k: v[rows] for k, v in found.items()}
                results[way].setdefault(source, {})[label or "all"] = _by_reason(part)
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.intake", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("classifier", type=Path, help="a checkpoint's classifier/")
    parser.add_argument("--data", type=Path, action="append", required=True, help="repeatable")
    parser.add_argument("--outliers", type=Path, help="folder of pictures that are no lesions")
    for name in ("quality", "appearance", "features", "textures"):
        parser.add_argument(
            f"--{name}", type=data.positive, default=getattr(Recipe, name),
            help="share of validation pictures refused by it; default: %(default)s",
        )  # fmt: skip
    parser.add_argument("--axes", type=data.count, default=Recipe.axes)
    parser.add_argument("--components", type=data.count, default=Recipe.components)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    recipe = Recipe(
        quality=options.quality, appearance=options.appearance, features=options.features,
        textures=options.textures,
        axes=options.axes, components=options.components, seed=options.seed,
    )  # fmt: skip

    def work() -> None:
        everything = [sample for folder in options.data for sample in data.read(folder)]
        document = run(options.classifier, everything, recipe, options.outliers)
        told = {name: one["rate"] for name, one in document["outliers"].items()}
        alarms = {way: one["all"]["rate"] for way, one in document["test"].items()}
        print(json.dumps({
            "out": str(options.classifier / Path(INTAKE).name), "limits": document["limits"],
            "false_alarms": alarms, "refused": told,
        }))  # fmt: skip

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
