"""Which plans are built of a bundle: parts, precisions and sizes -> jobs for `export.trt_build`.

>>> plan_jobs(bundle, hardware, ["transformer"], (), [], Flags(8.0, 3, False))[0].precision
'fp8'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from dermaflux.bundle import Bundle
from dermaflux.engines import TENSORRT
from dermaflux.engines.trt_plan import Hardware, graph_files, plan_path
from dermaflux.errors import EngineError
from export.shapes import Size
from export.trt_build import Flags, Job
from export.trt_profile import profile, variant
from export.trt_quantization import both_factors

ORDER: Final = ("fp8", "int8", "bf16", "fp16", "fp32")
"""Best first, of those that a part has and the GPU computes in."""
_QUANTIZED: Final = ("fp8", "int8")
CAPABILITY: Final[Mapping[str, tuple[int, int]]] = {"fp8": (8, 9), "bf16": (8, 0), "int8": (7, 5)}
"""Precision -> the first compute capability that TensorRT computes it on."""


def chosen_parts(bundle: Bundle, parts: Sequence[str]) -> list[str]:
    """The parts that were asked for, or all, in the bundle's order.

    Raises:
        EngineError: the bundle has no such part.
    """
    for part in parts:
        if part not in bundle.parts:
            raise EngineError(
                f"--parts {part!r} is not in {bundle.path}; it has {', '.join(bundle.parts)}"
            )
    return [part for part in bundle.parts if not parts or part in parts]


def plan_jobs(
    bundle: Bundle,
    hardware: Hardware,
    parts: Sequence[str],
    precisions: Sequence[str],
    sizes: Sequence[Size],
    flags: Flags,
) -> list[Job]:
    """Parts, precisions and sizes multiplied; each part's best precision where none is asked for,
    one plan for all shapes where no size is.

    Raises:
        BundleError: a size is outside of the bundle's limits.
        EngineError: no such precision of a part, the GPU lacks it, or a file is no ONNX graph.
    """
    jobs = []
    shapes: Sequence[Size | None] = list(sizes) or [None]
    for part in parts:
        for precision in precisions or [_best(bundle, part, hardware)]:
            files = graph_files(bundle, part, precision)
            _require(precision, hardware)
            for size in shapes:
                name = variant(size)
                jobs.append(
                    Job(
                        part=part,
                        precision=precision,
                        variant=name,
                        onnx=bundle.file(files[0].path),
                        graph=files,
                        profile=profile(bundle, part, size),
                        plan=plan_path(bundle, hardware, part, precision, name),
                        flags=flags,
                    )
                )
    return jobs


def _best(bundle: Bundle, part: str, hardware: Hardware) -> str:
    """The fastest of the files that are for TensorRT. One whose weights alone are in 8 bits, as
    T5's, is not: its products run in high precision, of weights that lost some."""
    files = bundle.parts[part].files
    meant = [p for p in ORDER if p in files and TENSORRT in files[p].engines]
    usable = [
        p
        for p in meant or [p for p in ORDER if p in files]
        if _number(hardware.capability) >= _least(p)
    ]
    for precision in usable:
        if precision not in _QUANTIZED or both_factors(bundle.file(files[precision].path)):
            return precision
    return (usable or list(files))[0]


def _require(precision: str, hardware: Hardware) -> None:
    if _number(hardware.capability) < _least(precision):
        least = ".".join(map(str, _least(precision)))
        raise EngineError(
            f"{precision} needs a GPU of compute capability {least} or newer; this one has "
            f"{hardware.capability}. Use another --precision"
        )


def _least(precision: str) -> tuple[int, int]:
    return CAPABILITY.get(precision, (0, 0))


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(number) for number in capability.split("."))
