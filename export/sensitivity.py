"""What each block of a part costs in 8 bits: the table that the recipes' lists of layers rest on.

One block at a time is quantized, all others stay in fp32, and the part's output is compared with
that of fp32 over steps of real images. `all` is the recipe as it is. Layers that the recipe keeps
high are blocks of their own, so that what keeping them buys can be read off as well.

    >>> for row in sensitivity(model, recipe, channels, cases, "fp8"): print(row)
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir

from export.parity import Case
from export.quantized import Channels, eligible, layers, quantized
from export.recipes import Recipe
from export.trace import write
from export.verify import engines, open_graph

_BLOCK = re.compile(r"^(.*?\.\d+)\.")
_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Block:
    """`error` is the norm of the output's error over that of the output; `weights` the share of
    the part's weights that the block holds; `high` whether the recipe keeps it out of 8 bits."""

    name: str
    layers: int
    weights: float
    high: bool
    error: float

    def __str__(self) -> str:
        kept = "high" if self.high else ""
        return (
            f"{self.name:<40}{self.layers:>7}{100 * self.weights:>9.1f} %{self.error:>12.2e} {kept}"
        )


def block_of(layer: str) -> str:
    """The block that a layer belongs to: its name up to the first number, or its first name."""
    found = _BLOCK.match(layer)
    return found[1] if found else layer.split(".")[0]


def kind_of(layer: str) -> str:
    """What a layer is in its block: its name with a star for every number."""
    return _NUMBER.sub(r"\1*", layer)


def sensitivity(
    model: onnx_ir.Model,
    recipe: Recipe,
    seen: Channels,
    cases: Sequence[Case],
    precision: str,
    group_of: Callable[[str], str] = block_of,
) -> Iterator[Block]:
    """The blocks of a part, worst first, after the recipe as a whole; `model` is not changed.

    Raises:
        EngineError: `seen` lacks a layer.
    """
    sizes = {
        layer.name: layer.weight.const_value.size if layer.weight.const_value else 0
        for layer in layers(model)
    }
    total = sum(sizes.values())
    groups: dict[tuple[str, bool], list[str]] = {}
    low = {layer.name for layer in eligible(model, recipe)}
    for name in sizes:
        groups.setdefault((group_of(name), name not in low), []).append(name)

    def measured(name: str, names: Sequence[str], high: bool) -> Block:
        narrow = replace(recipe, layers=tuple(names), keep=(), convolutions=True)
        error = _error(model, narrow, seen, cases, precision)
        return Block(name, len(names), sum(sizes[n] for n in names) / total, high, error)

    chosen = [name for name in sizes if name in low]
    if chosen:
        yield measured("all", chosen, high=False)
    yield from sorted(
        (measured(name, names, high) for (name, high), names in groups.items()),
        key=lambda block: block.error,
        reverse=True,
    )


def _error(
    model: onnx_ir.Model, recipe: Recipe, seen: Channels, cases: Sequence[Case], precision: str
) -> float:
    copy = model.clone()
    quantized(copy, recipe, seen)
    with tempfile.TemporaryDirectory() as folder:
        write(copy, Path(folder) / "model.onnx")
        engine = open_graph(engines(precision)[0], Path(folder) / "model.onnx", precision)
        wrong = whole = 0.0
        for case in cases:
            outputs = engine.run(case.inputs)
            for name, expected in case.outputs.items():
                wrong += float(np.square(outputs[name] - expected, dtype=np.float64).sum())
                whole += float(np.square(expected, dtype=np.float64).sum())
    return float(np.sqrt(wrong / whole))
