"""Tensors on disk by name, appended in shards: what is cached once and read at every step.

    >>> with Store(Path("cache/latents-1f0c"), writing=True) as store:
    ...     store.add("9e107d9d-128x128-4", latents)
    >>> Store(Path("cache/latents-1f0c")).get("9e107d9d-128x128-4").shape

A shard is a safetensors file of some `SHARD` bytes, written whole or not at all and named after
its content, so that an interruption loses what was not yet written, several processes write side
by side, and 400,000 pictures are hundreds of files. The names stand in the shards' own headers:
there is no index that could contradict them. Reading maps the files into memory, and copies only
what is asked for.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from safetensors.torch import save
from torch import Tensor

from dermaflux import files
from dermaflux.errors import DermaFluxError

SHARD: Final = 128 * 2**20
"""Bytes of a shard: few files, and still little to lose."""
SECONDS: Final = 60.0
"""A shard that is not full is written after these."""
_TYPES: Final = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_LONGEST_HEADER: Final = 2**27


class FullError(DermaFluxError):
    """The disk of a store is full or takes no files."""


class Store:
    """Named tensors of one folder; float32, float16 or bfloat16.

    Raises:
        DermaFluxError: a shard is damaged; the message names it.
    """

    def __init__(self, folder: Path, *, writing: bool = False) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Tensor, int, tuple[int, ...], torch.dtype]] = {}
        self._waiting: dict[str, Tensor] = {}
        self._bytes = 0
        self._written = time.monotonic()
        if writing:
            folder.mkdir(parents=True, exist_ok=True)
        for shard in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
            self._open(shard)

    def _open(self, shard: Path) -> None:
        size = shard.stat().st_size
        try:
            with shard.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if not 0 < length <= min(size - 8, _LONGEST_HEADER):
                    raise ValueError(f"its header of {length} bytes does not fit into {size}")
                header = json.loads(stream.read(length))
            start = 8 + length
            mapped = torch.from_file(str(shard), shared=False, size=size, dtype=torch.uint8)
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                if start + end > size:
                    raise ValueError(f"{name} ends at byte {start + end} of {size}")
                place = (mapped, start + begin, tuple(entry["shape"]), _TYPES[entry["dtype"]])
                self._places[name] = place
        except (ValueError, KeyError, TypeError) as error:
            raise DermaFluxError(
                f"{shard} is damaged ({error}); delete it and run the same command again"
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._places or name in self._waiting

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    def get(self, name: str) -> Tensor:
        """A copy of a tensor. Raises KeyError where it is not."""
        if name in self._waiting:
            return self._waiting[name].clone()
        mapped, begin, shape, dtype = self._places[name]
        count = torch.Size(shape).numel() * dtype.itemsize
        return mapped[begin : begin + count].clone().view(dtype).reshape(shape)

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor; it reaches the disk with its shard.

        Raises:
            FullError: the disk is full or takes no files.
        """
        self._waiting[name] = tensor.detach().cpu().contiguous()
        self._bytes += tensor.numel() * tensor.dtype.itemsize
        if self._bytes >= SHARD or time.monotonic() - self._written > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits. Raises what `add` raises; what waits then still waits."""
        if self._waiting:
            named = hashlib.sha256("\n".join(sorted(self._waiting)).encode()).hexdigest()[:24]
            shard = self.folder / f"{named}.safetensors"
            try:
                files.write(shard, save(self._waiting))
            except OSError as error:
                raise FullError(
                    f"{len(self._waiting)} tensors could not be written to {self.folder} "
                    f"({error.strerror}); what was written before is kept. Free some room, or "
                    "give --cache on another disk, and run the same command again"
                ) from error
            self._waiting, self._bytes = {}, 0
            self._open(shard)
        self._written = time.monotonic()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        # What was encoded before an interruption is kept; a full disk would only fail again.
        if not isinstance(error, FullError):
            self.flush()
