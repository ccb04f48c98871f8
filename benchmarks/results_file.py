"""What every result has: which command, on what machine, of which bundle. One JSON object.

>>> finish("latency", {"rounds": 15, "variants": table}, sys.argv[1:], Path("latency.json"), bundle)
{"benchmark": "latency", "command": "python -m benchmarks.latency --out latency.json", ...}
"""

from __future__ import annotations

import errno
import json
import math
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from dermaflux import files
from dermaflux.bundle import Bundle


def require_place(out: Path | None) -> None:
    """Nothing where `out` can be written: asked before minutes of measuring.

    Raises:
        OSError: it cannot.
    """
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, where a file is to be written", str(out))
    with tempfile.TemporaryFile(dir=out.parent):
        pass


def told(value: Any) -> Any:
    """The same without numbers that JSON has no word for: None in the place of NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: told(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [told(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep(name: str, result: Mapping[str, Any], out: Path | None) -> None:
    """What is there so far, `unfinished` until the run ends."""
    if out is not None:
        whole = told({"benchmark": name, "unfinished": True, **result})
        files.write(out, (json.dumps(whole, indent=2) + "\n").encode())


def finish(
    name: str,
    result: Mapping[str, Any],
    words: Sequence[str],
    out: Path | None,
    bundle: Bundle | None = None,
) -> dict[str, Any]:
    """Write a result to `out`, whole or not at all, and print it as the last line of stdout.

    `name` is the module's within `benchmarks`, `words` are those of its command line. A result that
    already has an `environment`, taken before it measured (`machine.before_measuring`), keeps that;
    to it are added the load of the machine afterwards and what other processes took meanwhile.

    Raises:
        OSError: `out` cannot be written; the line is printed first.
    """
    environment = result.get("environment") or machine.environment()
    whole: dict[str, Any] = {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *words]),
        "environment": machine.after_measuring(environment),
    }
    if bundle is not None:
        whole["bundle"] = {"name": bundle.name, "id": bundle.id}
    whole |= {key: value for key, value in result.items() if key not in whole}
    whole = told(whole)
    print(json.dumps(whole), flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write(out, (json.dumps(whole, indent=2) + "\n").encode())
    return whole
