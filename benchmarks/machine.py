"""What a machine is: its processor, its instructions, its versions, and how busy it is.

>>> environment()["instructions"], load()
(['avx2', 'avx512f', 'avx512_vnni'], 0.21)
>>> before = before_measuring()
>>> after_measuring(before)["others_meanwhile"]
0.01
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from benchmarks import others
from dermaflux.hardware import processor, ram, usable_cores

_PACKAGES: Final = (
    "dermaflux", "numpy", "onnxruntime", "openvino", "torch", "diffusers", "timm", "bentoml",
)  # fmt: skip
_FLAGS: Final = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16",
)  # fmt: skip
"""Instructions that decide how fast products of matrices are, as Linux names them."""
_VARIABLES: Final = (
    "OPENBLAS_CORETYPE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
)
_COUNTED: Final = "counted_from"
"""Readings of before, in an environment of which `after_measuring` was not told yet."""


def environment() -> dict[str, Any]:
    """What runs this: processor, cores, instructions, versions, the load before measuring."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    memory = ram()
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else usable_cores(),
        "usable_cores": usable_cores(),
        "instructions": list(instructions()),
        "memory_gb": None if memory is None else round(memory.total / 1e9, 1),
        "last_level_cache_mb": round(last_level_cache() / 1e6, 1),
        "numpy_kernel": blas(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "load_before": load(),
    }


def before_measuring() -> dict[str, Any]:
    """`environment`, and `others_before`: the share of the cores, 0 to 1, that other processes took
    in half a second just now; None where the system does not tell (`benchmarks.others`)."""
    found = {**environment(), "others_before": others.look()}
    began = others.reading()
    return found if began is None else {**found, _COUNTED: asdict(began)}


def after_measuring(before: Mapping[str, Any]) -> dict[str, Any]:
    """What was there before, `load_after`, and of `before_measuring` also `others_meanwhile`: the
    share of the cores that other processes took since then; None where it is not known."""
    found = {name: value for name, value in before.items() if name != _COUNTED}
    if "others_before" in before:
        began = before.get(_COUNTED)
        reading = None if began is None else others.Reading(**began)
        found["others_meanwhile"] = others.share(reading, others.reading())
    return {**found, "load_after": load()}


def load() -> float | None:
    """Processes that ran or waited over the last minute, this one among them; None if unknown."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def instructions(root: Path = Path("/")) -> tuple[str, ...]:
    """Those of `_FLAGS` that the processor has; none where the system does not tell."""
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return ()
    lines = [line.partition(":")[2].split() for line in text.splitlines()
             if line.startswith(("flags", "Features"))]  # fmt: skip
    return tuple(flag for flag in _FLAGS if lines and flag in lines[0])


def last_level_cache(root: Path = Path("/")) -> int:
    """Bytes of the largest cache of the first core; 0 where the system does not tell."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [0]
    for file in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = file.read_text().strip()
            sizes.append(int(text.rstrip("KMG")) * units.get(text[-1:], 1))
        except (OSError, ValueError):
            continue
    return max(sizes)


def blas() -> str | None:
    """numpy's library of products and its kernel, `openblas SkylakeX`: a wrong one is slow."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return None
    from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

    found = [one for one in threadpool_info() if one.get("user_api") == "blas"]
    return (
        f"{found[0]['internal_api']} {found[0].get('architecture', '')}".strip() if found else None
    )
