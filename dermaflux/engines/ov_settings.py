"""What a device is told when it compiles a file: threads, and the numbers that it computes in.

    >>> told("CPU", "int8", threads=2)["INFERENCE_PRECISION_HINT"]
    'f32'

A CPU computes in fp32, and in int8 where the graph says so. Its hint for bf16 is left alone in the
generator: it takes positions and times down with it, and a single step is further off than eager
torch in bf16 is. A classifier has neither, so its int8 and bf16 files are computed in bf16 where
the processor has it, if what comes out is near fp32's on the engine's own trial
(`dermaflux.engines.ov_engine`). GPU and NPU compute files below fp32 in fp16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dermaflux.engines import OPENVINO, OPENVINO_GPU, OPENVINO_NPU, usable_cores
from dermaflux.engines.ov_library import core

DEVICES: Final[Mapping[str, str]] = {OPENVINO: "CPU", OPENVINO_GPU: "GPU", OPENVINO_NPU: "NPU"}
"""Engine -> OpenVINO's name of the device."""


def told(device: str, precision: str, threads: int | None = None) -> dict[str, str]:
    """What a device is told when it compiles a file of a precision."""
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        # A compiled cache is a second artifact that can be stale; opening is fast without.
        "CACHE_DIR": "",
        # Without it a CPU with bf16 computes everything in bf16, and nobody is told.
        "INFERENCE_PRECISION_HINT": computes(device, precision),
    }
    if device == "CPU":
        settings |= {
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads or usable_cores()),
            # Threads tied to cores wait there for whoever else runs on them, and spin meanwhile.
            "ENABLE_CPU_PINNING": "NO",
        }
    return settings


def computes(device: str, precision: str) -> str:
    """What a file of a precision is computed in on a device: `f32` or `f16`.

    int8 and fp8 are operators of the graph; this is for all others.
    """
    return "f32" if device == "CPU" or precision == "fp32" else "f16"


def has_bf16() -> bool:
    """Whether the processor has instructions for bf16, and does not only know the numbers."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
