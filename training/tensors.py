"""Safetensors read and written a tensor at a time, so that memory does not grow with the file.

The library maps files into memory, and what it touched counts as used; merging 24 GB may hold one
tensor. The format is eight bytes of header length, a JSON header, and the data
(https://github.com/huggingface/safetensors, "Format"). Equal contents make equal files.

    >>> file = TensorFile.open(Path("transformer/diffusion_pytorch_model.safetensors"))
    >>> file.read("proj_out.weight").shape
    torch.Size([64, 3072])
    >>> write(Path("copy.safetensors"), file.entries, file.read, file.metadata)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dermaflux import files
from dermaflux.errors import DermaFluxError

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
# The library's own limit: a header of hundreds of megabytes is an attack or noise.
_LONGEST_HEADER: Final = 100_000_000


class WeightsError(DermaFluxError):
    """A safetensors file is missing, damaged, or none at all."""


@dataclass(frozen=True)
class Entry:
    """What the header says of a tensor: its type in the format's names, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class TensorFile:
    """An opened file: its header. Data is read when asked for."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    starts: Mapping[str, int]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header, and check that the file is as long as it says.

        Raises:
            WeightsError: the file is missing, cut, a pickle, or otherwise no safetensors file.
        """
        try:
            with path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                first = stream.read(8)
                length = int.from_bytes(first, "little")
                if len(first) < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                    # Not asked before: a header of 640 bytes begins as a pickle does.
                    if first[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
                        raise WeightsError(
                            f"{path} is a pickle, which runs any code that it holds when it is "
                            "opened; use a safetensors file"
                        )
                    raise WeightsError(
                        f"{path} is no safetensors file, or was cut: it has {size} bytes and "
                        f"names a header of {length}; get it again"
                    )
                header = json.loads(stream.read(length))
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise WeightsError(
                f"{path} is no safetensors file: its header is no JSON ({error}); get it again"
            ) from error
        try:
            metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
            entries = {n: Entry(one["dtype"], tuple(one["shape"])) for n, one in header.items()}
            spans = {name: one["data_offsets"] for name, one in header.items()}
            unknown = sorted({entry.dtype for entry in entries.values()} - set(DTYPES))
            if unknown:
                raise WeightsError(f"{path} has tensors of type {unknown[0]}, which is not known")
            for name, (start, end) in spans.items():
                if not 0 <= start <= end or end - start != entries[name].bytes:
                    raise WeightsError(f"{path} is damaged: the place of {name} is not its size")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"{path} is no safetensors file: its header is not the object of tensors with "
                "dtype, shape and data_offsets that it has to be; get it again"
            ) from error
        needed = 8 + length + max((end for _, end in spans.values()), default=0)
        if size < needed:
            raise WeightsError(
                f"{path} was cut: it has {size} bytes, and {needed} are needed; get it again"
            )
        starts = {name: 8 + length + start for name, (start, _) in spans.items()}
        return cls(path, entries, metadata, starts)

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own and of its stored type.

        Raises:
            WeightsError: the file was cut since it was opened.
        """
        entry = self.entries[name]
        if not entry.bytes:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        data = bytearray(entry.bytes)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self.starts[name])
            view, filled = memoryview(data), 0
            # One read gives at most 2 GB.
            while filled < entry.bytes:
                count = stream.readinto(view[filled:])
                if not count:
                    raise WeightsError(f"{self.path} was cut while it was read, at {name}")
                filled += count
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def write(
    path: Path,
    entries: Mapping[str, Entry],
    content: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a file, whole or not at all, asking `content` for one tensor after the other.

    Raises:
        OSError: the disk is full, or takes no files there.
    """
    # Widest types first, as the library does: every tensor then starts at a multiple of its width.
    order = sorted(entries, key=lambda name: (-DTYPES[entries[name].dtype].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + entries[name].bytes
        header[name] = {
            "dtype": entries[name].dtype,
            "shape": list(entries[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with files.replacing(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = content(name)
            assert Entry.of(tensor) == entries[name], (name, Entry.of(tensor), entries[name])
            if tensor.numel():
                raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                stream.write(raw.numpy().data)
