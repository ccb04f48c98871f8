"""What a card can do, and proof of what ran on it: rates, kernels of a profile, errors.

>>> rates(torch.device("cuda"), side=8192, copied=2**32)
{'bf16': 7.2e14, 'fp8': 1.3e15, 'bytes': 4.1e12}
>>> profiled(lambda: engine.run(given))
{'fp8': {'calls': 304, ...}, 'attention': {...}, 'graph_launches': 1, 'longest': [...]}

A package may load an fp8 checkpoint and multiply in bf16 all the same (vLLM-Omni's pull request
4202): names of kernels tell. Their patterns are those of cuBLAS, CUTLASS, cuDNN and
flash-attention on Hopper, and have been matched against no profile of ours yet.
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dermaflux.engines.flux_fp8 import NUMBERS

PATTERNS: Final = {
    "fp8": re.compile(r"e4m3|f8f8|fp8|float8|nvjet_q|_scaled_mm", re.IGNORECASE),
    "attention": re.compile(r"cudnn.*(sdpa|flash|mha|fprop)|flash_fwd|fmha|flash_attention", re.I),
    "product": re.compile(r"gemm|nvjet|xmma|addmm|cutlass", re.IGNORECASE),
}
"""What kernels (on a CPU: operations) do, by their names."""
_LONGEST: Final = 12
_TRIES: Final = 5
_PER: Final = 10


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best(work: Callable[[], object], device: torch.device, repeats: int = _PER) -> float:
    """Seconds of one of `repeats` calls in a row, the best of five tries."""
    work()
    found = float("inf")
    for _ in range(_TRIES):
        settle(device)
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        settle(device)
        found = min(found, (time.perf_counter() - began) / repeats)
    return found


def rates(device: torch.device, side: int, copied: int) -> dict[str, float | None]:
    """Operations a second of square products in bf16 and in fp8, scaled by row; bytes a second read
    and written by a copy. None for fp8 where the device has no such product."""
    made = torch.Generator(device=device).manual_seed(0)
    a, b = (
        torch.randn(side, side, generator=made, device=device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    operations = 2.0 * side**3
    found: dict[str, float | None] = {"bf16": operations / best(lambda: a @ b, device)}
    found["fp8"] = None
    if device.type == "cuda":
        low, high = a.to(NUMBERS), b.to(NUMBERS)
        ones = torch.ones(side, device=device)

        def product() -> object:
            return torch._scaled_mm(
                low,
                high.t(),
                scale_a=ones[:, None],
                scale_b=ones[None],
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )

        found["fp8"] = operations / best(product, device)
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    found["bytes"] = 2 * source.nbytes / best(lambda: target.copy_(source), device)
    return found


def attentions(device: torch.device, tokens: int, heads: int, width: int) -> dict[str, float | str]:
    """Operations a second of each implementation of attention at a step's shape, or why not."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    made = torch.Generator(device=device).manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, heads, width, generator=made, device=device, dtype=torch.bfloat16)
        .transpose(1, 2)
        for _ in range(3)
    )  # fmt: skip
    operations = 4.0 * tokens**2 * heads * width
    found: dict[str, float | str] = {}
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    for backend in backends:
        try:
            with sdpa_kernel(backend):
                seconds = best(
                    lambda: functional.scaled_dot_product_attention(query, key, value), device
                )
        except RuntimeError as error:
            found[backend.name] = str(error).splitlines()[0]
            continue
        found[backend.name] = operations / seconds
    if importlib.util.find_spec("flash_attn_interface") is not None:
        # Flash-attention 3 in the place of torch's own flash, as torch registers it.
        attention = torch.nn.attention
        attention.activate_flash_attention_impl("FA3")
        try:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                found["FA3"] = operations / best(
                    lambda: functional.scaled_dot_product_attention(query, key, value), device
                )
        finally:
            attention.restore_flash_attention_impl()
    return found


def profiled(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Kernels of one call: how many of each kind and their ms, launches of graphs, the longest."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
        settle(device)
    cuda = device.type == "cuda"
    rows = []
    launches = 0
    for event in profile.key_averages():
        if "GraphLaunch" in event.key:
            launches += event.count
        if not cuda or event.device_type.name == "CUDA":
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            rows.append((event.key, event.count, spent / 1e3))
    return {**sorted_out(rows), "graph_launches": launches}


def sorted_out(rows: list[tuple[str, int, float]]) -> dict[str, Any]:
    """(name, calls, ms) of kernels -> calls and ms by kind, and the longest by name."""
    kinds: dict[str, Any] = {}
    for kind, pattern in PATTERNS.items():
        mine = [row for row in rows if pattern.search(row[0])]
        kinds[kind] = {
            "calls": sum(calls for _, calls, _ in mine),
            "ms": round(sum(ms for *_, ms in mine), 3),
        }
    longest = sorted(rows, key=lambda row: -row[2])[:_LONGEST]
    return {
        **kinds,
        "all_ms": round(sum(ms for *_, ms in rows), 3),
        "longest": [
            {"name": name[:120], "calls": calls, "ms": round(ms, 3)} for name, calls, ms in longest
        ],
    }


def differences(found: NDArray[Any], expected: NDArray[Any]) -> dict[str, float | None]:
    """Relative error (norms), and PSNR in dB over the range of what was expected; None if equal."""
    wide = expected.astype(np.float64)
    off = found.astype(np.float64) - wide
    error = float(np.sqrt((off**2).mean()))
    spread = float(wide.max() - wide.min())
    return {
        "relative_error": error / float(np.sqrt((wide**2).mean())),
        "psnr_db": 20 * float(np.log10(spread / error)) if error else None,
    }
