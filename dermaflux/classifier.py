"""A lesion photograph -> a calibrated probability of malignancy, a label, and a decision.

Pre-processing is timm's evaluation transform without torch; the graph gives logits; a temperature
makes them probabilities; the bundle's threshold and abstention band make a decision. A picture that
the gate does not accept (`dermaflux.intake`: a black one, a cat) gets none. All of these numbers
travel in the bundle.

    >>> Classifier.open("bundles/mini").classify([decode_upload(data)])
    [Prediction(label='benign', probability=0.08, threshold=0.31, decision='benign', ...)]

The command is `python -m dermaflux classify`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Final

import numpy as np
from PIL import Image

from dermaflux import tiers
from dermaflux.bundle import Bundle, ClassifierSpec
from dermaflux.engines import (
    OPENVINO,
    OPENVINO_GPU,
    OPENVINO_NPU,
    Choice,
    Engine,
    choose,
    load,
)
from dermaflux.errors import BundleError, EngineError
from dermaflux.flow import Floats
from dermaflux.intake import Intake, Look, Reason, look

SALIENCY: Final = "saliency"
PRUNED: Final = "pruned"
"""The tier whose answers are of fewer pieces of the picture, and the end of its precision's name.
"""
_LEAVES_OUT: Final = (OPENVINO, OPENVINO_GPU, OPENVINO_NPU)
"""Engines that do not compute what is not read."""


@dataclass(frozen=True)
class Prediction:
    """What the classifier says of one picture.

    `probability` is of malignancy, 0 to 1; `label` compares it with `threshold`; `decision` is the
    label, or `abstain` where the probability is within the band in which it is not to be trusted,
    or where the gate did not accept the picture: then `reasons` say why, and label and probability
    mean nothing. `tier` is the one that it was asked in, and `pruned` wherever that is what ran.
    """

    label: str
    probability: float
    threshold: float
    decision: str
    logits: tuple[float, ...]
    accepted: bool = True
    reasons: tuple[Reason, ...] = ()
    tier: str | None = None


@dataclass(frozen=True)
class Prepared:
    """What is needed of a picture from here on: the classifier's input float32 [3, H, W], what the
    gate looks at, where there is a gate, and whether a saliency is asked for. The picture itself
    can be forgotten."""

    pixels: Floats
    look: Look | None = None
    saliency: bool = False


@dataclass(frozen=True)
class Judged:
    """A prediction, and the graph's saliency float32 [rows, columns], its largest 1, where it gives
    one and it was asked for: see `dermaflux.saliency`."""

    prediction: Prediction
    saliency: Floats | None = None


class Classifier:
    """A classifier over one engine. Safe to use from several threads at once.

    A saliency takes a second look with `mapper`, an engine of the same file that is made at the
    first such look, where the first engine leaves it out: of a ViT-B/16 it is an eighth of the
    work. So an answer is the same whether a saliency was asked for or not.
    """

    def __init__(
        self,
        spec: ClassifierSpec,
        engine: Engine,
        max_batch: int = 8,
        choice: Choice | None = None,
        intake: Intake | None = None,
        mapper: Callable[[], Engine] | None = None,
        tier: str | None = None,
    ) -> None:
        self.spec = spec
        self.tier = PRUNED if engine.precision.endswith(f"-{PRUNED}") else tier
        self._map = mapper
        self._mapper: Engine | None = None
        self._making = Lock()
        self.intake = intake
        self.engine = engine
        self.choice = choice
        self._max_batch = max_batch

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | os.PathLike[str],
        engine: str | None = None,
        precision: str | None = None,
        *,
        tier: str | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        gated: bool = True,
    ) -> Classifier:
        """The classifier of a bundle; without its gate it judges whatever it is shown. `tier` is
        one of `dermaflux.tiers.CLASSIFIER_TIERS`.

        Raises:
            BundleError: the bundle cannot be opened, or has no classifier.
            EngineError: an engine cannot be had.
        """
        chosen = None if tier is None else tiers.classifier_tier(tier)
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        if bundle.classifier is None:
            raise BundleError(
                f"the bundle {bundle.name} has no classifier; add one to the checkpoint "
                "(classifier/) and export again"
            )
        choice = choose(bundle, "classifier", engine, precision, tier=chosen)
        weights = None if checkpoint is None else Path(checkpoint)
        with_map = partial(load, bundle, choice, checkpoint=weights, threads=threads)
        loaded = with_map(outputs=("logits", "features"))
        spec = bundle.classifier
        wanted = spec.intake if gated else None
        intake = None if wanted is None else Intake.open(wanted, bundle.path)
        given = {one.name for one in bundle.parts["classifier"].outputs}
        # A merged patch has no place on a map: a pruned file has none.
        mapped = SALIENCY in given and not choice.precision.endswith(f"-{PRUNED}")
        mapper = with_map if mapped and choice.engine in _LEAVES_OUT else None
        return cls(spec, loaded, bundle.limits.max_batch, choice, intake, mapper, tier)

    def classify(self, images: Sequence[Image.Image]) -> list[Prediction]:
        """One prediction per RGB picture, in order, in batches of the bundle's `max_batch`.

        Raises:
            EngineError: the engine failed, or gave numbers that are not finite.
        """
        predictions: list[Prediction] = []
        for start in range(0, len(images), self._max_batch):
            some = images[start : start + self._max_batch]
            chunk = [self.prepare(image, saliency=False) for image in some]
            predictions += [one.prediction for one in self.judge(chunk)]
        return predictions

    def prepare(self, image: Image.Image, *, saliency: bool = False) -> Prepared:
        """An RGB picture, ready to be judged. May be called from several threads at once."""
        seen = None if self.intake is None else look(image)
        return Prepared(preprocess(image, self.spec), seen, saliency)

    def judge(self, pictures: Sequence[Prepared]) -> list[Judged]:
        """`classify` of pictures that `prepare` made ready; the same answers, in order.

        Raises:
            EngineError: the engine failed, or gave numbers that are not finite.
        """
        judged: list[Judged] = []
        for start in range(0, len(pictures), self._max_batch):
            chunk = pictures[start : start + self._max_batch]
            found = self.engine.run({"pixel_values": np.stack([one.pixels for one in chunk])})
            read = ("logits",) if self.intake is None else ("logits", "features")
            for name in read:
                if not np.isfinite(found[name]).all():
                    raise EngineError(
                        f"{self.engine.name} in {self.engine.precision} gave {name} that are not "
                        "finite; try another precision"
                    )
            maps = self._maps(chunk, found.get(SALIENCY))
            for row, one in enumerate(chunk):
                reasons: tuple[Reason, ...] = ()
                if self.intake is not None and one.look is not None:
                    reasons = self.intake.reasons(one.look, found["features"][row])
                prediction = predict(found["logits"][row], self.spec, reasons, self.tier)
                judged.append(Judged(prediction, maps.get(row)))
        return judged

    def _maps(self, chunk: Sequence[Prepared], found: Floats | None) -> dict[int, Floats]:
        """Saliencies by row, of those that ask for one."""
        rows = [row for row, one in enumerate(chunk) if one.saliency]
        if found is not None:
            return {row: found[row] for row in rows}
        if not rows or self._map is None:
            return {}
        with self._making:
            if self._mapper is None:
                self._mapper = self._map()
        pixels = np.stack([chunk[row].pixels for row in rows])
        maps = self._mapper.run({"pixel_values": pixels})[SALIENCY]
        return dict(zip(rows, maps, strict=True))


def preprocess(image: Image.Image, spec: ClassifierSpec) -> Floats:
    """An RGB picture -> float32 [3, H, W], normalised.

    The shorter side is resized to the input's over `crop_pct`, the centre is cut out.
    Source: `timm.data.transforms_factory.transforms_imagenet_eval` with crop mode "center".
    """
    _, height, width = spec.input_size
    size, (left, top) = frame(image.size, spec)
    # Converted only where it has to be: of a picture that is RGB already it would be a whole copy.
    image = image if image.mode == "RGB" else image.convert("RGB")
    image = image.resize(size, Image.Resampling[spec.interpolation.upper()])
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image)
    # Colours apart from the start, and in place: each step is one pass over what lies together.
    found = pixels.transpose(2, 0, 1).astype(np.float32, order="C")
    found /= np.float32(255)
    found -= np.array(spec.mean, np.float32)[:, None, None]
    found /= np.array(spec.std, np.float32)[:, None, None]
    return found


def frame(size: tuple[int, int], spec: ClassifierSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """How a picture of `size` becomes the input: the size it is resized to, and the left upper
    corner of what is cut out of that. Pixels, across first."""
    _, height, width = spec.input_size
    target = tuple(math.floor(side / spec.crop_pct) for side in (height, width))
    resized = _resized(size, *target)
    return resized, (round((resized[0] - width) / 2), round((resized[1] - height) / 2))


def predict(
    logits: Floats,
    spec: ClassifierSpec,
    reasons: tuple[Reason, ...] = (),
    tier: str | None = None,
) -> Prediction:
    """Logits [classes] -> a prediction. The band is half open: low <= probability < high. With
    `reasons` against the picture there is no decision."""
    scaled = logits.astype(np.float64) / spec.temperature
    shares = np.exp(scaled - scaled.max())
    probability = float(shares[spec.classes.index("malignant")] / shares.sum())
    label = "malignant" if probability >= spec.threshold else "benign"
    low, high = spec.abstain
    return Prediction(
        label=label,
        probability=probability,
        threshold=spec.threshold,
        decision="abstain" if reasons or low <= probability < high else label,
        logits=tuple(float(value) for value in logits),
        accepted=not reasons,
        reasons=reasons,
        tier=tier,
    )


def _resized(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Width and height after resizing, the shape kept, so that `height` x `width` fits inside.

    timm takes torchvision's `Resize` for square inputs, which cuts the longer side down, and its
    own `ResizeKeepRatio` for others, which rounds both.
    """
    have_width, have_height = size
    if height == width:
        longer = int(height * max(size) / min(size))
        return (height, longer) if have_width <= have_height else (longer, height)
    ratio = min(have_height / height, have_width / width)
    return round(have_width / ratio), round(have_height / ratio)
