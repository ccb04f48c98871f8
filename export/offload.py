"""A part that runs without being in memory: every layer reads its weights when its turn comes.

For a model that this machine's disk holds and its memory does not: the layers stay on the device
"meta", accelerate's hooks fill one from its shard before it runs and empty it afterwards. A pass
reads every weight once, whatever the batch, so the more items share a pass the better.

    >>> engine = offloaded(Path("flux"), "transformer", torch.bfloat16)
    >>> engine.run({"hidden_states": tokens, ...})          # 24 GB read, 1 GB held
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from dermaflux.engines import eager
from dermaflux.engines.eager import EagerEngine
from export.source import folder_of
from export.weights import as_torch, of_module, skeleton


class _Shards(Mapping[str, torch.Tensor]):
    """Parameter name -> its numbers, read from the shards whenever they are asked for."""

    def __init__(self, tensors: Mapping[str, onnx_ir.LazyTensor], dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._dtype = dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        return as_torch(self._tensors[name].numpy()).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def offloaded(
    checkpoint: Path, part: str, dtype: torch.dtype = torch.float32, *, device: str = "cpu"
) -> EagerEngine:
    """The engine of a part whose weights stay on the disk. Calls from several threads take turns.

    Raises:
        BundleError: the shards lack a tensor.
        EngineError: torch has no such device.
    """
    from accelerate.hooks import attach_align_device_hook

    place = eager.torch_device(device)
    module: Any = skeleton(checkpoint, part, dtype)
    shards = _Shards(of_module(module, checkpoint / folder_of(part)), dtype)
    # Buffers hold numbers that no shard has, and are small.
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(place))
    attach_align_device_hook(module, place, offload=True, weights_map=shards)
    return EagerEngine(
        model=module,
        inputs=module.inputs,
        outputs=module.outputs,
        precision=eager.PRECISIONS[dtype],
        dtype=dtype,
        device=place,
        lock=threading.Lock(),
    )
