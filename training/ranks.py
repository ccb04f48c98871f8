"""The processes that train one model together, as torchrun starts them, or this one alone.

torchrun --nproc_per_node 2 -m training.vit --data ISIC2017 --out runs/vit

N processes compute what one computes with `--accumulate N`, on a CPU to the bit for two. Neither is
one pass over the whole batch: drop path and dropout draw for each part by itself, and batch
normalisation sees its part alone, which changes what it learns strongly. Its running statistics are
the mean over the processes' own, where one process moves them N times a step.

>>> with joined():
...     ranks = Ranks.here("auto")
...     seconds = ranks.told(clock())       # the first process's, everywhere
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dermaflux.errors import DermaFluxError
from training.recipe import Recipe, RecipeError

Told = TypeVar("Told")


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started; alone, nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    # The first process alone reads, calibrates and reports, which may take long.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=6))
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and where it computes."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def here(cls, device: str = "cpu") -> Ranks:
        """This process's place; `device` "auto" is a GPU where there is one."""
        there = dist.is_initialized()
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if kind == "cuda":
            number = int(os.environ.get("LOCAL_RANK", "0")) if there else 0
            torch.cuda.set_device(number)
            found = torch.device("cuda", number)
        else:
            found = torch.device("cpu")
        return cls(dist.get_rank() if there else 0, dist.get_world_size() if there else 1, found)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def told(self, value: Told) -> Told:
        """What the first process has, everywhere."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def once(self, work: Callable[[], Told]) -> Told:
        """What the first process finds by `work`, everywhere; an error meant for the user too."""
        found: tuple[Told | None, DermaFluxError | None] = (None, None)
        if self.first:
            try:
                found = (work(), None)
            except DermaFluxError as error:
                found = (None, error)
        value, failed = self.told(found)
        if failed is not None:
            raise failed
        return cast(Told, value)

    def added(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def averaged_buffers(self, model: nn.Module) -> None:
        """Running statistics of batch normalisation become the mean over all processes."""
        if self.world == 1:
            return
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world

    def copies(self, model: nn.Module) -> Any:
        """The model to call: gradients are averaged over the processes as they come."""
        if self.world == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
        )


def batch_normalised(model: nn.Module) -> bool:
    """Whether what the model makes of a picture depends on the others of its part."""
    return any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in model.modules())


def parts_of(model: nn.Module, recipe: Recipe, ranks: Ranks) -> int:
    """In how many parts a batch is learnt, over all processes.

    Raises:
        RecipeError: the batch has no so many equal parts, or batch normalisation would see one
            picture at once: where a layer has one place of it, there is no variance.
    """
    parts = ranks.world * recipe.accumulate
    mixing = bool(recipe.mixup or recipe.cutmix)
    if recipe.batch % parts or (mixing and recipe.batch // parts % 2):
        raise RecipeError(
            f"batch {recipe.batch} has no {parts} equal{' and even' * mixing} parts for "
            f"{ranks.world} processes, {recipe.accumulate} parts each; give a multiple of "
            f"{parts * (1 + mixing)}"
        )
    if recipe.batch == parts and batch_normalised(model):
        raise RecipeError(
            f"{recipe.architecture} has batch normalisation, which needs two pictures a part or "
            f"more: batch {recipe.batch} has {parts} parts of one ({ranks.world} processes, "
            f"accumulate {recipe.accumulate}); give --batch {2 * parts} or more"
        )
    return parts
