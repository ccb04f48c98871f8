"""One model over several processes: copies whose gradients are averaged, or shards.

    >>> spread = Spread.of(trainee, device, sharded=False)
    >>> with spread.alone(): loss.backward()       # gradients stay here
    >>> loss.backward()                             # gradients of all processes are averaged

Copies are torch's DistributedDataParallel. Shards are its FSDP 2 (`fully_shard`), block by block:
each process keeps its part of every weight, frozen ones too, and a block is whole only while it
computes. Both take LoRA in float32 on a base in bfloat16; FSDP 1 would not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training.lora.trainee import Trainee


@dataclass(frozen=True)
class Spread:
    """`model` is what is called; the trainee inside it is what is looked at."""

    model: Any
    sharded: bool

    @classmethod
    def of(cls, trainee: Trainee, device: torch.device, *, sharded: bool) -> Spread:
        """The model for all processes that are there; with one, the trainee itself."""
        if sharded:
            return cls(_shards(trainee, device), True)
        trainee.to(device)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(trainee, False)
        model = nn.parallel.DistributedDataParallel(
            trainee,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            # Every process read the same base and drew the same factors: nothing is to be sent.
            init_sync=False,
        )
        return cls(model, False)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block, gradients are summed here and not exchanged."""
        if self.sharded:
            self.model.set_requires_gradient_sync(False)
            yield
            self.model.set_requires_gradient_sync(True)
        elif isinstance(self.model, nn.parallel.DistributedDataParallel):
            with self.model.no_sync():
                yield
        else:
            yield


def _shards(trainee: Trainee, device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [
        module
        for module in trainee.modules()
        if type(module).__name__ in ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    ]
    # Each goes to the device as it is sharded: no process ever holds the whole model there.
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(trainee, mesh=mesh)
    trainee.to(device)
    return trainee
