"""A trained classifier, from its folder or from a bundle, that judges pictures as the service does.

    >>> judge = from_bundle(Path("bundles/mini"), precision="int8")
    >>> judge.look([picture(file)])
    (array([[1.2, -0.4]]), [()])
    >>> scored(judge, samples, "test").probability

Pictures are opened and prepared by the service's own code (`dermaflux.classifier.preprocess`), so
that a threshold is judged on what it will be used for. The two controls get the picture squeezed
into a square, which is the same for square pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageOps

from dermaflux.bundle import Bundle, sha256
from dermaflux.classifier import Classifier, preprocess
from dermaflux.errors import DatasetError, ImageError
from dermaflux.images import decode_upload
from dermaflux.intake import Reason
from dermaflux.manifest import ClassifierSpec
from dermaflux.prompt import LABELS
from dermaflux.thumbnails import UNREADABLE, why
from training import data, scores
from training.figures import Floats, Pixels
from training.raw_scores import RawScores

Reasons = tuple[Reason, ...]
Look = Callable[[Sequence[Image.Image]], tuple[Floats, list[Reasons]]]

_CHUNK: Final = 64  # pictures in memory at once


@dataclass(frozen=True)
class Judge:
    """`look` gives the logits [N, 2] of RGB pictures, benign and malignant, and why a gate refused
    each (nothing where there is no gate); `bare` gives the logits alone. `calibration` is as in
    `report.json`, `about` says what was opened."""

    spec: ClassifierSpec
    calibration: dict[str, Any]
    about: dict[str, Any]
    gated: bool
    look: Look
    bare: Callable[[Sequence[Image.Image]], Floats]

    @property
    def side(self) -> int:
        """Pixels a side of a whole square picture."""
        return int(max(self.spec.input_size[1:]) / self.spec.crop_pct)


def from_folder(folder: Path, report: Path | None = None, threads: int = 2) -> Judge:
    """The classifier that `training.vit` wrote into `folder`, in torch.

    Temperature, threshold and band are those of `config.json`, which an export takes too; the
    shift and conformal limits those of `report` (`report.json` beside), if it is of the same
    temperature.

    Raises:
        DatasetError: it is none, or has no calibration.
    """
    import torch

    from training import classifier

    if not (folder / "config.json").is_file():
        inside = folder / "classifier"
        hint = f"; do you mean {inside}?" if (inside / "config.json").is_file() else ""
        raise DatasetError(
            f"{folder} holds neither a bundle (bundle.json) nor a classifier (config.json){hint}"
        )
    model = classifier.load(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shown, told = config["pretrained_cfg"], config["dermaflux"]
        spec = ClassifierSpec(
            tuple(config["label_names"]), tuple(shown["input_size"]), tuple(shown["mean"]),
            tuple(shown["std"]), shown["interpolation"], shown["crop_pct"], told["temperature"],
            told["threshold"], tuple(told["abstain"]),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise DatasetError(
            f"{folder / 'config.json'} has no calibration of ours ({error}); train it with: "
            "python -m training.vit"
        ) from error
    order = _order(spec, folder)
    torch.set_num_threads(threads)

    @torch.inference_mode()
    def bare(pictures: Sequence[Image.Image]) -> Floats:
        pixels = np.stack([preprocess(one, spec) for one in pictures])
        return np.asarray(model(torch.from_numpy(pixels)).double().numpy()[:, order])

    beside = folder / "report.json"
    given = report or (beside if beside.is_file() else None)
    about = {"folder": str(folder), "weights": sha256(folder / "model.safetensors")}
    found = _calibration(spec, given)
    return Judge(spec, found, about, False, lambda p: (bare(p), [()] * len(p)), bare)


def from_bundle(
    folder: Path, report: Path | None = None, threads: int = 2, engine: str | None = None,
    precision: str | None = None,
) -> Judge:  # fmt: skip
    """A bundle's classifier with its gate, on one of the engines that serve it.

    A bundle does not tell shift and conformal limits: `report` does, if it is given.

    Raises:
        BundleError: the bundle cannot be opened or has no classifier.
        EngineError: an engine or precision cannot be had.
    """
    bundle = Bundle.open(folder)
    served = Classifier.open(bundle, engine, precision, threads=threads)
    ungated = Classifier(served.spec, served.engine, bundle.limits.max_batch)
    order = _order(served.spec, folder)

    def look(pictures: Sequence[Image.Image]) -> tuple[Floats, list[Reasons]]:
        found = served.classify(pictures)
        return np.array([one.logits for one in found])[:, order], [one.reasons for one in found]

    def bare(pictures: Sequence[Image.Image]) -> Floats:
        return np.array([one.logits for one in ungated.classify(pictures)])[:, order]

    about = {
        "bundle": str(folder), "id": bundle.id, "engine": served.engine.name,
        "precision": served.engine.precision,
    }  # fmt: skip
    found = _calibration(served.spec, report)
    return Judge(served.spec, found, about, served.intake is not None, look, bare)


def _order(spec: ClassifierSpec, where: Path) -> list[int]:
    if sorted(spec.classes) != sorted(LABELS):
        raise DatasetError(
            f"the classifier of {where} tells {', '.join(spec.classes)} apart; figures are of one "
            f"that tells {' and '.join(LABELS)}"
        )
    return [spec.classes.index(label) for label in LABELS]


def _calibration(spec: ClassifierSpec, report: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "temperature": spec.temperature,
        "threshold": spec.threshold,
        "abstain": list(spec.abstain),
    }
    told = {} if report is None else _told(report)
    if told and told.get("temperature") == spec.temperature:
        found |= {name: told[name] for name in ("shift", "conformal") if name in told}
    elif told:
        found["note"] = f"{report.name if report else ''} is of another temperature: not used"
    if "shift" not in found:
        # The logits hold it already: what there was before cannot be told.
        found |= {"shift": 0.0, "shift_note": "not known: before calibration is at temperature 1"}
    return found


def _told(report: Path) -> Mapping[str, Any]:
    try:
        told: Mapping[str, Any] = json.loads(report.read_text(encoding="utf-8"))["calibration"]
        told.get("temperature")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{report} is no report with a calibration ({type(error).__name__}: {error}); name the "
            "one that training wrote beside the weights, or remove it"
        ) from error
    return told


def picture(file: Path) -> Image.Image:
    """A picture as the service opens it; formats too that the service does not take.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        return decode_upload(file.read_bytes())
    except (ImageError, OSError):
        pass
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UNREADABLE as error:
        raise DatasetError(
            f"{file} cannot be read as a picture: {why(error)}; python -m training.data check "
            "DATASET lists all that cannot"
        ) from error


