"""How much room a kit takes where it is installed, and so in an image, added up from its files.

    python -m deploy.sizes dist/kit

Wheels are counted unpacked. What stands beside them in an image is its base. The last line on
stdout is one JSON object, in bytes; before it come the ten largest libraries.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dermaflux.command import ended, option, parsed


@dataclass(frozen=True)
class Settings:
    """What the command takes."""

    kit: Path = option("the kit's folder")


def unpacked(wheel: Path) -> int:
    """Bytes of a wheel's files, as installed."""
    with zipfile.ZipFile(wheel) as archive:
        return sum(one.file_size for one in archive.infolist())


def sizes(kit: Path) -> dict[str, int]:
    """Bytes of libraries, models and code where they are installed, and of all of them."""
    parts = {
        "libraries": sum(map(unpacked, (kit / "wheels").glob("*.whl"))),
        "bundle": _files(kit / "bundle"),
        "bento": _files(kit / "bento"),
    }
    return {**parts, "installed": sum(parts.values())}


def _files(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(arguments: Sequence[str] | None = None) -> int:
    """Add up, and print."""
    settings = parsed(Settings, "python -m deploy.sizes", "How much room a kit takes.", arguments)

    def work() -> None:
        wheels = sorted((settings.kit / "wheels").glob("*.whl"), key=unpacked, reverse=True)
        for wheel in wheels[:10]:
            print(f"{unpacked(wheel) / 1e6:8.1f} MB  {wheel.name.split('-')[0]}")
        print(json.dumps(sizes(settings.kit)))

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
