"""What the watermark survives, how little it shows, and what unmarked pictures score.

    >>> after, told = marked(pictures)
    >>> told["psnr_db"], survival(after)["JPEG 50"]["present"]

The parts that `benchmarks.watermark` puts together; see there.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dermaflux.images import encode
from dermaflux.marks import Keys, crops
from dermaflux.marks.credentials import Credentials
from dermaflux.marks.spectrum import coefficients, luminance
from dermaflux.marks.symbols import Signs
from dermaflux.marks.watermark import ALARM, Watermark

Pixels = NDArray[np.uint8]
Harm = Callable[[Pixels], Pixels]

KEY: Final = b"the key of this benchmark"
PAYLOAD: Final = b"\x01\x02\x03\x04"
RECORD: Final = {"bundle": "sha256:" + "5f" * 32, "seed": "7", "pixels_sha256": "5f" * 32}
PARTS: Final = (0.9, 0.75, 0.5)


def jpeg(quality: int) -> Harm:
    """Saved as JPEG with Pillow's usual chroma subsampling."""

    def harmed(pixels: Pixels) -> Pixels:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
        with Image.open(stream) as picture:
            return np.asarray(picture)

    return harmed


def scaled(factor: float) -> Harm:
    """Resized by `factor` with bicubic interpolation, and not back."""

    def harmed(pixels: Pixels) -> Pixels:
        height, width = (round(side * factor) for side in pixels.shape[:2])
        size = (width, height)
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))

    return harmed


def noisy(pixels: Pixels) -> Pixels:
    """Normal noise of 5 grey levels on every value."""
    noise = np.random.default_rng(pixels.size).normal(0, 5, pixels.shape)
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


HARMS: Final[dict[str, Sequence[Harm]]] = {
    "nothing": (),
    "JPEG 75": (jpeg(75),),
    "JPEG 50": (jpeg(50),),
    "JPEG 30": (jpeg(30),),
    "resized to 50 %": (scaled(0.5),),
    "resized to 73 %": (scaled(0.73),),
    "resized to 200 %": (scaled(2.0),),
    "resized to 50 %, JPEG 75": (scaled(0.5), jpeg(75)),
    "resized to 200 %, JPEG 50": (scaled(2.0), jpeg(50)),
    "noise of 5 grey levels": (noisy,),
}


def marked(pictures: Sequence[Pixels]) -> tuple[list[Pixels], dict[str, Any]]:
    """The pictures with the mark, and how far from them they are."""
    from skimage import metrics

    similarity: Any = metrics.structural_similarity  # untyped

    mark = Watermark(KEY)
    made = [mark.embed(one, PAYLOAD) for one in tqdm(pictures, desc="marking")]
    psnr = [one.psnr_db for one in made if one.psnr_db is not None]
    ssim = [
        similarity(before, after.pixels, channel_axis=2)
        for before, after in zip(pictures, made, strict=True)
    ]
    return [one.pixels for one in made], {
        "pictures": len(made),
        "psnr_db": {"median": _round(np.median(psnr)), "worst": _round(min(psnr))},
        "ssim": {"median": _round(np.median(ssim), 4), "worst": _round(min(ssim), 4)},
        "at_least_40_db": _share(value >= 40 for value in psnr),
        "sure": _share(one.sure for one in made),
    }


def survival(pictures: Sequence[Pixels]) -> dict[str, Any]:
    """How many marked pictures are still known after each harm."""
    mark = Watermark(KEY)
    told = {}
    for name, harms in tqdm(HARMS.items(), desc="harms"):
        found = []
        for one in pictures:
            for harm in harms:
                one = harm(one)
            found.append(mark.find(one))
        scores = [one.score for one in found]
        told[name] = {
            "present": _share(one.present for one in found),
            "payload": _share(one.payload == PAYLOAD for one in found),
            "score_median": _round(np.median(scores)),
            "score_worst": _round(min(scores)),
        }
    return told


def pieces(pictures: Sequence[Pixels], *, quality: int = 75) -> dict[str, Any]:
    """How many pieces of marked pictures are known, cut anywhere and saved as JPEG."""
    mark, dice = Watermark(KEY), np.random.default_rng(0)
    told = {}
    for part in tqdm(PARTS, desc="pieces"):
        found = [crops.find(mark, jpeg(quality)(_cut(one, part, dice))) for one in pictures]
        told[f"{part:.0%} of each side"] = _share(one is not None and one.found.present
                                                  for one in found)  # fmt: skip
    return told


