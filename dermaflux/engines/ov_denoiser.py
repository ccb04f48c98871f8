"""A Flux transformer on OpenVINO's CPU: what does not change from step to step is not in the step.

The file's graph is put in the words that the plugin computes fastest (`ov_rewrite`) and cut in
three (`ov_split`): what a picture keeps is computed once, at `bind`; modulation some steps ahead
(`ov_ahead`); the step is what remains. A small one is compiled for each shape (`ov_shapes`).

    >>> engine = ov.opened(Path("bundles/mini/transformer/model_int8.onnx"), "int8")
    >>> step = engine.bind(constant, timesteps)
    >>> step({"hidden_states": tokens, "timestep": timestep})["out_hidden_states"]

A batch is computed in pieces of 8, 4, 2 and 1 where graphs are compiled for their shapes, so that
there are few of them; rows have the same bits in each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dermaflux.engines import Array, Arrays
from dermaflux.engines.ov_ahead import Ahead, Item
from dermaflux.engines.ov_inputs import require_inputs
from dermaflux.engines.ov_library import openvino
from dermaflux.engines.ov_shapes import Shaped, Slot
from dermaflux.engines.ov_split import MODULATION, STEPPING, Split
from dermaflux.errors import EngineError, translated

_OF_ALL: Final = ("img_ids", "txt_ids")
"""Inputs without an axis of the batch."""
_PIECES: Final = (8, 4, 2, 1)


@dataclass(frozen=True)
class _Piece:
    """Some rows of a batch: a request that holds what they keep, their modulation, and the memory
    that the request reads."""

    rows: slice
    request: Any
    items: tuple[Item, ...]
    modulation: Array
    held: Mapping[str, Array]


class Denoiser:
    """An engine over the three graphs of a transformer. `compiled` compiles a model, which
    is done for each shape, and `shapes` of them are kept; of 0 it is done once for all."""

    def __init__(
        self,
        graph: Path,
        name: str,
        precision: str,
        parts: Split,
        inputs: Mapping[str, np.dtype[Any]],
        compiled: Callable[[Any], Any],
        shapes: int,
    ) -> None:
        self.name = name
        self.precision = precision
        self.note = ""
        self._graph = graph
        self._inputs = inputs
        self._fixed = shapes > 0
        self._kept = Shaped(parts.kept, compiled, shapes)
        self._modulation = Shaped(parts.modulation, compiled, shapes)
        self._step = Shaped(parts.step, compiled, shapes)
        self._outputs = [port.get_any_name() for port in parts.step.outputs]
        (tokens,) = (p for p in parts.step.inputs if p.get_any_name() == STEPPING[0])
        (row,) = (p for p in parts.step.inputs if p.get_any_name() == MODULATION)
        self._channels = tokens.get_partial_shape()[2].get_length()
        self._width = row.get_partial_shape()[2].get_length()
        self._ahead = Ahead(self._modulated, self._width, "guidance" in inputs)

    def compiled(self) -> tuple[Any, ...]:
        """What is compiled now; the step's graphs first."""
        return tuple(
            model
            for part in (self._step, self._modulation, self._kept)
            for model in part.compiled()
        )

    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compile for inputs of these shapes before anybody waits for it, by a step over nought;
        nothing where graphs are compiled for all shapes, and a step may take long."""
        if self._fixed:
            self.run({name: np.zeros(shapes[name], kind) for name, kind in self._inputs.items()})

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`."""
        require_inputs(self._graph, self._inputs, inputs)
        step = self.bind({k: v for k, v in inputs.items() if k not in STEPPING})
        return step({k: inputs[k] for k in STEPPING})

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`: what depends on the constant inputs alone is computed now."""
        missing = [name for name in self._inputs if name not in (*constant, *STEPPING)]
        if missing:
            raise EngineError(f"{self._graph} takes the input {missing[0]} too")
        counts = {len(v) for name, v in constant.items() if name not in _OF_ALL}
        if len(counts) != 1:
            raise EngineError(f"inputs of {sorted(counts)} items cannot run together")
        (batch,) = counts
        with translated(EngineError, f"OpenVINO cannot run {self._graph}"):
            taken = [self._piece(constant, timesteps, rows) for rows in self._cut(batch)]
        pieces = [piece for piece, _ in taken]

        def step(varying: Arrays) -> dict[str, Array]:
            require_inputs(self._graph, self._inputs, {**constant, **varying})
            tokens, times = (np.ascontiguousarray(varying[name]) for name in STEPPING)
            if len(tokens) != batch or len(times) != batch:
                raise EngineError(
                    f"{len(tokens)} items with {len(times)} timesteps for {batch} that are bound"
                )
            with translated(EngineError, f"OpenVINO cannot run {self._graph}"):
                made = [_stepped(piece, tokens, times) for piece in pieces]
            return {
                name: np.concatenate([outputs[index] for outputs in made])
                for index, name in enumerate(self._outputs)
            }

        # Whoever lets go of the function lets others use its requests.
        for piece, slot in taken:
            # At the end of the process nobody takes them any more.
            weakref.finalize(step, slot.give, piece.request).atexit = False
        return step

    def _cut(self, batch: int) -> Iterator[slice]:
        start = 0
        while start < batch:
            left = batch - start
            size = next(size for size in _PIECES if size <= left) if self._fixed else left
            yield slice(start, start + size)
            start += size

    def _piece(self, constant: Arrays, timesteps: Array | None, rows: slice) -> tuple[_Piece, Slot]:
        mine = {
            name: np.ascontiguousarray(value if name in _OF_ALL else value[rows])
            for name, value in constant.items()
        }
        with self._kept.request({k: mine[k].shape for k in self._kept.inputs}) as request:
            kept = request.infer(
                {k: mine[k] for k in self._kept.inputs}, share_inputs=True, share_outputs=False
            )
            held = {f"kept.{index}": kept[index] for index in range(len(kept))}
        held |= {name: mine[name] for name in self._step.inputs if name in mine}
        count = len(mine["pooled_projections"])
        held[MODULATION] = np.empty((count, 1, self._width), np.float32)
        guidance = mine.get("guidance")
        items = tuple(
            self._ahead.item(
                mine["pooled_projections"][index],
                None if guidance is None else guidance[index],
                np.empty(0) if timesteps is None else timesteps[rows][index],
            )
            for index in range(count)
        )
        shapes = {name: value.shape for name, value in held.items()}
        slot = self._step.slot(
            {**shapes, STEPPING[0]: (count, len(mine["img_ids"]), self._channels)}
        )
        taken = slot.take()
        for name, value in held.items():
            taken.set_tensor(name, openvino.Tensor(value, shared_memory=True))
        return _Piece(rows, taken, items, held[MODULATION], held), slot

    def _modulated(self, inputs: Arrays) -> Array:
        names = self._modulation.inputs
        with self._modulation.request({k: inputs[k].shape for k in names}) as request:
            made = request.infer(
                {k: inputs[k] for k in names}, share_inputs=True, share_outputs=False
            )
            rows: Array = made[0]
        return rows


def _stepped(piece: _Piece, tokens: Array, times: Array) -> Any:
    for index, (item, time) in enumerate(zip(piece.items, times[piece.rows], strict=True)):
        piece.modulation[index, 0] = item.row(time)
    return piece.request.infer(
        {STEPPING[0]: tokens[piece.rows]}, share_inputs=True, share_outputs=False
    )
