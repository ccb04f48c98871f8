"""The gate before the classifier: is this a picture that it can judge, and if not, why.

A classifier answers whatever it is shown; a black picture is "malignant" to one that has seen only
lesions. The gate asks three things, each with a limit that was set on validation pictures: was the
picture well taken (light, contrast, sharpness), does it look like those that the classifier learnt
from (`dermaflux.appearance`), and do the classifier's own features say so too. The limits and
the statistics travel in the bundle; `python -m training.intake` makes both.

    >>> intake = Intake.open(spec, Path("bundles/mini"))
    >>> intake.reasons(Image.new("RGB", (224, 224)), features)
    (Reason(code='too_dark', text='The picture is too dark: ...'), ...)
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermaflux.appearance import Quality, describe, measure, square
from dermaflux.density import Density
from dermaflux.errors import BundleError
from dermaflux.flow import Floats
from dermaflux.manifest import IntakeSpec

Code = Literal[
    "too_small", "too_dark", "too_bright", "no_contrast", "blurred", "noisy", "unlike_training",
    "other_texture", "unlike_features",
]  # fmt: skip
APPEARANCE: Final = "appearance"
FEATURES: Final = "features"
LESIONS: Final = "lesions"
TEXTURES: Final = "textures"
PARTS: Final = (APPEARANCE, FEATURES, LESIONS, TEXTURES)


@dataclass(frozen=True)
class Reason:
    """Why a picture is not judged: a word for programs, a sentence for people."""

    code: Code
    text: str


@dataclass(frozen=True)
class Look:
    """All that the gate asks of a picture itself: its shorter side in pixels, how well it was
    taken, and its description float32 [124]. A few numbers where the picture may be 100 MB."""

    side: int
    quality: Quality
    description: Floats


def look(picture: Image.Image) -> Look:
    """An RGB picture, as the gate looks at it."""
    pixels = square(picture)
    return Look(min(picture.size), measure(pixels), describe(pixels))


@dataclass(frozen=True)
class Intake:
    """The gate with its limits and statistics: densities of descriptions (`dermaflux.appearance`),
    of these with the classifier's features, and two of descriptions in the same axes, of lesions
    and of textures of other things, of which the ratio counts."""

    spec: IntakeSpec
    appearance: Density
    features: Density
    lesions: Density
    textures: Density

    @classmethod
    def open(cls, spec: IntakeSpec, folder: str | os.PathLike[str]) -> Intake:
        """The gate of a bundle's or a checkpoint's folder.

        Raises:
            BundleError: the file of statistics is missing, damaged, or not of this form.
        """
        file = Path(folder) / spec.file
        try:
            with np.load(file, allow_pickle=False) as arrays:
                content = {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise BundleError(f"the statistics {file} cannot be read: {error}") from error
        return cls(spec, *(Density.of(_part(content, name)) for name in PARTS))

    def reasons(self, picture: Image.Image | Look, features: Floats) -> tuple[Reason, ...]:
        """Why an RGB picture with the classifier's features [F] is not to be judged; empty where it
        is. The worst first: what is wrong with the picture, then what it shows.

        Raises:
            BundleError: the statistics are of features of another length.
        """
        seen = picture if isinstance(picture, Look) else look(picture)
        return tuple(self._found(seen, features))

    def scores(self, picture: Image.Image, features: Floats) -> tuple[Quality, float, float, float]:
        """The quality; how usual appearance and features are (logarithms of densities); and the
        logarithm of the odds that it is a lesion rather than a texture of something else."""
        seen = look(picture)
        return seen.quality, *self._usual(seen, features)

    def _usual(self, seen: Look, features: Floats) -> tuple[float, float, float]:
        both = np.concatenate([seen.description, features.astype(np.float32)])
        if both.shape[0] != self.features.mean.shape[0]:
            raise BundleError(
                f"the statistics {self.spec.file} are of {self.features.mean.shape[0]} numbers, "
                f"the classifier gives {both.shape[0]}; fit them with: python -m training.intake"
            )
        odds = self.lesions.score(seen.description) - self.textures.score(seen.description)
        return self.appearance.score(seen.description), self.features.score(both), odds

    def _found(self, seen: Look, features: Floats) -> Iterator[Reason]:
        usual, both, odds = self._usual(seen, features)
        if seen.side < self.spec.min_side:
            yield Reason(
                "too_small",
                f"The picture is too small: {seen.side} pixels on its shorter side, at least "
                f"{self.spec.min_side} are needed.",
            )
        yield from faults(seen.quality, self.spec)
        if usual < self.spec.appearance:
            yield Reason(
                "unlike_training",
                "The picture does not look like the dermoscopic pictures of lesions that the "
                f"classifier learnt from: {usual:.1f}, at least {self.spec.appearance:.1f} needed.",
            )
        if odds < self.spec.textures:
            yield Reason(
                "other_texture",
                "The picture has the texture of something else than skin: "
                f"{odds:.1f}, at least {self.spec.textures:.1f} needed.",
            )
        if both < self.spec.features:
            yield Reason(
                "unlike_features",
                "What the classifier sees in the picture is unlike the lesions that it learnt "
                f"from: {both:.1f}, at least {self.spec.features:.1f} needed.",
            )


def faults(quality: Quality, spec: IntakeSpec) -> Iterator[Reason]:
    """What is wrong with how a picture was taken."""
    if quality.light < spec.light:
        yield Reason(
            "too_dark",
            f"The picture is too dark: its bright parts have grey value {quality.light:.0f} of "
            f"255, at least {spec.light:.0f} needed.",
        )
    if quality.shade > spec.shade or quality.clipped > spec.clipped:
        yield Reason(
            "too_bright",
            f"The picture is overexposed: {quality.clipped:.0%} of it is at the end of the scale "
            f"(at most {spec.clipped:.0%}), its dark parts have grey value {quality.shade:.0f} (at "
            f"most {spec.shade:.0f}).",
        )
    if quality.contrast < spec.contrast:
        yield Reason(
            "no_contrast",
            f"The picture shows almost nothing: its grey values spread by {quality.contrast:.1f}, "
            f"at least {spec.contrast:.1f} needed.",
        )
    if quality.sharpness < spec.sharpness:
        yield Reason(
            "blurred",
            f"The picture is blurred: sharpness {quality.sharpness:.2f}, at least "
            f"{spec.sharpness:.2f} needed.",
        )
    if quality.grain > spec.grain:
        yield Reason(
            "noisy",
            f"The picture is full of noise or fine lines: {quality.grain:.2f}, at most "
            f"{spec.grain:.2f} allowed.",
        )


def arrays_of(densities: Sequence[Density]) -> dict[str, NDArray[Any]]:
    """The content of the file of statistics, of densities in the order of `PARTS`."""
    return {
        f"{name}.{key}": value
        for name, density in zip(PARTS, densities, strict=True)
        for key, value in vars(density).items()
    }


def _part(arrays: dict[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    return {
        key.removeprefix(f"{name}."): value
        for key, value in arrays.items()
        if key.startswith(f"{name}.")
    }
