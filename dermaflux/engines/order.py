"""Which engine runs which file: the order of speed, and in words what stands against each.

    >>> pick(bundle, "transformer", None, None, look()).rejected[0]
    ('tensorrt', 'no NVIDIA driver is loaded')

The order on CPUs is measured (README); that on GPUs follows published figures, which put TensorRT
first, and our own engines have not run on a GPU yet.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from typing import Final

from dermaflux import engines
from dermaflux.bundle import Bundle
from dermaflux.engines import (
    OPENVINO,
    OPENVINO_GPU,
    OPENVINO_NPU,
    ORT,
    ORT_CUDA,
    ORT_TENSORRT,
    TENSORRT,
    Choice,
    library,
)
from dermaflux.errors import EngineError
from dermaflux.hardware import Machine
from dermaflux.tiers import Tier

_PLAN: Final = "{} in a TensorRT plan built for this GPU is the fastest there"
_PROVIDER: Final = "{} in ONNX Runtime's TensorRT provider, where there is no plan"
_CUDA: Final = "{} in ONNX Runtime's CUDA provider needs no building"
_INTEL: Final = "{} on Intel's GPU is faster than on the CPU beside it"
_WIDENED: Final = "{} is computed in fp32 on this CPU: for its numbers, not for speed"
_PRUNED: Final = "int8 on fewer pieces of the picture"
PRUNED: Final = "int8-pruned"

_ORDER: Final = (
    *((TENSORRT, level, _PLAN) for level in ("fp8", "int8", "bf16", "fp16", "fp32")),
    *((ORT_TENSORRT, level, _PROVIDER) for level in ("int8", "bf16", "fp16", "fp32")),
    *((ORT_CUDA, level, _CUDA) for level in ("fp16", "bf16", "fp32")),
    *((OPENVINO_GPU, level, _INTEL) for level in ("int8", "fp16", "fp32")),
    # Symmetric int8 was measured at 2.0 to 2.5 times eager fp32 on OpenVINO, and slower than fp32
    # on ONNX Runtime, whose kernels want unsigned activations: so int8 there comes last.
    (OPENVINO, "int8", "int8 on OpenVINO is the fastest on a CPU"),
    (OPENVINO, "fp32", "fp32 on OpenVINO is the fastest without int8"),
    (ORT, "fp32", "fp32 on ONNX Runtime runs everywhere"),
    (ORT, "int8", "int8 on ONNX Runtime, slower than fp32 there"),
    *((OPENVINO, level, _WIDENED) for level in ("bf16", "fp16", "fp8")),
    *((ORT, level, _WIDENED) for level in ("fp16", "bf16", "fp8")),
    # Only when asked for: it does less work than the classifier was trained to do.
    *((name, PRUNED, _PRUNED) for name in (TENSORRT, ORT_TENSORRT, OPENVINO, ORT)),
    # Only when asked for: an NPU takes one size, batch 1.
    *((OPENVINO_NPU, level, "{} on Intel's NPU") for level in ("int8", "fp16")),
)
_NEEDS: Final[Mapping[str, tuple[tuple[int, int], str]]] = {
    "fp8": ((8, 9), "Ada, Hopper and newer GPUs"),
    "bf16": ((8, 0), "Ampere and newer GPUs"),
    "int8": ((7, 5), "Turing and newer GPUs"),
    "fp16": ((5, 3), "GPUs of compute capability 5.3 and newer"),
}
"""Precision -> the compute capability from which NVIDIA's GPUs have instructions for it."""


_TIERED: Final = ("transformer", "classifier")
"""Parts that take the time, which a tier is about: they need a file of it."""


