"""What each block of a part costs in 8 bits: the table that the recipes' lists of layers rest on.

One block at a time is quantized, all others stay in fp32, and the part's output is compared with
that of fp32 over steps of real images. `all` is the recipe as it is.

    >>> for row in sensitivity(model, recipe, channels, cases): print(row)
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir

from export.parity import Case
from export.quantized import Channels, layers, quantized
from export.recipes import Recipe
from export.trace import write
from export.verify import engines, open_graph

_BLOCK = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Block:
    """`error` is the norm of the output's error over that of the output; `weights` the share of
    the part's quantized weights that the block holds."""

    name: str
    layers: int
    weights: float
    error: float

    def __str__(self) -> str:
        return f"{self.name:<32}{self.layers:>7}{100 * self.weights:>9.1f} %{self.error:>12.2e}"


def block_of(layer: str) -> str:
    """The block that a layer belongs to: its name up to the first number, or its first name."""
    found = _BLOCK.match(layer)
    return found[1] if found else layer.split(".")[0]


def sensitivity(
    model: onnx_ir.Model,
    recipe: Recipe,
    seen: Channels,
    cases: Sequence[Case],
    precision: str,
) -> Iterator[Block]:
    """The blocks of a part, worst first, after the recipe as a whole; `model` is not changed."""
    chosen = {
        layer.name: layer.weight.const_value.size if layer.weight.const_value else 0
        for layer in layers(model)
        if recipe.quantizes(layer.name)
    }
    total = sum(chosen.values())
    blocks: dict[str, list[str]] = {}
    for name in chosen:
        blocks.setdefault(block_of(name), []).append(name)

    def measured(name: str, names: Sequence[str]) -> Block:
        narrow = replace(recipe, layers=tuple(names), keep=())
        error = _error(model, narrow, seen, cases, precision)
        return Block(name, len(names), sum(chosen[n] for n in names) / total, error)

    yield measured("all", list(chosen))
    yield from sorted(
        (measured(*item) for item in blocks.items()), key=lambda block: block.error, reverse=True
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