def scored(
    judge: Judge, samples: Sequence[data.Sample], split: str, *, controls: bool = True,
    shown: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[RawScores, list[Reasons]]:  # fmt: skip
    """The raw scores of samples in their order, as `split`, and why a gate refused each.

    `shown` may wrap the loop over parts of the samples in a progress bar.

    Raises:
        DatasetError: a picture or mask cannot be read.
    """
    parts: list[RawScores] = []
    refused: list[Reasons] = []
    for start in shown(range(0, len(samples), _CHUNK)):
        chunk = list(samples[start : start + _CHUNK])
        logits, reasons = judge.look([picture(one.file) for one in chunk])
        raw = RawScores.of(chunk, logits, judge.calibration)
        refused += reasons
        if controls:
            images = data.load_images(chunk, judge.side)
            painted, done = scores.lesion_masked(images, chunk)
            raw = replace(
                raw,
                border_only=_difference(judge, scores.border_only(images)),
                lesion_masked=np.where(done, _difference(judge, painted), np.nan),
            )
        parts.append(replace(raw, split=np.full(len(chunk), split)))
    return RawScores.joined(parts), refused


def _difference(judge: Judge, images: Pixels) -> Floats:
    logits = judge.bare([Image.fromarray(one) for one in images])
    return np.asarray(logits[:, 1] - logits[:, 0])
