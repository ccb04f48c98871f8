"""Whether a tensor's numbers are there: inside the graph, or in a file beside it.

What ONNX reads without a word, and TensorRT refuses or reads as other numbers: bytes that are
fewer than the shape says, a place that is no number, a file that lies elsewhere.

    >>> list(faults(weight, Path("bundles/mini/transformer")))
    ['says 4 bytes and its shape needs 4096; export the bundle anew']
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

import onnx
from onnx import TensorProto
from onnx.external_data_helper import uses_external_data

_SMALL: Final[Mapping[int, int]] = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
}
"""Types of less than a byte: numpy gives each number one, a file does not."""


def faults(tensor: TensorProto, folder: Path) -> Iterator[str]:
    """What is wrong with the bytes of a tensor of a graph in `folder`; nothing is read."""
    if any(size < 0 for size in tensor.dims):
        yield f"has the shape {list(tensor.dims)}"
        return
    needed = _bytes(tensor)
    if uses_external_data(tensor):
        yield from _beside(tensor, folder, needed)
    elif needed is None:
        if tensor.data_type != TensorProto.STRING:
            yield f"is of the type {tensor.data_type}, which ONNX does not know"
    elif tensor.HasField("raw_data"):
        if len(tensor.raw_data) != needed:
            yield f"holds {len(tensor.raw_data)} bytes and its shape needs {needed}"
    else:
        try:
            onnx.checker.check_tensor(tensor)
        except onnx.checker.ValidationError as error:
            yield str(error).strip().splitlines()[0]


def _beside(tensor: TensorProto, folder: Path, needed: int | None) -> Iterator[str]:
    """External data: there, inside the folder, and as long as the shape needs."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    place = PurePosixPath(location)
    if not location or place.is_absolute() or ".." in place.parts or "\\" in location:
        yield f"lies at {location!r}, outside of the graph's folder"
        return
    file = folder / place
    if not file.is_file():
        yield f"{file} is missing; export the bundle anew"
        return
    if not file.resolve().is_relative_to(folder.resolve()):
        yield f"lies at {location!r}, a link to {file.resolve()}, outside of the graph's folder"
        return
    numbers = {}
    for key in ("offset", "length"):
        text = entries.get(key, "")
        if text and not (text.isascii() and text.isdigit()):
            yield f"has the {key} {text!r}; a number of bytes, 0 or more, is needed"
            return
        numbers[key] = int(text) if text else None
    size, start = file.stat().st_size, numbers["offset"] or 0
    # Without a length, all that follows is the tensor's.
    length = numbers["length"] if numbers["length"] is not None else max(0, size - start)
    if start + length > size:
        yield (
            f"ends at byte {start + length} of {file.name}, which has {size}; export the bundle "
            "anew"
        )
    elif length != needed:
        yield f"says {length} bytes and its shape needs {needed}; export the bundle anew"


def _bytes(tensor: TensorProto) -> int | None:
    """How many bytes the shape needs; None for a type that has no size."""
    try:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError:
        return None
    if tensor.data_type == TensorProto.STRING:
        return None
    bits = _SMALL.get(tensor.data_type, int(kind.itemsize) * 8)
    count: int = math.prod(tensor.dims)
    return (count * bits + 7) // 8
