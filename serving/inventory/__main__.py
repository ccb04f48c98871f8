"""What is shipped, for those who have to know: bills of materials in CycloneDX, and the SOUP list.

    python -m serving.inventory                                    # docs/hospital, software alone
    python -m serving.inventory bundles/mini --out kit --wheels kit/wheels --time 2026-01-31

Writes `sbom.cdx.json` and `soup.md`, and with a bundle `mlbom.cdx.json`. Run it in a checkout with
its environment: what libraries say of themselves is read from the installed packages. Equal inputs
give equal files; a time stands in them only if it is given.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dermaflux import files
from dermaflux.bundle import Bundle
from dermaflux.command import ended, option, parsed
from serving.inventory.bom import moment, software, written
from serving.inventory.models import models
from serving.inventory.packages import EXTRAS, shipped, version_of
from serving.inventory.soup import soup


@dataclass(frozen=True)
class Settings:
    """What the command takes."""

    bundle: Path | None = option("a bundle, for the bill of its models", None, position=True)
    out: Path = option("folder", Path("docs/hospital"))
    extras: tuple[str, ...] = option(f"of pyproject.toml; default: {','.join(EXTRAS)}", EXTRAS)
    wheels: Path | None = option("folder of wheels, whose sha256 are told", None)
    time: str = option("what the documents say of their making, ISO 8601; default: nothing", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files; status 0, or 2 where something cannot be told."""
    settings = parsed(Settings, "python -m serving.inventory", "What is shipped.", arguments)

    def work() -> None:
        root, time = Path(), moment(settings.time) if settings.time else ""
        packages = shipped(root, settings.extras, settings.wheels)
        version = version_of(root)
        made = {
            "sbom.cdx.json": written(software(packages, version, time)),
            "soup.md": soup(packages, version),
        }
        if settings.bundle is not None:
            made["mlbom.cdx.json"] = written(models(Bundle.open(settings.bundle), time))
        settings.out.mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            files.write(settings.out / name, text.encode())
        hashes = sum(bool(one.sha256) for one in packages)
        told = {"out": str(settings.out), "files": sorted(made), "packages": len(packages)}
        print(json.dumps({**told, "hashes": hashes}))

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
