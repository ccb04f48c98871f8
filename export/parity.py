"""How far an export is from eager torch, and how far it may be. Arithmetic only.

Tolerances and their reasons:

* fp32 parts, 5e-4 of the largest output: a wrong operator, epsilon or layout makes 1e-3 and more.
  Float32 sums in another order make 1e-6 to 1e-5, and those over the two million numbers that a
  group norm of a VAE sees at 1024 pixels were measured at 1.5e-4.
* fp32 images, a median of 60 dB: where one byte in fifteen differs by one level of 255.
* int8 parts, a quarter of the largest output: a guard against broken ranges only, since the error
  of a single step says little of the image.
* int8 images, a median of 30 dB: the usual bound of a good lossy copy of a photograph.
* Probabilities, 0.001 in fp32 and 0.05 in int8: what a reader of two digits does not see, and half
  of the bins that calibration is measured in.

The worst image may be 10 dB below the median's bound: a few steps amplify rounding wherever the
text leaves the image open.
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

PART_TOLERANCE: Final[Mapping[str, float]] = {"fp32": 5e-4, "int8": 0.25}
IMAGE_TOLERANCE_DB: Final[Mapping[str, float]] = {"fp32": 60.0, "int8": 30.0}
PROBABILITY_TOLERANCE: Final[Mapping[str, float]] = {"fp32": 0.001, "int8": 0.05}
WORST_BELOW_MEDIAN_DB: Final = 10.0
EQUAL_DB: Final = 99.0
"""Stands for the endless PSNR of equal images, since JSON has no infinity."""


class ParityError(DermaFluxError):
    """An export is too far from its model; the message holds the table of measurements."""


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

    def bind(self, constant: Arrays) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`."""
        step = self.engine.bind(constant)

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
            "Leave int8 out with --precision fp32"
            if precisions == {"int8"}
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


def image_parity(ratios: Sequence[float], steps: int, precision: str) -> ImageParity:
    """The figures of a precision's images on one engine, from their PSNR in dB."""
    return ImageParity(
        prompts=len(ratios),
        steps=steps,
        psnr_median_db=round(median(ratios), 2),
        psnr_worst_db=round(min(ratios), 2),
        tolerance_db=IMAGE_TOLERANCE_DB[precision],
    )


def image_rows(found: ImageParity, precision: str, engine: str) -> list[Row]:
    """The two demands on images: on their median, and on the worst of them."""
    bound = found.tolerance_db
    worst = bound - WORST_BELOW_MEDIAN_DB
    return [
        Row("images, median", precision, engine, found.psnr_median_db, bound, "dB", True),
        Row("images, worst", precision, engine, found.psnr_worst_db, worst, "dB", True),
    ]
