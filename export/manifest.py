"""What was made and measured -> the content of `bundle.json`.

>>> write_manifest(folder, manifest.content(settings, checkpoint, reference, graphs, parity))
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import onnx

from dermaflux import __version__
from dermaflux.bundle import SCHEMA, Data, File, Golden, Licence, Parity, Part, Tensor, sha256
from dermaflux.checkpoint import UNKNOWN_LICENCE, Checkpoint
from dermaflux.prompt import WORDING
from export.recipes import EMULATED, may_run
from export.shapes import describe
from export.verify import Graph

LIBRARIES: Final = ("torch", "diffusers", "transformers", "timm", "onnx", "onnxruntime", "openvino")


def content(
    folder: Path,
    settings: Mapping[str, Any],
    checkpoint: Checkpoint,
    engines: Sequence[str],
    graphs: Sequence[Graph],
    parity: Parity,
    golden: Golden | None,
) -> dict[str, Any]:
    """Plain JSON values, for `dermaflux.bundle.write_manifest`.

    `engines` are those that the bundle is for: the matrix is cut down to them.
    """
    provenance = checkpoint.provenance
    made_with = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "schema": SCHEMA,
        "name": provenance["name"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "made_by": f"dermaflux {__version__}",
        "parts": {
            name: asdict(
                Part(
                    *_tensors(next(graph.path for graph in graphs if graph.part == name)),
                    files={
                        graph.precision: _file(folder, graph, engines)
                        for graph in graphs
                        if graph.part == name
                    },
                )
            )
            for name in dict.fromkeys(graph.part for graph in graphs)
        },
        "files": [asdict(data) for data in _others(folder, graphs)],
        "model": asdict(checkpoint.model),
        "scheduler": dict(checkpoint.scheduler),
        "defaults": asdict(checkpoint.defaults),
        "limits": asdict(checkpoint.limits),
        # A model that was trained on no wording of ours is asked in ours all the same.
        "wording": provenance.get("wording") or WORDING,
        "classifier": asdict(checkpoint.classifier)
        if checkpoint.classifier and any(graph.part == "classifier" for graph in graphs)
        else None,
        "parity": asdict(parity),
        "golden": asdict(golden) if golden else None,
        "provenance": {**provenance, "export": {**settings, "libraries": made_with}},
        "licences": [asdict(licence) for licence in _licences(provenance)],
    }


def _tensors(graph: Path) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs of a graph, in its order."""
    found = onnx.load(str(graph), load_external_data=False).graph
    return (
        tuple(describe(value) for value in found.input),
        tuple(describe(value) for value in found.output),
    )


def _file(folder: Path, graph: Graph, engines: Sequence[str]) -> File:
    data = graph.path.with_name(f"{graph.path.name}.data")
    return File(
        **asdict(_data(folder, graph.path)),
        data=(_data(folder, data),) if data.exists() else (),
        engines=tuple(name for name in may_run(graph.part, graph.precision) if name in engines),
        compared=graph.compared,
        emulated=tuple(n for n in EMULATED.get(graph.precision, ()) if n in engines),
        quantized_ops=graph.operations,
        parity=graph.parity,
    )


def _others(folder: Path, graphs: Sequence[Graph]) -> list[Data]:
    """Every file beside the graphs: tokenizers, configs, the golden image."""
    known = {graph.path for graph in graphs}
    known |= {path.with_name(f"{path.name}.data") for path in known}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in known)
    return [_data(folder, path) for path in files]


def _data(folder: Path, file: Path) -> Data:
    return Data(file.relative_to(folder).as_posix(), file.stat().st_size, sha256(file))


def _licences(provenance: Mapping[str, Any]) -> list[Licence]:
    """The model's own licence first, then those of what went into it."""
    own = Licence(
        name=str(provenance["name"]),
        licence=str(provenance.get("licence") or UNKNOWN_LICENCE),
        attribution=str(provenance.get("attribution") or provenance.get("base") or ""),
    )
    ingredients = [
        Licence(str(item["name"]), str(item["licence"]), str(item.get("attribution") or ""))
        for item in provenance.get("ingredients", ())
    ]
    return [own, *ingredients]
