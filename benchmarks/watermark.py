"""The watermark in figures: seen how little, found after what, and never where it is not?

    python -m benchmarks.watermark --data datasets/isic2017 --data datasets/ham10000 \\
        --bundle bundles/mini --out benchmarks/results/watermark.json

Real pictures of the datasets, resized to the sizes that are drawn (256 and 512 pixels are enlarged,
so smoother than photographs of that size), and pictures that the bundle draws, are marked, harmed
and looked at again. Every real picture as it is, and pictures drawn, are looked at unmarked, for
false alarms; and their coefficients are scored under many more keys. What a classifier could learn
of the mark is asked by `benchmarks.watermark_shortcut`. Progress goes to stderr; the last line of
stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from benchmarks.batch import lesions
from benchmarks.latency import environment
from benchmarks.watermark_shortcut import shortcut
from dermaflux import files
from dermaflux.command import ended
from dermaflux.dataset import Record, read
from dermaflux.errors import DatasetError
from dermaflux.images import encode
from dermaflux.marks import Keys, crops
from dermaflux.marks.credentials import Credentials
from dermaflux.marks.spectrum import coefficients, luminance
from dermaflux.marks.symbols import Signs
from dermaflux.marks.watermark import ALARM, Watermark
from dermaflux.pipeline import Pipeline
from dermaflux.prompt import caption

Pixels = NDArray[np.uint8]
Harm = Callable[[Pixels], Pixels]

KEY: Final = b"the key of this benchmark"
PAYLOAD: Final = b"\x01\x02\x03\x04"
RECORD: Final = {"bundle": "sha256:" + "5f" * 32, "seed": "7", "pixels_sha256": "5f" * 32}
SIZES: Final = (128, 256, 512)
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


def alarms(pictures: Iterable[Pixels], keys: int, *, cut: int) -> dict[str, Any]:
    """What unmarked pictures score: in a whole search, under many keys, and `cut` of them cut."""
    mark, dice = Watermark(KEY), np.random.default_rng(1)
    signs = np.stack([Signs.of(b"another key %d" % n, 64).base.ravel() for n in range(keys)])
    signs = signs.astype(np.float32)
    smallest: list[float] = []
    scores: list[NDArray[Any]] = []
    piece: list[float] = []
    for one in tqdm(pictures, desc="unmarked"):
        smallest.append(mark.find(one).p_value)
        seen = coefficients(luminance(one), 64).ravel()
        length = max(float(np.sqrt(np.sum(seen * seen))), 1e-9)
        scores.append(signs @ seen / length)
        if len(piece) < cut:
            crop = crops.find(mark, _cut(one, 0.75, dice), [(256, 256), (512, 512)])
            piece += [] if crop is None else [crop.found.p_value]
    every = np.concatenate(scores)
    return {
        "pictures": len(smallest),
        "alarms": int(sum(p <= ALARM for p in smallest)),
        "p_value_at_most_1e-2": int(sum(p <= 1e-2 for p in smallest)),
        "p_value_smallest": min(smallest),
        "pieces": len(piece),
        "alarms_of_pieces": int(sum(p <= ALARM for p in piece)),
        "p_value_smallest_of_pieces": min(piece, default=None),
        "scores_under_other_keys": {
            "keys": keys,
            "scores": every.size,
            "mean": _round(every.mean(), 4),
            "deviation": _round(every.std(), 4),
            "largest": _round(every.max()),
            "over_4": int((every > 4).sum()),
            "over_4_if_normal": _round(every.size * 3.167e-5, 1),
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


def drawn(bundle: Path, count: int) -> list[Pixels]:
    """Pictures that the bundle draws, of a spread of attributes."""
    pipeline = Pipeline.open(bundle)
    asked = [pipeline.request(caption(one), seed) for seed, one in enumerate(lesions(count))]
    return [
        image
        for start in tqdm(range(0, count, 8), desc="drawing")
        for image in pipeline.generate(asked[start : start + 8])
    ]


def listed(folders: Sequence[Path]) -> list[tuple[Path, Record]]:
    """All pictures of the datasets."""
    found = [(folder / one.file_name, one) for folder in folders for one in read(folder)]
    if not found:
        raise DatasetError("there are no pictures; name a dataset with --data")
    return found


def picture(path: Path, side: int | None = None) -> Pixels:
    """uint8 [h, w, 3], squashed to a square of `side`."""
    with Image.open(path) as one:
        rgb = one.convert("RGB")
        if side is not None:
            rgb = rgb.resize((side, side), Image.Resampling.LANCZOS)
        return np.asarray(rgb)


def run(options: argparse.Namespace) -> None:
    everything = listed(options.data)
    some = [everything[i][0] for i in _spread(len(everything), options.pictures)]
    real = {size: [picture(path, size) for path in some] for size in SIZES}
    synthetic = drawn(options.bundle, options.pictures)
    result: dict[str, Any] = {"environment": environment(), "alarm_p_value": ALARM}
    sets = {f"real, {size} px": ones for size, ones in real.items()}
    sets[f"drawn, {len(synthetic[0])} px"] = synthetic
    for name, ones in sets.items():
        after, told = marked(ones)
        result[name] = {**told, "found_after": survival(after), "pieces_jpeg_75": pieces(after)}
    unmarked = [everything[i][0] for i in _spread(len(everything), options.unmarked)]
    result["unmarked real"] = alarms(map(picture, unmarked), options.keys, cut=options.cut)
    result["unmarked drawn"] = alarms(synthetic, options.keys, cut=0)
    result["speed"] = speed({size: ones[:20] for size, ones in real.items()})
    records = [(path, one) for path, one in everything if path.is_relative_to(options.data[0])]
    result["shortcut"] = shortcut(
        [(picture(path, 128), one.label, one.split) for path, one in records], Watermark(KEY),
        options.bundle, epochs=options.epochs,
    )  # fmt: skip
    line = json.dumps(result)
    if options.out is not None:
        files.write(options.out, (json.dumps(result, indent=1) + "\n").encode())
    print(line)


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


def _spread(total: int, count: int) -> list[int]:
    return [int(i) for i in np.linspace(0, total - 1, min(count, total))]


def _share(values: Iterable[bool]) -> float:
    found = list(values)
    return _round(sum(found) / len(found), 4)


def _round(value: float | np.floating[Any], digits: int = 2) -> float:
    return round(float(value), digits)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.watermark", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--data", type=Path, action="append", required=True, help="a dataset; may be repeated, "
        "the shortcut is sought in the first")  # fmt: skip
    add("--bundle", type=Path, default=Path("bundles/mini"))
    add("--pictures", type=int, default=200, help="marked of each size, and drawn")
    add("--unmarked", type=int, default=1_000_000, help="real ones at most, for false alarms")
    add("--cut", type=int, default=300, help="of those that are cut and looked at as pieces")
    add("--keys", type=int, default=100, help="more keys that unmarked pictures are scored under")
    add("--epochs", type=int, default=12, help="of the small network that looks for the shortcut")
    add("--out", type=Path, help="write the result here too")
    options = parser.parse_args(arguments)
    for name in ("pictures", "unmarked", "keys", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} measures nothing; use 1 or more")
    return ended(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
