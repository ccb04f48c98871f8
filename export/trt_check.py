"""The preflight of a whole bundle, or of one file, by version of TensorRT: `--check`, in words.

>>> check(Path("bundles/mini"), Ask())["builds"]
True
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermaflux.bundle import PARTS, Bundle
from dermaflux.errors import EngineError
from export.preflight import check_versions
from export.shapes import Size
from export.trt_graph import Finding
from export.trt_jobs import ORDER, chosen_parts
from export.trt_profile import Profile, parse_size, profile, variant
from export.trt_support import OLDEST, support, versions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ask:
    """What to check of a bundle; all of it by default. `tensorrt` is one version, in place of all
    that take our graphs."""

    parts: tuple[str, ...] = ()
    precision: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    tensorrt: str = ""


@dataclass(frozen=True)
class _Graph:
    """One file to be checked."""

    name: str
    path: Path
    profile: Profile | None = None
    precision: str | None = None
    part: str | None = None


def check(path: Path, ask: Ask) -> dict[str, Any]:
    """Say of every graph of a bundle, or of one ONNX file, on which versions it would build.

    Returns plain JSON values: `builds`, whether all do on all of `versions`, and `graphs`, what
    was found by graph and version, notes included.

    Raises:
        BundleError: the bundle cannot be opened.
        EngineError: nothing is there; an unknown version, part or precision; or a precision that
            no part has that was asked for.
    """
    asked = [ask.tensorrt] if ask.tensorrt else list(versions())
    needed = asked if ask.tensorrt else asked[asked.index(OLDEST) :]
    for version in asked:
        support(version)
    graphs, builds = {}, True
    for graph in _graphs(path, ask):
        found = check_versions(graph.path, asked, graph.profile, graph.precision, graph.part)
        good = [v for v in asked if not any(finding.refuses for finding in found[v])]
        builds = builds and all(version in good for version in needed)
        log.info("%s: would build on %s", graph.name, ", ".join(good) or "none")
        for text, where in _by_message(found, refusing=True).items():
            log.info("  not on %s: %s", ", ".join(where), text)
        for text in _by_message(found, refusing=False):
            log.info("  note: %s", text)
        graphs[graph.name] = {version: [str(f) for f in found[version]] for version in asked}
    return {"builds": builds, "versions": needed, "graphs": graphs}


def _graphs(path: Path, ask: Ask) -> Iterator[_Graph]:
    if not path.exists():
        raise EngineError(f"there is no {path}; give a bundle's folder, or an ONNX file")
    if not path.is_dir():
        precision = _only("--precision", ask.precision, ORDER)
        yield _Graph(path.name, path, None, precision, _only("--parts", ask.parts, PARTS))
        return
    bundle = Bundle.open(path)
    sizes: Sequence[Size | None] = [parse_size(text) for text in ask.static] or [None]
    parts = chosen_parts(bundle, ask.parts)
    there = dict.fromkeys(name for part in parts for name in bundle.parts[part].files)
    for precision in ask.precision:
        if precision not in there:
            raise EngineError(
                f"--precision {precision!r} is of no part that is asked for; they have "
                f"{', '.join(there)}"
            )
    for part in parts:
        for precision, file in bundle.parts[part].files.items():
            if ask.precision and precision not in ask.precision:
                continue
            for size in sizes:
                name = f"{part} {precision} {variant(size)}"
                shapes = profile(bundle, part, size)
                yield _Graph(name, bundle.file(file.path), shapes, precision, part)


def _only(option: str, given: Sequence[str], known: Sequence[str]) -> str | None:
    """What one file is said to be; None where nothing is said of it."""
    for name in given:
        if name not in known:
            raise EngineError(f"{option} {name!r} is unknown; known are {', '.join(known)}")
    if len(given) > 1:
        raise EngineError(f"{option} {','.join(given)}: one file has one")
    return given[0] if given else None


def _by_message(found: Mapping[str, Sequence[Finding]], refusing: bool) -> dict[str, list[str]]:
    """What was found -> the versions that it holds for, in place of a list per version."""
    grouped: dict[str, list[str]] = {}
    for version, findings in found.items():
        for finding in (f for f in findings if f.refuses == refusing):
            text = str(finding).replace(f"TensorRT {version} has", "it has")
            grouped.setdefault(text, []).append(version)
    return grouped