@dataclass
class Alarms:
    """What unmarked pictures scored: in a whole search, as pieces, and under many other keys.

    Parts can be added up. `sums` are the count, sum and sum of squares of `scores` under other
    keys, which chance alone makes: normal with mean 0 and deviation 1.
    """

    p_values: list[float]
    p_values_of_pieces: list[float]
    largest: float
    over_4: int
    sums: tuple[float, float, float]

    @classmethod
    def of(cls, pictures: Iterable[Pixels], keys: int, *, cut: int) -> Alarms:
        """Look at pictures; at the first `cut` of them as pieces of three quarters a side too."""
        mark, dice = Watermark(KEY), np.random.default_rng(1)
        signs = np.stack([Signs.of(b"another key %d" % n, 64).base.ravel() for n in range(keys)])
        weights = signs.astype(np.float32)
        found = cls([], [], -np.inf, 0, (0, 0, 0))
        for number, one in enumerate(pictures):
            p_values, of_pieces = [mark.find(one).p_value], []
            if number < cut:
                crop = crops.find(mark, _cut(one, 0.75, dice), [(256, 256), (512, 512)])
                of_pieces += [] if crop is None else [crop.found.p_value]
            seen = coefficients(luminance(one), 64).ravel()
            length = max(float(np.sqrt(np.sum(seen * seen))), 1e-9)
            scores = weights @ seen / length
            sums = (scores.size, float(scores.sum()), float((scores**2).sum()))
            found += cls(p_values, of_pieces, float(scores.max()), int((scores > 4).sum()), sums)
        return found

    def __add__(self, other: Alarms) -> Alarms:
        count, total, squares = (a + b for a, b in zip(self.sums, other.sums, strict=True))
        return Alarms(
            self.p_values + other.p_values,
            self.p_values_of_pieces + other.p_values_of_pieces,
            max(self.largest, other.largest),
            self.over_4 + other.over_4,
            (count, total, squares),
        )

    def told(self) -> dict[str, Any]:
        """The figures, for the result."""
        count, total, squares = self.sums
        mean = total / count
        return {
            "pictures": len(self.p_values),
            "alarms": sum(p <= ALARM for p in self.p_values),
            "p_value_at_most_1e-2": sum(p <= 1e-2 for p in self.p_values),
            "p_value_smallest": min(self.p_values),
            "pieces": len(self.p_values_of_pieces),
            "alarms_of_pieces": sum(p <= ALARM for p in self.p_values_of_pieces),
            "p_value_smallest_of_pieces": min(self.p_values_of_pieces, default=None),
            "scores_under_other_keys": {
                "scores": int(count),
                "mean": _round(mean, 4),
                "deviation": _round(np.sqrt(max(squares / count - mean * mean, 0)), 4),
                "largest": _round(self.largest),
                "over_4": self.over_4,
                # The share of a normal distribution above 4.
                "over_4_if_normal": _round(count * 3.167e-5, 1),
            },
        }


def speed(pictures: dict[int, list[Pixels]]) -> dict[str, Any]:
    """Median milliseconds on one thread, and bytes that a signature adds."""
    told: dict[str, Any] = {}
    mark = Watermark(KEY)
    with tempfile.TemporaryDirectory() as folder:
        credentials = Credentials(Keys.open(Path(folder) / "keys"))
        for size, some in pictures.items():
            plain = [encode(one, {"seed": "7"}) for one in some]
            signed = [credentials.sign(one, "png", RECORD) for one in plain]
            told[f"{size} px"] = {
                "watermark_ms": _milliseconds(mark.embed, some),
                "find_ms": _milliseconds(mark.find, some),
                "find_piece_ms": _milliseconds(partial(crops.find, mark), some),
                "sign_png_ms": _milliseconds(
                    partial(credentials.sign, form="png", record={}), plain
                ),
                "read_png_ms": _milliseconds(partial(credentials.read, form="png"), signed),
            }
            told["signature_bytes"] = len(signed[0]) - len(plain[0])
    return told


def _milliseconds(work: Callable[[Any], object], ones: Sequence[Any]) -> float:
    work(ones[0])
    times = []
    for one in ones:
        started = time.perf_counter()
        work(one)
        times.append(time.perf_counter() - started)
    return _round(1e3 * np.median(times))


def _cut(pixels: Pixels, part: float, dice: np.random.Generator) -> Pixels:
    height, width = (round(side * part) for side in pixels.shape[:2])
    top = int(dice.integers(pixels.shape[0] - height + 1))
    left = int(dice.integers(pixels.shape[1] - width + 1))
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def _share(values: Iterable[bool]) -> float:
    found = list(values)
    return _round(sum(found) / len(found), 4)


def _round(value: float | np.floating[Any], digits: int = 2) -> float:
    return round(float(value), digits)
