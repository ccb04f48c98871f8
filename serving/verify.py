"""Was this picture drawn here? What still holds of its marks, after whatever was done to it.

    python -m serving.verify lesion.png --marks /var/lib/dermaflux/marks
    DERMAFLUX_MARKS=/var/lib/dermaflux/marks python -m serving.verify received/*.jpg

For each file: whether its signed manifest holds, whether exactly these pixels were drawn here, and
whether the watermark is in them, whole or in a piece cut out of a picture. Without a folder of
marks only the manifest is read, and no signer is trusted. Sentences come first, one JSON object
last. Status: 0 every file was shown to be synthetic, 1 of one or more nothing shows it (which does
not make it a photograph), 2 a file is no picture or cannot be read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from dermaflux.command import ended
from dermaflux.errors import ImageError
from dermaflux.marks import Keys, Registry, verify
from dermaflux.marks.credentials import Credentials
from dermaflux.marks.crops import SIZES
from dermaflux.marks.marking import KEYS, REGISTRY

VARIABLE: Final = "DERMAFLUX_MARKS"
MAX_BYTES: Final = 100_000_000
"""Of a file: forty million pixels fit."""


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    files: tuple[Path, ...]
    marks: Path | None
    crops: bool


def run(settings: Settings) -> int:
    """Look at every file; one that cannot be read does not stop the others."""
    keys = None if settings.marks is None else Keys.open(settings.marks / KEYS, make=False)
    registry = None if settings.marks is None else Registry(settings.marks / REGISTRY)
    credentials = Credentials(keys)
    told: list[dict[str, Any]] = []
    for path in tqdm(settings.files, disable=len(settings.files) < 10, desc="files"):
        try:
            verdict = verify(
                _read(path), keys, registry, sizes=SIZES if settings.crops else (),
                credentials=credentials,
            )  # fmt: skip
        except (ImageError, OSError) as error:
            words = error.strerror if isinstance(error, OSError) else None
            told.append({"file": str(path), "error": words or str(error)})
        else:
            told.append({"file": str(path), **verdict.as_json()})
        _say(path, told[-1])
    failed = sum("error" in one for one in told)
    shown = sum(bool(one.get("shown")) for one in told)
    counts = {"shown": shown, "not_shown": len(told) - shown - failed, "failed": failed}
    print(json.dumps({**counts, "files": told}))
    return 2 if failed else int(counts["not_shown"] > 0)


def _read(path: Path) -> bytes:
    with path.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"the file has more than {MAX_BYTES:,} bytes")
    return data


def _say(path: Path, told: dict[str, Any]) -> None:
    words = (
        " ".join(told["sentences"]) if "sentences" in told else f"not looked at: {told['error']}"
    )
    print(f"{path}: {words}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serving.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="PNG, JPEG or WebP")
    known = os.environ.get(VARIABLE, "").strip()
    parser.add_argument(
        "--marks",
        type=Path,
        default=Path(known) if known else None,
        help=f"the service's folder of keys and registry; {VARIABLE} if not given",
    )
    parser.add_argument(
        "--no-crops",
        action="store_true",
        help="do not look whether it is a piece of a marked picture (that takes up to a second)",
    )
    given = parser.parse_args(arguments)
    settings = Settings(tuple(given.files), given.marks, crops=not given.no_crops)
    return ended(lambda: run(settings))


if __name__ == "__main__":
    sys.exit(main())
