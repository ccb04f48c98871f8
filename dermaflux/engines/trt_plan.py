"""What a TensorRT plan was built from, beside it as JSON, and whether it may be opened here.

A plan is a program for one kind of GPU, one TensorRT and one graph; opened elsewhere it fails, or
worse, it runs. So plans lie in `BUNDLE/engines/<compute capability>_<TensorRT>_<driver>/`, each
with a sidecar that holds the sha256 of the graph, of its weights and of the plan, and the shapes
and flags it was built with. The sidecar is written last; a plan without one is not there.

    >>> here = Hardware.of(trt.__version__, Cuda())
    >>> open_plan(bundle, "transformer", "fp8", here).path
    Path('bundles/mini/engines/9.0_11.4.0.106_580.65.06/transformer_fp8.plan')
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dermaflux import files
from dermaflux.bundle import Bundle, Data, sha256
from dermaflux.engines.cuda import Cuda
from dermaflux.errors import BundleError, EngineError
from dermaflux.strict import read

SCHEMA: Final = 1
FOLDER: Final = "engines"
_STATIC: Final = re.compile(r"_\d+x\d+x\d+")
DYNAMIC: Final = "dynamic"
"""The variant that takes every size; the others are named `<height>x<width>x<batch>`."""


@dataclass(frozen=True)
class Hardware:
    """What a plan is tied to: compute capability, TensorRT, display driver."""

    capability: str
    tensorrt: str
    driver: str

    @classmethod
    def of(cls, tensorrt: str, cuda: Cuda) -> Hardware:
        """That of this machine."""
        return cls(cuda.capability(), tensorrt, cuda.driver())

    @property
    def key(self) -> str:
        """The name of the folder."""
        return f"{self.capability}_{self.tensorrt}_{self.driver}"


@dataclass(frozen=True)
class Range:
    """Shapes of one input: the smallest, the one that is timed, and the largest."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def takes(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


@dataclass(frozen=True)
class Sidecar:
    """The JSON beside a plan. `graph` are the ONNX file and its external data, relative to the
    bundle; `layers` and `quantized_layers` are what TensorRT's inspector counted in the plan."""

    schema: int
    part: str
    precision: str
    variant: str
    graph: tuple[Data, ...]
    profile: Mapping[str, Range]
    flags: Mapping[str, Any]
    hardware: Hardware
    plan: Data
    layers: int
    quantized_layers: int
    seconds: float
    made_by: str

    @property
    def static(self) -> bool:
        """Whether every input has one shape, which a CUDA graph needs."""
        return all(shape.min == shape.max for shape in self.profile.values())


@dataclass(frozen=True)
class Plan:
    """A plan that may be opened here."""

    path: Path
    sidecar: Sidecar


def plan_path(
    bundle: Bundle, hardware: Hardware, part: str, precision: str, variant: str = DYNAMIC
) -> Path:
    """Where a plan lies, or would; its sidecar has `.json` behind it."""
    suffix = "" if variant == DYNAMIC else f"_{variant}"
    return bundle.path / FOLDER / hardware.key / f"{part}_{precision}{suffix}.plan"


def variants(bundle: Bundle, hardware: Hardware, part: str, precision: str) -> list[str]:
    """The variants of a part that are built for this hardware; their plans are not opened."""
    stem, end = f"{part}_{precision}", ".plan.json"
    found = []
    for file in sorted((bundle.path / FOLDER / hardware.key).glob(f"{stem}*{end}")):
        rest = file.name.removeprefix(stem).removesuffix(end)
        if not rest or _STATIC.fullmatch(rest):
            found.append(rest.removeprefix("_") or DYNAMIC)
    return found


def graph_files(bundle: Bundle, part: str, precision: str) -> tuple[Data, ...]:
    """The ONNX file of a part and its external data, as `bundle.json` names them.

    Raises:
        EngineError: the bundle has no such part or precision.
    """
    if part not in bundle.parts:
        raise EngineError(f"the bundle {bundle.path} has no part {part!r}")
    precisions = bundle.parts[part].files
    if precision not in precisions:
        raise EngineError(
            f"the bundle {bundle.path} has no {precision} file of {part}; it has "
            f"{', '.join(precisions)}"
        )
    file = precisions[precision]
    return (Data(file.path, file.bytes, file.sha256), *file.data)


def write_sidecar(plan: Path, sidecar: Sidecar) -> None:
    """Write the JSON beside a plan, whole or not at all."""
    text = json.dumps(asdict(sidecar), indent=2) + "\n"
    files.write(_beside(plan), text.encode())


def read_sidecar(plan: Path) -> Sidecar:
    """The JSON beside a plan.

    Raises:
        EngineError: it is not there, or not of this form.
    """
    path = _beside(plan)
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise BundleError(f"{path.name} is not of schema {SCHEMA}")
        return read(Sidecar, content, path.name)
    except FileNotFoundError:
        raise EngineError(f"there is no {path}") from None
    except (BundleError, ValueError, OSError, RecursionError) as error:
        raise EngineError(f"{path} cannot be read: {error}") from error


def open_plan(
    bundle: Bundle, part: str, precision: str, hardware: Hardware, variant: str = DYNAMIC
) -> Plan:
    """The plan of a part for this hardware, after comparing all that it is tied to.

    Raises:
        EngineError: there is none, it was built on other hardware or from another graph, or it is
            not the file that was built; with the command that builds it anew.
    """
    path = plan_path(bundle, hardware, part, precision, variant)
    try:
        sidecar = read_sidecar(path)
        mismatch = _mismatch(bundle, path, sidecar, part, precision, hardware, variant)
    except EngineError as error:
        others = sorted(p.parent.name for p in bundle.path.glob(f"{FOLDER}/*/{path.name}.json"))
        built = f" (built for {', '.join(others)})" if others else ""
        raise EngineError(f"{error}{built}. {command(bundle, part, precision, variant)}") from None
    if mismatch:
        raise EngineError(f"{path} {mismatch}. {command(bundle, part, precision, variant)}")
    return Plan(path, sidecar)


def command(bundle: Bundle, part: str, precision: str, variant: str = DYNAMIC) -> str:
    """The sentence that says how a plan is built."""
    static = "" if variant == DYNAMIC else f" --static {variant}"
    return (
        f"Build it here with: python -m export.compile {bundle.path} --parts {part} "
        f"--precision {precision}{static}"
    )


def _mismatch(
    bundle: Bundle,
    path: Path,
    sidecar: Sidecar,
    part: str,
    precision: str,
    hardware: Hardware,
    variant: str,
) -> str | None:
    named = (sidecar.part, sidecar.precision, sidecar.variant)
    if named != (part, precision, variant):
        return f"is of {' '.join(named)}, not of {part} {precision} {variant}"
    if sidecar.hardware != hardware:
        return f"was built for {sidecar.hardware.key}; this machine is {hardware.key}"
    if sidecar.graph != graph_files(bundle, part, precision):
        return f"was built from another graph than {bundle.path}'s {part} in {precision}"
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != sidecar.plan.bytes:
        return f"has {path.stat().st_size} bytes; {sidecar.plan.bytes} were built"
    # A plan is code: it is opened only where it is, byte for byte, the one that was built.
    if sha256(path) != sidecar.plan.sha256:
        return "is not what was built: its sha256 differs"
    return None


def _beside(plan: Path) -> Path:
    return plan.with_name(f"{plan.name}.json")
