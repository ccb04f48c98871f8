"""The watermark in figures: seen how little, found after what, and never where it is not?

    python -m benchmarks.watermark --data datasets/isic2017 --data datasets/ham10000 \\
        --bundle bundles/mini --out benchmarks/results/watermark.json

Real pictures of the datasets, resized to the sizes that are drawn (256 and 512 pixels are enlarged,
so smoother than photographs of that size), and pictures that the bundle draws, are marked, harmed
and looked at again. Every real picture as it is, and pictures drawn, are looked at unmarked, for
false alarms; and their coefficients are scored under many more keys. What a classifier could learn
of the mark is asked by `benchmarks.watermark_shortcut`. Each part is in `--out` as soon as it is
measured, and the same command goes on with what is left. Progress goes to stderr; the last line of
stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.batch import lesions
from benchmarks.machine import environment
from benchmarks.watermark_figures import KEY, Alarms, Pixels, marked, pieces, speed, survival
from benchmarks.watermark_shortcut import shortcut
from dermaflux import files
from dermaflux.command import ended
from dermaflux.dataset import Record, read
from dermaflux.errors import DatasetError
from dermaflux.marks.watermark import ALARM, Watermark
from dermaflux.pipeline import Pipeline
from dermaflux.prompt import caption

SIZES: Final = (128, 256, 512)
PART: Final = 500
"""Unmarked pictures that are looked at before what was found is written."""
_CUT: Final = "unmarked real, cut"


@dataclass(frozen=True)
class Pictures:
    """Where pictures come from; each kind is read or drawn when it is first asked for."""

    folders: tuple[Path, ...]
    bundle: Path
    count: int
    most: int

    @cached_property
    def records(self) -> list[tuple[Path, Record]]:
        """All pictures of the datasets."""
        found = [(folder / one.file_name, one) for folder in self.folders for one in read(folder)]
        if not found:
            raise DatasetError("there are no pictures; name a dataset with --data")
        return found

    @cached_property
    def drawn(self) -> list[Pixels]:
        """`count` pictures that the bundle draws, of a spread of attributes."""
        pipeline = Pipeline.open(self.bundle)
        wanted = lesions(self.count)
        asked = [pipeline.request(caption(one), seed) for seed, one in enumerate(wanted)]
        return [
            image
            for start in tqdm(range(0, self.count, 8), desc="drawing")
            for image in pipeline.generate(asked[start : start + 8])
        ]

    def real(self, side: int, count: int) -> list[Pixels]:
        """`count` pictures from all over the datasets, as squares of `side`."""
        rows = _spread(len(self.records), count)
        return [_picture(self.records[row][0], side) for row in rows]

    def unmarked(self) -> Iterator[list[Path]]:
        """At most `most` pictures, in parts."""
        rows = _spread(len(self.records), self.most)
        for start in range(0, len(rows), PART):
            yield [self.records[row][0] for row in rows[start : start + PART]]


def run(options: argparse.Namespace) -> None:
    """Measure what is not in `--out` yet, part by part."""
    given = Pictures(
        tuple(options.data), options.bundle, options.pictures, options.unmarked
    )  # fmt: skip
    asked = {name: getattr(options, name)
             for name in ("pictures", "unmarked", "cut", "keys", "epochs")}  # fmt: skip
    kept = _kept(options.out, asked)
    for name, work in tqdm(list(sections(given, options)), desc="parts"):
        if name not in kept:
            kept[name] = work()
            _write(options.out, {"asked": asked, **kept})
    result = {"environment": environment(), "alarm_p_value": ALARM, "asked": asked, **_summed(kept)}
    _write(options.out, result)
    print(json.dumps(result))


def sections(
    given: Pictures, options: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of all parts and what measures them, the most wanted first."""
    for number, paths in enumerate(given.unmarked()):
        yield f"unmarked real {number}", partial(_unmarked, paths, options.keys, 0)
    yield "shortcut", lambda: shortcut(
        [
            (_picture(path, 128), one.label, one.split)
            for path, one in given.records
            if path.is_relative_to(given.folders[0])
        ],
        Watermark(KEY), given.bundle, epochs=options.epochs,
    )  # fmt: skip
    for side in SIZES:
        yield f"real, {side} px", partial(_marked_real, given, side)
    yield "drawn", lambda: _marked(given.drawn)
    cut = [path for paths in given.unmarked() for path in paths][: options.cut]
    yield _CUT, partial(_unmarked, cut, options.keys, options.cut)
    yield "unmarked drawn", lambda: Alarms.of(given.drawn, options.keys, cut=0).told()
    yield "speed", lambda: speed({side: given.real(side, 20) for side in SIZES})


def _unmarked(paths: Sequence[Path], keys: int, cut: int) -> dict[str, Any]:
    shown = tqdm(map(_picture, paths), total=len(paths), desc="unmarked", leave=False)
    return asdict(Alarms.of(shown, keys, cut=cut))


def _marked_real(given: Pictures, side: int) -> dict[str, Any]:
    return _marked(given.real(side, given.count))


def _marked(pictures: Sequence[Pixels]) -> dict[str, Any]:
    after, told = marked(pictures)
    return {**told, "found_after": survival(after), "pieces_jpeg_75": pieces(after)}


def _summed(kept: dict[str, Any]) -> dict[str, Any]:
    """The result, with the parts of the unmarked real pictures added up."""
    parts = [name for name in kept if name.startswith("unmarked real")]
    whole, *others = (Alarms(**kept[name]) for name in parts if name != _CUT)
    told = {"unmarked real": sum(others, start=whole).told(), _CUT: Alarms(**kept[_CUT]).told()}
    return told | {name: value for name, value in kept.items() if name not in parts}


def _kept(out: Path | None, asked: dict[str, int]) -> dict[str, Any]:
    """The parts that an earlier call of the same settings left; a whole result is begun anew."""
    if out is None or not out.exists():
        return {}
    found = json.loads(out.read_bytes())
    if "unmarked real" in found:
        return {}
    if found.pop("asked") != asked:
        raise DatasetError(
            f"{out} has parts of other settings; move it away, or name another --out"
        )
    return dict(found)


def _write(out: Path | None, result: dict[str, Any]) -> None:
    if out is not None:
        files.write(out, (json.dumps(result, indent=1) + "\n").encode())


def _picture(path: Path, side: int | None = None) -> Pixels:
    """uint8 [h, w, 3], squashed to a square of `side`."""
    with Image.open(path) as one:
        rgb = one.convert("RGB")
        if side is not None:
            rgb = rgb.resize((side, side), Image.Resampling.LANCZOS)
        return np.asarray(rgb)


def _spread(total: int, count: int) -> list[int]:
    return [int(i) for i in np.linspace(0, total - 1, min(count, total))]


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
