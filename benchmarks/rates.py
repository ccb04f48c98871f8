"""The rates of a machine that no program on it can pass, and the floors that they make.

    >>> rate = fastest("int8")
    >>> rate.per_second, rate.how
    (812000000000.0, 'OpenVINO, four products of 2048 x 2048 in a row')
    >>> Floor(flops=26.4e9, bytes=37e6).seconds(rate.per_second, bandwidth())
    0.0325

A floor is honest only if its rate is the best that can be had, so every library that is here is
asked. Rates are the best of several tries: what disturbs a machine only slows it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from benchmarks.machine import blas, instructions, last_level_cache
from dermaflux.hardware import ram, usable_cores

PRECISIONS: Final = ("fp32", "bf16", "int8")
_ALIASES: Final = {"float32": "fp32", "bfloat16": "bf16"}
_NEEDED: Final = {
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "int8": ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"),
}
"""Precision -> instructions of which one has to be there, or it is emulated."""
_SIDES: Final = (512, 1024, 2048)
"""Large enough to be bound by arithmetic; which is faster depends on the caches."""
_CHAIN: Final = 4
"""Products in a row, so that taking values in and giving them out weighs little."""
_LEAST: Final = 2**28
_LONG = 0.5
"""Seconds over which the best of a kind is looked for: on a busy machine quiet moments are rare."""


@dataclass(frozen=True)
class Rate:
    """Operations a second of a product of matrices, 2 a multiply-add, and what reached them.

    None where this machine has no instructions for the precision, or no library that uses them;
    `how` then says why.
    """

    per_second: float | None
    how: str


@dataclass(frozen=True)
class Floor:
    """What a piece of work cannot do without: operations, and bytes that are read from memory."""

    flops: float
    bytes: float

    def seconds(self, rate: float, bandwidth: float) -> float:
        """The least time at `rate` operations and `bandwidth` bytes a second: the longer of both,
        since arithmetic and reading overlap (Williams et al., 2009: the roofline)."""
        return max(self.flops / rate, self.bytes / bandwidth)


def matmul_rate(dtype: str = "fp32", rounds: int = 20) -> float | None:
    """Operations a second of a large product in `fp32`, `bf16` or `int8`: the best that was seen.

    None where the precision cannot be had or would be emulated; `fastest` tells why.
    """
    return fastest(dtype, rounds).per_second


def fastest(dtype: str, rounds: int = 20) -> Rate:
    """`matmul_rate`, and how: the best of all libraries that are installed.

    Raises:
        ValueError: another precision than those of `PRECISIONS`.
    """
    precision = _ALIASES.get(dtype, dtype)
    if precision not in PRECISIONS:
        raise ValueError(f"precision {dtype!r} is not measured; use {', '.join(PRECISIONS)}")
    needed, have = _NEEDED.get(precision), instructions()
    if needed and have and not set(needed) & set(have):
        return Rate(None, f"this processor has none of {', '.join(needed)}: {precision} would be "
                          "emulated")  # fmt: skip
    found = {how: rate for how, rate in _tries(precision, rounds).items() if rate is not None}
    if not found:
        return Rate(None, f"no library that is installed here multiplies in {precision}")
    how = max(found, key=lambda one: found[one])
    return Rate(found[how], how)


def bandwidth(rounds: int = 5) -> float:
    """Bytes a second that all cores together read from memory, far beyond any cache: the best."""
    memory = ram()
    most = _LEAST if memory is None else memory.available // 4
    count = min(max(_LEAST, 4 * last_level_cache()), max(most, 2**24)) // 4
    # Filled, not zeros: pages that were never written all show the same one of the kernel's.
    values = np.ones(count, dtype=np.float32)
    threads = usable_cores()
    parts = np.array_split(values, threads)
    with ThreadPoolExecutor(threads) as pool:
        # The maximum is vectorised and gives up the interpreter's lock; a sum is bound by adding.
        best = _best(lambda: list(pool.map(np.max, parts)), rounds)
    return values.nbytes / best


def _best(work: Callable[[], object], rounds: int) -> float:
    """Seconds of the quickest call, of `rounds` or of as many as `_LONG` seconds take."""
    work()
    best = float("inf")
    end = time.perf_counter() + _LONG
    while rounds > 0 or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
        rounds -= 1
    return best


def _tries(precision: str, rounds: int) -> Mapping[str, float | None]:
    found: dict[str, float | None] = {}
    for side in _SIDES:
        few = max(3, int(rounds * min(1, (1024 / side) ** 3)))
        operations = 2 * side**3
        if precision == "fp32":
            found[f"numpy ({blas()}), {side} x {side}"] = operations / _best(_numpy(side), few)
        if importlib.util.find_spec("torch") is not None:
            # Some builds of torch have no product of 8-bit matrices.
            with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
                seconds = _best(_torch(side, precision), few)
                found[f"torch, {side} x {side}"] = operations / seconds
        if importlib.util.find_spec("openvino") is not None:
            chain = _openvino(side, precision)
            found[f"OpenVINO, {_CHAIN} in a row of {side} x {side}"] = (
                None if chain is None else _CHAIN * operations / _best(chain, few)
            )
    return found


def _numpy(side: int) -> Callable[[], object]:
    a, b = np.random.default_rng(0).random((2, side, side), dtype=np.float32)
    out = np.empty_like(a)
    return lambda: np.matmul(a, b, out=out)


def _torch(side: int, precision: str) -> Callable[[], object]:
    import torch

    made = torch.Generator().manual_seed(0)
    if precision == "int8":
        left, right = (
            torch.randint(-100, 100, (side, side), dtype=torch.int8, generator=made)
            for _ in range(2)
        )
        # oneDNN's product of 8-bit matrices into 32-bit sums.
        return lambda: torch._int_mm(left, right)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.rand(side, side, generator=made).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


def _openvino(side: int, precision: str) -> Callable[[], object] | None:
    """Products in a row with constant matrices; None where OpenVINO runs them in another type."""
    import openvino as ov
    from openvino import opset13 as op

    from dermaflux.engines.ov import core

    random = np.random.default_rng(0)
    weights = (random.random((side, side), dtype=np.float32) - 0.5) / np.float32(side**0.5)
    given = op.parameter([side, side], np.float32)
    value: Any = given
    for _ in range(_CHAIN):
        matrix: Any = op.constant(weights)
        if precision == "int8":
            low, high = np.float32(-1), np.float32(1)
            value = op.fake_quantize(value, low, high, low, high, 256)
            eighth = np.float32(np.abs(weights).max() / 127)
            matrix = op.multiply(
                op.convert(op.constant(np.rint(weights / eighth).astype(np.int8)), np.float32),
                op.constant(eighth),
            )
        value = op.matmul(value, matrix, False, True)
    kind = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}[precision]
    settings = {"INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": str(usable_cores()),
                "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip
    compiled = core().compile_model(ov.Model([value], [given]), "CPU", settings)
    wanted = {"fp32": ("f32",), "int8": ("i8", "u8"), "bf16": ("bf16",)}[precision]
    ran = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) in ("FullyConnected", "MatMul")
    ]
    if not ran or any(one not in wanted for one in ran):
        return None
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(random.random((side, side), dtype=np.float32)))
    return lambda: request.infer()
