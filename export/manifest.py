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

from dermaflux import __version__
from dermaflux.bundle import SCHEMA, Data, File, Golden, Licence, Parity, Part, sha256
from dermaflux.checkpoint import UNKNOWN_LICENCE, Checkpoint
from dermaflux.prompt import WORDING
from export.parity import Case
from export.shapes import describe
from export.verify import Graph

LIBRARIES: Final = ("torch", "diffusers", "transformers", "timm", "onnx", "onnxruntime", "openvino")


def content(
    folder: Path,
    settings: Mapping[str, Any],
    checkpoint: Checkpoint,
    cases: Mapping[str, Sequence[Case]],
    graphs: Sequence[Graph],
    parity: Parity,
    golden: Golden,
) -> dict[str, Any]:
    """Plain JSON values, for `dermaflux.bundle.write_manifest`.

    The parts are those of `cases`, whose arrays are in the order of the graph's tensors.
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
                    inputs=tuple(describe(*item) for item in cases[name][0].inputs.items()),
                    outputs=tuple(describe(*item) for item in cases[name][0].outputs.items()),
                    files={g.precision: _file(folder, g) for g in graphs if g.part == name},
                )
            )
            for name in cases
        },
        "model": asdict(checkpoint.model),
        "scheduler": dict(checkpoint.scheduler),
        "defaults": asdict(checkpoint.defaults),
        "limits": asdict(checkpoint.limits),
        # A model that was trained on no wording of ours is asked in ours all the same.
        "wording": provenance.get("wording") or WORDING,
        "classifier": asdict(checkpoint.classifier) if checkpoint.classifier else None,
        "parity": asdict(parity),
        "golden": asdict(golden),
        "provenance": {**provenance, "export": {**settings, "libraries": made_with}},
        "licences": [asdict(licence) for licence in _licences(provenance)],
    }


def _file(folder: Path, graph: Graph) -> File:
    data = graph.path.with_name(f"{graph.path.name}.data")
    return File(
        **asdict(_data(folder, graph.path)),
        data=(_data(folder, data),) if data.exists() else (),
        engines=graph.engines,
        quantized_ops=graph.operations,
        parity=graph.parity,
    )


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
