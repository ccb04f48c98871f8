"""How far an export is from eager torch, and how far it may be. Arithmetic only.

Tolerances and their reasons:

* fp32 parts, 5e-4 of the largest output: a wrong operator, epsilon or layout makes 1e-3 and more.
  Float32 sums in another order make 1e-6 to 1e-5, and those over the two million numbers that a
  group norm of a VAE sees at 1024 pixels were measured at 1.5e-4.
* Other parts: a guard against broken ranges only, since the error of a single step says little of
  the image. bf16 has 8 bits of mantissa and fp16 11, so a tenth and a twentieth; 8 bits a quarter.
* fp32 images, a median of 60 dB: where one byte in fifteen differs by one level of 255.
* int8 images, a median of 42 dB and a worst of 36: differences that nobody sees side by side.
* fp8, and bf16, which has less mantissa than int8 has steps: a median of 32 dB and a worst of 27,
  the usual bound of a good lossy copy of a photograph. fp16 is held to int8's.
* Probabilities, 0.001 in fp32 and 0.05 elsewhere: what a reader of two digits does not see, and
  half of the bins that calibration is measured in. The area under the ROC curve on photographs may
  change by 0.005.
* The pruned classifier: its graph is held to eager torch that prunes alike, as the other parts are.
  Beside the whole model its probabilities are told and not held, its area may change by 0.01.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dermaflux.bundle import ImageParity, PartParity
from dermaflux.engines import Array, Arrays, Engine
from dermaflux.errors import DermaFluxError

Pixels = NDArray[np.uint8]

PART_TOLERANCE: Final[Mapping[str, float]] = {
    "fp32": 5e-4,
    "bf16": 0.1,
    "fp16": 0.05,
    "int8": 0.25,
    "int8-pruned": 0.25,
    "fp8": 0.25,
}
IMAGE_TOLERANCE_DB: Final[Mapping[str, tuple[float, float]]] = {
    "fp32": (60.0, 50.0),
    "bf16": (32.0, 27.0),
    "fp16": (42.0, 36.0),
    "int8": (42.0, 36.0),
    "fp8": (32.0, 27.0),
}
"""Of the median image, and of the worst: a few steps amplify rounding wherever the text leaves the
image open."""
PROBABILITY_TOLERANCE: Final[Mapping[str, float]] = {
    "fp32": 0.001,
    "bf16": 0.05,
    "fp16": 0.05,
    "int8": 0.05,
    "fp8": 0.05,
}
"""None for the pruned classifier: it is another answer, whose area alone is held."""
AUC_TOLERANCE: Final = 0.005
PRUNED_AUC_TOLERANCE: Final = 0.01
EQUAL_DB: Final = 99.0
"""Stands for the endless PSNR of equal images, since JSON has no infinity."""


class ParityError(DermaFluxError):
    """An export is too far from its model; the message holds the table of measurements."""

    exit_status = 1


@dataclass(frozen=True)
class Case:
    """Inputs of a part, and what a trusted engine made of them."""

    inputs: Arrays
    outputs: Arrays


@dataclass
class Recorder:
    """An engine that keeps what passes through another one."""

    engine: Engine
    cases: list[Case] = field(default_factory=list)

    @property
    def name(self) -> str:
        """See `Engine.name`."""
        return self.engine.name

    @property
    def precision(self) -> str:
        """See `Engine.precision`."""
        return self.engine.precision

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`."""
        outputs = self.engine.run(inputs)
        self.cases.append(Case(inputs, outputs))
        return outputs

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`."""
        step = self.engine.bind(constant, timesteps)

        def recorded(varying: Arrays) -> dict[str, Array]:
            outputs = step(varying)
            self.cases.append(Case({**constant, **varying}, outputs))
            return outputs

        return recorded


@dataclass(frozen=True)
class Row:
    """One measurement against its tolerance; `at_least` where more is better."""

    what: str
    precision: str
    engine: str
    measured: float
    tolerance: float
    unit: str
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        if self.at_least:
            return self.measured >= self.tolerance
        return self.measured <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{'ok' if self.passed else 'FAIL':<5}{self.what:<20}{self.precision:<6}"
            f"{self.engine:<17}{self.measured:>10.3g} {self.unit}, needs "
            f"{'at least' if self.at_least else 'at most'} {self.tolerance:g}"
        )


def require(rows: Sequence[Row]) -> None:
    """Raise a ParityError with the whole table if any row fails."""
    failed = [row for row in rows if not row.passed]
    if failed:
        table = "\n".join(str(row) for row in rows)
        precisions = {row.precision for row in failed}
        remedy = (
            f"Leave {', '.join(sorted(precisions))} out of --precision"
            if "fp32" not in precisions
            else "Please report the table with the versions of torch, onnxruntime and openvino"
        )
        raise ParityError(
            f"{len(failed)} of {len(rows)} comparisons with eager torch are beyond tolerance, so "
            f"no bundle was written\n{table}\n{remedy}"
        )


def thinned(cases: Sequence[Case], most: int) -> list[Case]:
    """At most `most` cases, evenly from the first to the last."""
    if len(cases) <= most:
        return list(cases)
    return [cases[index] for index in np.linspace(0, len(cases) - 1, most).round().astype(int)]


def part_parity(engine: Engine, cases: Iterable[Case], tolerance: float) -> PartParity:
    """The largest difference of any output over all cases; relative to that output's largest."""
    errors: dict[str, float] = {}
    largest: dict[str, float] = {}
    for case in cases:
        outputs = engine.run(case.inputs)
        for name, expected in case.outputs.items():
            if outputs[name].shape != expected.shape or not np.isfinite(outputs[name]).all():
                # JSON has no infinity, and no tolerance is near this.
                return PartParity(1e30, 1e30, tolerance)
            error = float(np.abs(outputs[name] - expected).max())
            errors[name] = max(errors.get(name, 0.0), error)
            largest[name] = max(largest.get(name, 1e-12), float(np.abs(expected).max()))
    relative = max(errors[name] / largest[name] for name in errors)
    return PartParity(max(errors.values()), relative, tolerance)


def psnr(image: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio of uint8 images in dB, `EQUAL_DB` at most."""
    error = float(np.mean((image.astype(np.float64) - reference) ** 2))
    return EQUAL_DB if error == 0 else min(EQUAL_DB, float(10 * np.log10(255**2 / error)))


def ssim(image: Pixels, reference: Pixels) -> float:
    """Structural similarity of uint8 images [H, W, 3], at most 1, which is equal.

    Source: Wang et al., Image Quality Assessment (2004), with means over windows of 7 x 7 pixels
    instead of Gaussians, per channel, as scikit-image's default computes it.
    """
    one, other = image.astype(np.float64), reference.astype(np.float64)
    window = min(7, *image.shape[:2])
    count = window * window
    unbiased = count / (count - 1) if count > 1 else 1.0
    mean_one, mean_other = _windows(one, window), _windows(other, window)
    variance_one = unbiased * (_windows(one * one, window) - mean_one**2)
    variance_other = unbiased * (_windows(other * other, window) - mean_other**2)
    covariance = unbiased * (_windows(one * other, window) - mean_one * mean_other)
    small, smaller = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ratio = ((2 * mean_one * mean_other + small) * (2 * covariance + smaller)) / (
        (mean_one**2 + mean_other**2 + small) * (variance_one + variance_other + smaller)
    )
    return float(ratio.mean())


def _windows(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Means over all whole windows of `size` x `size` pixels."""
    for axis in (0, 1):
        sums = np.cumsum(values, axis=axis)
        before = np.insert(sums, 0, 0.0, axis=axis)
        length = values.shape[axis] - size + 1
        upper = np.take(before, range(size, size + length), axis=axis)
        values = (upper - np.take(before, range(length), axis=axis)) / size
    return values


def image_parity(
    made: Sequence[Pixels],
    references: Sequence[Pixels],
    steps: int,
    precision: str,
    perceived: Sequence[float] = (),
) -> ImageParity:
    """The figures of a precision's images on one engine; `perceived` are their LPIPS, if known."""
    pairs = list(zip(made, references, strict=True))
    ratios = [psnr(*pair) for pair in pairs]
    similar = [ssim(*pair) for pair in pairs]
    tolerance, worst = IMAGE_TOLERANCE_DB[precision]
    return ImageParity(
        prompts=len(ratios),
        steps=steps,
        psnr_median_db=round(median(ratios), 2),
        psnr_worst_db=round(min(ratios), 2),
        ssim_median=round(median(similar), 5),
        ssim_worst=round(min(similar), 5),
        tolerance_db=tolerance,
        tolerance_worst_db=worst,
        lpips_median=round(median(perceived), 5) if perceived else None,
        lpips_worst=round(max(perceived), 5) if perceived else None,
    )


def image_rows(found: ImageParity, precision: str, engine: str) -> list[Row]:
    """The two demands on images: on their median, and on the worst of them."""
    bound, worst = found.tolerance_db, found.tolerance_worst_db
    return [
        Row("images, median", precision, engine, found.psnr_median_db, bound, "dB", True),
        Row("images, worst", precision, engine, found.psnr_worst_db, worst, "dB", True),
    ]


def roc_auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The area under the ROC curve: the share of pairs of a positive and a negative in which the
    positive scores higher, ties counted half (Mann and Whitney 1947).

    Raises:
        ParityError: there are no positives, or no negatives.
    """
    positive = np.array([s for s, label in zip(scores, labels, strict=True) if label])
    negative = np.sort([s for s, label in zip(scores, labels, strict=True) if not label])
    if not positive.size or not negative.size:
        raise ParityError("the area under the ROC curve needs photographs of both labels")
    below = np.searchsorted(negative, positive, "left")
    at_most = np.searchsorted(negative, positive, "right")
    return float((below + at_most).mean() / 2 / negative.size)
