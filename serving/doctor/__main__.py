"""Is everything right to serve here? The settings are those of the environment, as the service's.

    python -m serving.doctor
    DERMAFLUX_KEYS=keys.jsonl python -m serving.doctor bundles/mini --port 3000
    python -m serving.doctor --golden --json

Each finding is `ok`, `note` or `fail`, with what mends it. Status: 0 nothing failed, 1 something
did. The last line on stdout is JSON: counts, or with `--json` the whole report.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dermaflux.command import ended, option, parsed
from dermaflux.errors import BundleError
from serving.doctor.finding import FAIL, Finding
from serving.doctor.report import Report, report
from serving.settings import SettingError, Settings
from serving.sources import find_bundle


@dataclass(frozen=True)
class Options:
    """What the command takes."""

    bundle: Path | None = option(
        "the bundle's folder; default: that of the settings, or bundles/mini", None, position=True
    )
    port: tuple[str, ...] = option("comma-separated PORT or HOST:PORT that have to be free", ())
    golden: bool = option("draw the golden image and compare", False)
    quick: bool = option("leave out what reads every file of the bundle", False)
    json: bool = option("the whole report as one line, for programs", False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Look, print, and say whether anything failed."""
    options = parsed(
        Options, "python -m serving.doctor", "Is everything right to serve here?", arguments
    )

    def work() -> int:
        found = _examined(options)
        if options.json:
            print(json.dumps(found.as_json()))
        else:
            print(found)
            print(json.dumps({"bundle": found.id, "healthy": found.healthy, **found.counts()}))
        return 0 if found.healthy else 1

    return ended(work)


def _examined(options: Options) -> Report:
    try:
        settings, wrong = Settings.from_environment(os.environ), []
    except SettingError as error:
        # The rest is looked at with what the settings are by themselves.
        settings, wrong = Settings(), [Finding("settings", FAIL, str(error))]
    try:
        bundle = options.bundle or find_bundle(settings)
    except BundleError:
        bundle = Path("bundles/mini")
    addresses = [port if ":" in port else f"127.0.0.1:{port}" for port in options.port]
    found = report(
        settings, bundle, core=not options.quick, golden=options.golden, addresses=addresses
    )
    return replace(found, findings=(*wrong, *found.findings))


if __name__ == "__main__":
    sys.exit(main())