def pick(
    bundle: Bundle,
    part: str,
    engine: str | None,
    precision: str | None,
    machine: Machine,
    tier: Tier | None = None,
) -> Choice:
    """See `dermaflux.engines.choose`, which knows that the engine exists and is installed."""
    if part not in bundle.parts:
        raise EngineError(f"the bundle {bundle.name} has no part {part!r}")
    files = bundle.parts[part].files
    if tier is not None:
        tier.require(precision)
        if not any(tier.takes(level) for level in files):
            if part in _TIERED:
                raise EngineError(_without(bundle, part, tier))
            tier = None
    wanted = precision
    if precision is not None and precision not in files:
        everywhere = sorted({p for other in bundle.parts.values() for p in other.files})
        if precision not in everywhere:
            raise EngineError(
                f"precision {precision!r} is not in {bundle.path}; it has {', '.join(everywhere)}"
            )
        wanted = None
    absent: dict[str, str | None] = {}
    rejected: list[tuple[str, str]] = []
    for name, level, reason in _ORDER:
        if engine not in (None, name) or wanted not in (None, level):
            continue
        if tier is not None and not tier.takes(level):
            continue
        if engine is None and name == OPENVINO_NPU:
            continue
        if level == PRUNED and wanted is None and (tier is None or not tier.precisions):
            continue
        if name not in absent:
            absent[name] = _absent(name, machine)
            if absent[name]:
                rejected.append((name, str(absent[name])))
        if absent[name]:
            continue
        why = _against(bundle, part, name, level, machine)
        if why:
            rejected.append((f"{name} {level}", why))
            continue
        if wanted != precision:
            reason = f"{part} has no {precision} file"
        elif engine is not None or precision is not None:
            reason = "asked for"
        elif tier is not None:
            reason = f"tier {tier.name}: {reason}"
        device = "cuda:0" if name in (TENSORRT, ORT_TENSORRT, ORT_CUDA) else "cpu"
        return Choice(part, name, level, reason.format(level), tuple(rejected), device)
    tried = "; ".join(f"{label}: {why}" for label, why in rejected)
    installs = " or ".join(library(name)[1] for name in (OPENVINO, ORT))
    there = engines.installed(OPENVINO) or engines.installed(ORT)
    remedy = "" if there else f". Install one: {installs}"
    raise EngineError(f"no engine can run {part} ({tried}){remedy}")


def _without(bundle: Bundle, part: str, tier: Tier) -> str:
    files = bundle.parts[part].files
    return (
        f"tier {tier.name!r} needs {part} in {' or '.join(tier.precisions)}, and {bundle.path} has "
        f"{', '.join(files)}; use another tier, or export it again with it in --precision"
    )


def _absent(name: str, machine: Machine) -> str | None:
    """Why an engine cannot be had here at all: hardware, library, or the library's parts."""
    if name in (TENSORRT, ORT_TENSORRT, ORT_CUDA) and not machine.gpus:
        return machine.no_gpu or "no NVIDIA GPU is seen"
    intel = {OPENVINO_GPU: "GPU", OPENVINO_NPU: "NPU"}.get(name)
    if intel and intel not in machine.intel:
        return f"no {intel} of Intel's is seen"
    if not engines.installed(name):
        module, command = library(name)
        return f"{module} is not installed; {command}"
    checks: Mapping[str, Callable[[], str | None]] = {
        TENSORRT: _no_bindings,
        ORT_CUDA: lambda: _no_provider("CUDAExecutionProvider"),
        ORT_TENSORRT: lambda: _no_provider("TensorrtExecutionProvider"),
    }
    return checks[name]() if name in checks else None


def _against(bundle: Bundle, part: str, name: str, level: str, machine: Machine) -> str | None:
    """What stands against a file on an engine that is here."""
    files = bundle.parts[part].files
    if level not in files:
        return f"the bundle has no {level} file of {part}"
    if name not in files[level].engines:
        return f"the bundle does not allow {name} for its {level} file"
    if name in (TENSORRT, ORT_TENSORRT, ORT_CUDA):
        gpu = machine.gpus[0]
        least, which = _NEEDS.get(level, ((0, 0), ""))
        if gpu.capability < least:
            major, minor = gpu.capability
            return f"{level} needs {which}; {gpu.name} has compute capability {major}.{minor}"
    if name == TENSORRT:
        return _no_plan(bundle, part, level, machine)
    return None


def _no_plan(bundle: Bundle, part: str, level: str, machine: Machine) -> str | None:
    """Whether a plan for this hardware lies in the bundle. Its bytes are compared when it opens."""
    from dermaflux.engines import trt_plan

    gpu = machine.gpus[0]
    version = importlib.metadata.version("tensorrt")
    key = trt_plan.Hardware(".".join(map(str, gpu.capability)), version, gpu.driver)
    built = trt_plan.variants(bundle, key, part, level)
    if trt_plan.DYNAMIC in built:
        return None
    if built:
        return (
            f"the plans of {part} in {level} are for {', '.join(built)} alone; "
            f"{trt_plan.command(bundle, part, level)}"
        )
    return f"no plan of {part} in {level} for {key.key}; {trt_plan.command(bundle, part, level)}"


def _no_bindings() -> str | None:
    if importlib.util.find_spec("cuda") is None:
        return "cuda-bindings is not installed; pip install cuda-bindings"
    return None


def _no_provider(provider: str) -> str | None:
    from dermaflux.engines import ort_gpu

    return ort_gpu.missing(provider)
