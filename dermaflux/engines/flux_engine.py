"""The engine of `dermaflux.engines.flux`: numpy in and out, one request's constants bound once.

    >>> engine = opened(Path("models/mini/transformer"))
    >>> step = engine.bind(constant, timesteps)
    >>> step({"hidden_states": tokens, "timestep": t})["out_hidden_states"]

What `bind` is told of steps to come is modulated ahead, in one matrix product; a timestep that was
not told is modulated when it comes. On CUDA attention is cuDNN's where it takes the shapes, blocks
are compiled and a forward is one CUDA graph per shape. That half has not met a GPU yet; all else,
compiled blocks and the discipline of graphs included, runs in the tests.

Latents cross to the host at every step, since the seam is numpy: at 1024 x 1024 that is 1 MB each
way and the Euler step, estimated at 1 ms beside 75 ms or more of computing; `python -m
benchmarks.gpu` measures it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dermaflux.engines import EAGER, Array, Arrays
from dermaflux.engines.flux import Flux, embedded, modulated, rotary, velocity
from dermaflux.engines.flux_graph import SHAPES, Blocks, Capture, Replayed, Tensors, on_cuda
from dermaflux.engines.flux_weights import opened as weights_of
from dermaflux.engines.flux_weights import size
from dermaflux.errors import EngineError

log = logging.getLogger(__name__)

ROWS: Final = 256
"""Items times steps that are modulated ahead at once: 0.5 GB of bf16 for FLUX.1."""
_FIXED: Final = ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids", "guidance")


class Ahead:
    """Vectors of all blocks for the steps of a batch: by matrix products of many steps at once.

    `told` is float32 [B, K]: what each item's steps will ask, in order.
    """

    def __init__(
        self, flux: Flux, pooled: Tensor, guidance: Tensor | None, told: Array | None
    ) -> None:
        self.products = 0
        """How often modulation was computed."""
        self._flux, self._pooled, self._guidance = flux, pooled, guidance
        self._told = np.zeros((len(pooled), 0), np.float32) if told is None else told
        self._window = self._told[:, :0]
        self._table: Tensor | None = None

    def vectors(self, timestep: Array) -> Tensor:
        """Timesteps float32 [B] -> [B, V, D]."""
        columns = self._columns(timestep)
        if columns is None:
            self._compute(timestep)
            columns = self._columns(timestep)
        assert columns is not None
        assert self._table is not None
        if len(set(columns)) == 1:
            return self._table[columns[0]]
        return torch.stack([self._table[column, item] for item, column in enumerate(columns)])

    def _columns(self, timestep: Array) -> list[int] | None:
        """Where each item's timestep is in the table; None where one is not."""
        if self._table is None:
            return None
        here = self._window == timestep[:, None]
        (together,) = np.nonzero(here.all(axis=0))
        if len(together):
            return [int(together[0])] * len(timestep)
        return here.argmax(axis=1).tolist() if here.any(axis=1).all() else None

    def _compute(self, timestep: Array) -> None:
        """The table from this step on, as far as it was told; else of this step alone."""
        (matching,) = np.nonzero((self._told == timestep[:, None]).all(axis=0))
        window = timestep[:, None]
        if len(matching):
            window = self._told[:, matching[0] :][:, : max(1, ROWS // len(timestep))]
        steps = window.shape[1]
        guidance = None if self._guidance is None else self._guidance.repeat(steps)
        rows = torch.from_numpy(np.ascontiguousarray(window.T).reshape(-1)).to(self._pooled.device)
        table = modulated(self._flux, rows, self._pooled.repeat(steps, 1), guidance)
        self._table = table.unflatten(0, (steps, len(timestep)))
        self._window = window
        self.products += 1


@dataclass(frozen=True)
class _Bound:
    """What stays the same over the steps of a batch."""

    text: Tensor
    turn: Tensor
    ahead: Ahead
    owner: object = field(default_factory=object)


class FluxEngine:
    """A Flux transformer in torch. Calls from several threads take turns.

    `blocks` are compiled ones, or None; `capture` makes graphs, or None. `precision` is its name,
    `dtype` that of activations.
    """

    name = EAGER
    outputs = ("out_hidden_states",)

    def __init__(
        self,
        flux: Flux,
        precision: str,
        *,
        blocks: Blocks | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.precision = precision
        self.blocks = blocks
        self.flux = flux
        fixed = _FIXED if flux.guidance is not None else _FIXED[:-1]
        self.inputs = ("hidden_states", *fixed[:2], "timestep", *fixed[2:])
        self._fixed = frozenset(fixed)
        self._like = flux.image_in.bias
        self._capture = capture
        self._replayed: dict[tuple[torch.Size, torch.Size], Replayed] = {}
        self._shapes: set[tuple[torch.Size, torch.Size]] = set()
        self._lock = threading.Lock()

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`."""
        return self.bind({})(inputs)

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`: text is embedded, positions and steps to come are prepared once."""
        bound: _Bound | None = None
        if self._fixed <= constant.keys():
            with self._lock, torch.no_grad():
                bound = self._prepared(constant, timesteps)

        def step(varying: Arrays) -> dict[str, Array]:
            given = {**constant, **varying}
            if given.keys() != set(self.inputs):
                raise EngineError(f"the part takes {sorted(self.inputs)}, not {sorted(given)}")
            again = bound is None or not self._fixed.isdisjoint(varying)
            with self._lock, torch.no_grad():
                now = self._prepared(given, None) if again or bound is None else bound
                vectors = now.ahead.vectors(np.asarray(given["timestep"], np.float32))
                result = self._forward(now, self._tensor(given["hidden_states"]), vectors)
                return {self.outputs[0]: result.float().cpu().numpy()}

        return step

    def counts(self) -> dict[str, int]:
        """For proof: bytes of weights, compilations, graphs, and how often graphs were launched."""
        return {
            "weight_bytes": size(self.flux),
            "compiles": self.blocks.compiles if self.blocks else 0,
            "graphs": len(self._replayed),
            "replays": sum(one.replays for one in self._replayed.values()),
        }

    def _prepared(self, constant: Arrays, timesteps: Array | None) -> _Bound:
        pooled = self._tensor(constant["pooled_projections"])
        guidance = None
        if self.flux.guidance is not None:
            guidance = torch.from_numpy(constant["guidance"].astype(np.float32)).to(pooled.device)
        ids = np.concatenate([constant["txt_ids"], constant["img_ids"]])
        return _Bound(
            text=embedded(self.flux, self._tensor(constant["encoder_hidden_states"])),
            turn=rotary(self.flux.axes, torch.from_numpy(ids)).to(pooled.device),
            ahead=Ahead(self.flux, pooled, guidance, timesteps),
        )

    def _forward(self, bound: _Bound, tokens: Tensor, vectors: Tensor) -> Tensor:
        held = {"text": bound.text, "turn": bound.turn}
        varying = {"tokens": tokens, "vectors": vectors}
        key = (tokens.shape, bound.text.shape)
        if key not in self._shapes and len(self._shapes) == SHAPES and self._settles():
            shape = "x".join(map(str, tokens.shape))
            log.warning("tokens of %s run as they are: %d shapes are compiled", shape, SHAPES)
            return self._work({**held, **varying}, None)
        self._shapes.add(key)
        if self._capture is None:
            return self._work({**held, **varying}, self.blocks)
        if key not in self._replayed:
            self._replayed[key] = Replayed(
                lambda tensors: self._work(tensors, self.blocks), {**held, **varying}, self._capture
            )
        return self._replayed[key].run(bound.owner, held, varying)

    def _settles(self) -> bool:
        """Whether shapes cost something that stays."""
        return self.blocks is not None or self._capture is not None

    def _work(self, given: Tensors, blocks: Blocks | None) -> Tensor:
        compiled = (blocks.double, blocks.single) if blocks else (None, None)
        with attention_order(self._like.device):
            return velocity(self.flux, **given, double=compiled[0], single=compiled[1])

    def _tensor(self, value: Array) -> Tensor:
        return torch.from_numpy(value.copy()).to(self._like.device, self._like.dtype)


def opened(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    *,
    precision: str = "fp32",
    compile: bool = False,
    low: Collection[str] = (),
) -> FluxEngine:
    """The engine of a checkpoint's `transformer` folder; layers of the kinds `low` in fp8.

    On CUDA blocks are compiled and forwards captured whatever `compile` says.

    Raises:
        EngineError: the weights cannot be opened.
    """
    place = device or torch.device("cpu")
    return made(weights_of(folder, dtype, place, low), precision, compile=compile)


def made(flux: Flux, precision: str, *, compile: bool = False) -> FluxEngine:
    """The engine of weights, as its device asks for."""
    cuda = flux.image_in.weight.is_cuda
    return FluxEngine(
        flux,
        precision,
        blocks=Blocks() if compile or cuda else None,
        capture=on_cuda() if cuda else None,
    )


def attention_order(device: torch.device) -> AbstractContextManager[Any]:
    """On CUDA cuDNN's attention first, FLUX.1's fastest on Hopper (613 TFLOP/s at 4k tokens,
    flash-attention's pull request 1075), then the others that take more shapes."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)
