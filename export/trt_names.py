"""The names that TensorRT's Python bindings export, read without TensorRT's libraries.

    pip download tensorrt-cu13-bindings==11.4.0.106 --no-deps -d wheels
    python -m export.trt_names wheels/*.whl

A wheel of the bindings is an extension module alone. It is loaded here, in a process of its own,
over empty libraries that carry the names of those it is linked to, so that its classes can be asked
for their members and parameters and nothing can run. Only names, facts, are written: to
`export/trt_names.json`, with which a test compares every call of ours. Needs a C compiler `cc`, and
the wheels' own version of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from dermaflux import files
from dermaflux.errors import EngineError

TARGET: Final = Path(__file__).with_name("trt_names.json")
CLASSES: Final = (
    "Builder", "BuilderFlag", "EngineInspector", "IBuilderConfig", "ICudaEngine",
    "IExecutionContext", "IHostMemory", "ILogger", "INetworkDefinition", "IOptimizationProfile",
    "IProgressMonitor", "ITimingCache", "LayerInformationFormat", "MemoryPoolType",
    "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "ProfilingVerbosity", "Runtime",
    "DataType", "TensorIOMode", "TensorLocation",
)  # fmt: skip
"""Classes that we call, make or are told members of."""

_ASK: Final = """
import json, tensorrt
def parameters(text):
    return [line for line in (text or "").splitlines() if "(self:" in line]
print(json.dumps({
    name: {
        member: parameters(getattr(getattr(tensorrt, name), member).__doc__)
        for member in dir(getattr(tensorrt, name))
        if not member.startswith("_") or member == "__init__"
    }
    for name in NAMES if hasattr(tensorrt, name)
}))
"""


def read_names(wheel: Path) -> dict[str, dict[str, list[list[str]]]]:
    """Class -> member -> the parameters of each of its forms; none for what is not called.

    Raises:
        EngineError: it is not such a wheel, or it cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with zipfile.ZipFile(wheel) as archive:
                module = next(n for n in archive.namelist() if n.endswith("/tensorrt.so"))
                (folder / "tensorrt.so").write_bytes(archive.read(module))
        except (OSError, zipfile.BadZipFile, StopIteration) as error:
            raise EngineError(f"{wheel} is no wheel of TensorRT's bindings: {error!r}") from error
        found = _ask(folder)
    return {
        cls: {member: [_parameters(line) for line in lines] for member, lines in members.items()}
        for cls, members in found.items()
    }


def _ask(folder: Path) -> dict[str, Any]:
    """Load the module, adding one by one the libraries and symbols that it is missing."""
    libraries: set[str] = set()
    symbols: set[str] = set()
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}
    while True:
        run = subprocess.run(
            [sys.executable, "-c", _ASK.replace("NAMES", repr(CLASSES))],
            env=environment,
            capture_output=True,
            text=True,
        )
        if run.returncode == 0:
            found = json.loads(run.stdout)
            assert isinstance(found, dict)
            return found
        library = re.search(r"ImportError: (lib\S+): cannot open", run.stderr)
        symbol = re.search(r"undefined symbol: (\w+)", run.stderr)
        before = len(libraries) + len(symbols)
        libraries |= {library[1]} if library else set()
        symbols |= {symbol[1]} if symbol else set()
        if len(libraries) + len(symbols) == before:
            raise EngineError(f"the bindings cannot be loaded: {run.stderr.strip()[-300:]}")
        _stand_ins(folder, libraries, symbols)


def _stand_ins(folder: Path, libraries: set[str], symbols: set[str]) -> None:
    source = folder / "empty.c"
    source.write_text("".join(f"int {symbol}(void) {{ return 0; }}\n" for symbol in symbols))
    for library in libraries:
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source],
            check=True,
        )


def _parameters(line: str) -> list[str]:
    """`1. run(self: a.B, name: str, flags: int = 0) -> C` -> `["name", "flags=0"]`."""
    inside = line[line.index("(") + 1 :].rsplit(") ->", 1)[0]
    names = []
    for part in re.split(r", (?=\w+: )", inside):
        name, _, rest = part.partition(":")
        names.append(f"{name.strip()}=" if "=" in rest else name.strip())
    return [name for name in names if name != "self"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Read wheels and write `export/trt_names.json`."""
    parser = argparse.ArgumentParser(prog="python -m export.trt_names")
    parser.add_argument("wheels", type=Path, nargs="+", help="wheels of TensorRT's bindings")
    wheels = parser.parse_args(arguments).wheels
    try:
        names = {wheel.name.split("-")[1]: read_names(wheel) for wheel in wheels}
    except (EngineError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files.write(TARGET, _dumps({"made_by": "python -m export.trt_names", "versions": names}))
    print(json.dumps({"path": str(TARGET), "versions": sorted(names)}))
    return 0


def _dumps(content: dict[str, Any]) -> bytes:
    """One member a line: what a new version changes is then seen in a diff."""
    lines = ["{", f'  "made_by": {json.dumps(content["made_by"])},', '  "versions": {']
    versions = content["versions"]
    for i, (version, classes) in enumerate(sorted(versions.items())):
        lines.append(f"    {json.dumps(version)}: {{")
        for j, (cls, members) in enumerate(sorted(classes.items())):
            lines.append(f"      {json.dumps(cls)}: {{")
            for k, (member, forms) in enumerate(sorted(members.items())):
                comma = "," if k < len(members) - 1 else ""
                lines.append(f"        {json.dumps(member)}: {json.dumps(forms)}{comma}")
            lines.append("      }" + ("," if j < len(classes) - 1 else ""))
        lines.append("    }" + ("," if i < len(versions) - 1 else ""))
    return "\n".join([*lines, "  }", "}", ""]).encode()


if __name__ == "__main__":
    sys.exit(main())
