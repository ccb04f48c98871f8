"""The same work again without Python between: blocks compiled once, forwards replayed as one graph.

`Blocks` compiles each kind of block once for all blocks of the kind (10 s instead of 67 for
FLUX.1's 57 on an H100; PyTorch's developer log of 2026-05-11), for shapes that stay, and counts.
`Replayed` runs a function of tensors from buffers that stay where they are, so that CUDA can launch
what it did the first time as one graph.

    >>> blocks = Blocks()
    >>> velocity(flux, tokens, text, vectors, turn, blocks.double, blocks.single)
    >>> replayed = Replayed(work, example, on_cuda())
    >>> replayed.run(owner, held, varying)

Only `on_cuda` needs a GPU, and has not met one yet; tests put a stand-in there, and compile with
other backends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from dermaflux.engines.flux import DoubleBlock, SingleBlock, double_block, single_block

Tensors = Mapping[str, Tensor]
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Records work: gives the tensor of its output, and what fills it anew from the same inputs."""

SHAPES: Final = 16
"""Shapes that are compiled or captured; what comes after runs as it is, and says so."""
_VARIANTS: Final = 4
"""Compilations of a kind of block at one shape: precisions of an engine's layers, at most."""
_WARM_UP: Final = 3
"""Forwards before a capture: what libraries do only once is not captured (PyTorch's notes)."""


class Blocks:
    """Both kinds of blocks, each compiled in whole.

    Static shapes: a kernel that fits any size is slower, and a size that comes again is compiled.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.compiles = 0
        """How often a block was compiled: one a kind and shape, or something compiles anew."""
        self._backend = torch._dynamo.lookup_backend(backend)
        limit = SHAPES * _VARIANTS
        # The default of 8 is passed by a few sizes; beyond it, a whole graph is an error.
        if torch._dynamo.config.recompile_limit < limit:
            torch._dynamo.config.recompile_limit = limit
        self.double: DoubleBlock = self._compiled(double_block)
        self.single: SingleBlock = self._compiled(single_block)

    def _compiled(self, block: Any) -> Any:
        return torch.compile(block, fullgraph=True, dynamic=False, backend=self._counted)

    def _counted(self, graph: Any, inputs: Any) -> Any:
        self.compiles += 1
        return self._backend(graph, inputs)


class Replayed:
    """`work` of tensors of one shape each, captured at the first call and replayed from then on.

    Inputs are copied into buffers of its own; those that an owner holds over its calls only where
    another owner's were there before. The output is overwritten by the next call: copy it first.
    """

    def __init__(self, work: Callable[[Tensors], Tensor], like: Tensors, capture: Capture) -> None:
        self.replays = 0
        """How often the capture was launched."""
        self._work = work
        self._capture = capture
        self._buffers = {name: torch.empty_like(tensor) for name, tensor in like.items()}
        self._owner: object = None
        self._captured: tuple[Tensor, Callable[[], None]] | None = None

    def run(self, owner: object, held: Tensors, varying: Tensors) -> Tensor:
        """`held` are the same tensors at every call of one owner; `varying` change."""
        assert {**held, **varying}.keys() == self._buffers.keys()
        if owner is not self._owner:
            self._put(held)
            self._owner = owner
        self._put(varying)
        if self._captured is None:
            self._captured = self._capture(lambda: self._work(self._buffers))
        output, replay = self._captured
        replay()
        self.replays += 1
        return output

    def _put(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            assert tensor.shape == self._buffers[name].shape, f"{name} has another shape"
            self._buffers[name].copy_(tensor)


def on_cuda() -> Capture:
    """Captures as CUDA graphs that share memory: none runs beside another, outputs are read first.

    Other threads may use CUDA meanwhile. Source: PyTorch's notes on CUDA graphs.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = work()
        return output, graph.replay

    return capture
