"""A checkpoint's weights, one tensor in memory at a time.

A graph's initializers are tensors that are read from the safetensors shards when somebody asks for
their numbers, and forgotten afterwards: transposing, casting and quantizing are done on the way
from the shard into the graph's file. Whoever writes a model of 24 GB so holds its largest tensor.

    >>> shards = stored(Path("models/mini/transformer"))
    >>> weight = shards["proj_out.weight"]                      # nothing was read
    >>> numbers = cast(transposed(weight), onnx_ir.DataType.FLOAT).numpy()
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np
import onnx_ir
from numpy.typing import NDArray
from safetensors import safe_open

from dermaflux.engines import parts
from dermaflux.errors import BundleError

if TYPE_CHECKING:
    import torch
    from torch import nn

Numbers = NDArray[Any]

_KINDS: Final = {
    "F64": onnx_ir.DataType.DOUBLE,
    "F32": onnx_ir.DataType.FLOAT,
    "F16": onnx_ir.DataType.FLOAT16,
    "BF16": onnx_ir.DataType.BFLOAT16,
    "I64": onnx_ir.DataType.INT64,
    "I32": onnx_ir.DataType.INT32,
    "BOOL": onnx_ir.DataType.BOOL,
}


def stored(folder: Path) -> dict[str, onnx_ir.LazyTensor]:
    """The tensors of all safetensors files of a folder by name; only headers are read.

    Raises:
        BundleError: a tensor is of a type that is not read, such as fp8.
    """
    found: dict[str, onnx_ir.LazyTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - a shard is no mapping
                header = shard.get_slice(key)
                if header.get_dtype() not in _KINDS:
                    raise BundleError(
                        f"{file}: {key} is stored as {header.get_dtype()}, and is read as one of "
                        f"{', '.join(_KINDS)}; save the weights in bf16 or fp16 first"
                    )
                found[key] = lazy(
                    key, _KINDS[header.get_dtype()], header.get_shape(), _reader(file, key)
                )
    return found


def skeleton(checkpoint: Path, part: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A part whose parameters take no memory: on the device "meta". Buffers hold their numbers."""
    import torch
    from accelerate import init_empty_weights

    with init_empty_weights():
        module = parts.module(checkpoint, part, dtype or torch.float32, weights=False)
    # An empty parameter is a new one, so layers that shared theirs no longer do.
    tie: Any = getattr(module.model, "tie_weights", None)
    if tie is not None:
        tie()
    return module


def of_module(module: nn.Module, folder: Path) -> dict[str, onnx_ir.LazyTensor]:
    """The tensors of a part in a folder's shards, by the names that the module has: parameters, and
    those buffers that are learnt as well, such as a batch normalisation's running statistics.

    Raises:
        BundleError: the shards lack one, or have it in another shape.
    """
    shards = stored(folder)
    # transformers 5 drops the outermost name of CLIP's tensors, older checkpoints have it.
    found = {key.split(".", 1)[1]: tensor for key, tensor in shards.items() if "." in key} | shards
    kept = module.state_dict()
    wanted = [
        *module.named_parameters(remove_duplicate=False),
        # Counters of batches are of training alone, and old files lack them.
        *((n, b) for n, b in module.named_buffers() if n in kept and b.is_floating_point()),
    ]
    # A tensor that layers share is stored by one of its names.
    ties: dict[int, list[str]] = {}
    for name, tensor in wanted:
        ties.setdefault(id(tensor), []).append(name.removeprefix("model."))
    tensors = {}
    for name, tensor in wanted:
        source = next((found[n] for n in ties[id(tensor)] if n in found), None)
        if source is None or tuple(source.shape) != tuple(tensor.shape):
            has = "lack" if source is None else f"have {list(source.shape)} as"
            raise BundleError(
                f"the weights in {folder} {has} {name.removeprefix('model.')}, which needs "
                f"{list(tensor.shape)}; the file is of another model or was cut"
            )
        tensors[name] = source
    return tensors


def lazy(
    name: str, kind: onnx_ir.DataType, shape: Any, read: Callable[[], Numbers]
) -> onnx_ir.LazyTensor:
    """A tensor whose numbers `read` gives whenever they are asked for; they are not kept."""
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.Tensor(read(), dtype=kind), kind, onnx_ir.Shape(shape), name=name
    )


def transposed(tensor: onnx_ir.TensorProtocol) -> onnx_ir.LazyTensor:
    """The same with the two axes of a matrix in the other order."""

    def turned() -> Numbers:
        numbers = tensor.numpy()
        # As plain integers of that width: numpy moves types that are not its own one by one.
        plain = numbers.view(f"u{numbers.dtype.itemsize}")
        return np.ascontiguousarray(plain.T).view(numbers.dtype)

    return lazy(str(tensor.name), tensor.dtype, tuple(tensor.shape)[::-1], turned)


def cast(tensor: onnx_ir.TensorProtocol, kind: onnx_ir.DataType) -> onnx_ir.TensorProtocol:
    """The same numbers, rounded to another type."""
    if tensor.dtype == kind:
        return tensor
    return lazy(str(tensor.name), kind, tensor.shape, lambda: converted(tensor.numpy(), kind))


def converted(numbers: Numbers, kind: onnx_ir.DataType) -> Numbers:
    """Numbers rounded to another type, to nearest even; by torch, which takes a fifth of the time
    that numpy takes for types that are not its own."""
    import torch

    known = {
        onnx_ir.DataType.FLOAT: torch.float32,
        onnx_ir.DataType.FLOAT16: torch.float16,
        onnx_ir.DataType.BFLOAT16: torch.bfloat16,
        onnx_ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    }
    if kind not in known or numbers.dtype.kind not in "fV":
        return numbers.astype(kind.numpy())
    made = as_torch(numbers).to(known[kind])
    width = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[made.itemsize]
    return made.view(width).numpy().view(kind.numpy())


def as_torch(numbers: Numbers) -> torch.Tensor:
    """An array as a tensor, of the same memory where it may be written to."""
    import torch

    # torch warns of what it could write to and may not.
    mine = numbers if numbers.flags.writeable else numbers.copy()
    if mine.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(mine.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(mine)


def named(tensor: onnx_ir.TensorProtocol, name: str) -> onnx_ir.LazyTensor:
    """The same by another name."""
    return lazy(name, tensor.dtype, tensor.shape, tensor.numpy)


def _reader(file: Path, key: str) -> Callable[[], Numbers]:
    def read() -> Any:
        import torch

        # Opened anew for every tensor: pages of a mapped file count as memory until it is closed.
        with safe_open(file, framework="pt") as shard:
            tensor = shard.get_tensor(key)
            if tensor.dtype is torch.bfloat16:
                return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16).copy()
            return tensor.numpy().copy()

    return read
