"""The inputs and outputs of a graph: by a part's names, and in the two types that all engines take.

A name means one thing in all parts (`export.shapes`), and yet a part has only its own: a runtime
that asks a transformer for `sample` gets nothing. Where the part is not said, its inputs tell it.

    >>> [str(f) for f in check(graph, "transformer")]
    ['name: sample: is no output of transformer; it has out_hidden_states']
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from onnx import TensorProto

from export.shapes import AXES
from export.trt_graph import Finding, View
from export.trt_support import TYPES

_TYPES: Final = (TensorProto.FLOAT, TensorProto.INT64)


@dataclass(frozen=True)
class Names:
    """A part's inputs and outputs; `optional` are those that only some models have."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    optional: tuple[str, ...] = ()


PARTS: Final[Mapping[str, Names]] = {
    "text_encoder": Names(("input_ids",), ("pooler_output", "last_hidden_state")),
    "text_encoder_2": Names(("input_ids",), ("last_hidden_state",)),
    "transformer": Names(
        (
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "img_ids",
            "txt_ids",
            "guidance",
        ),
        ("out_hidden_states",),
        ("guidance",),
    ),
    "vae_decoder": Names(("latent_sample",), ("sample",)),
    "vae_encoder": Names(("sample",), ("latent_parameters",)),
    "classifier": Names(("pixel_values",), ("logits", "features", "saliency"), ("saliency",)),
}
"""Those of the modules in `dermaflux.engines.parts`, without torch."""


def check(graph: View, part: str | None = None) -> Iterator[Finding]:
    """Names that a part does not have or lacks, and types that not every engine takes."""
    values = {
        "input": [v.name for v in graph.model.graph.input if v.name not in graph.weights],
        "output": [v.name for v in graph.model.graph.output],
    }
    given = set(values["input"])
    fits = [part] if part else [p for p, names in PARTS.items() if given <= set(names.inputs)]
    if given <= AXES.keys() and not fits:
        yield Finding("name", ", ".join(values["input"]), "are inputs of no one part of a bundle")
    for kind, names in values.items():
        allowed = list(dict.fromkeys(name for one in fits for name in _of(one, kind)))
        for name in names:
            if name not in AXES:
                yield Finding(
                    "name",
                    name,
                    f"is no {kind} of a bundle; known are {', '.join(AXES)}. Name it when tracing",
                )
            elif fits and name not in allowed:
                yield Finding(
                    "name",
                    name,
                    f"is no {kind} of {' or '.join(fits)}; it has {', '.join(allowed)}",
                )
            if graph.type(name) not in _TYPES:
                yield Finding(
                    "type",
                    name,
                    f"the {kind} is {TYPES.get(graph.type(name), '?')}; inputs and outputs are "
                    "FP32 or INT64 whatever is inside",
                )
        if part:
            lacking = set(_of(part, kind)) - set(names) - set(PARTS[part].optional)
            for name in sorted(lacking):
                yield Finding("name", name, f"is an {kind} of {part}, and the graph has none")


def _of(part: str, kind: str) -> tuple[str, ...]:
    return PARTS[part].inputs if kind == "input" else PARTS[part].outputs
