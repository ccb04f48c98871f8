"""What OpenVINO computes in, read from the graph that runs and not from the file that asked for it.

A precision that is asked for and quietly not used gives the same time and the same picture as the
one before; only the executed graph shows it.

    >>> computed_in(core().compile_model("model_int8.onnx", "CPU"))
    {'FullyConnected': Counter({'i8': 48, 'f32': 14})}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any, Final

KINDS: Final = ("FullyConnected", "MatMul", "Convolution", "GroupConvolution",
                "ScaledDotProductAttention")  # fmt: skip
_EIGHT: Final = ("i8", "u8")


def computed_in(compiled: Any, kinds: Collection[str] = KINDS) -> dict[str, Counter[str]]:
    """Operations of these kinds in a compiled model, by kind and by the type that they run in.

    OpenVINO names the kernel of each operation (`brgemm_avx512_i8`, in capitals of a convolution);
    its last word is the type it computes in, and `runtimePrecision` what its weights are held in.
    """
    counts: dict[str, Counter[str]] = {}
    for operation in compiled.get_runtime_model().get_ops():
        details: Any = operation.get_rt_info()
        kind = details["layerType"].astype(str)
        if kind not in kinds:
            continue
        computed = details["primitiveType"].astype(str).rsplit("_", 1)[-1].lower()
        held = details["runtimePrecision"].astype(str)
        small = held in _EIGHT and computed not in _EIGHT
        how = f"{computed} of 8-bit weights" if small else computed
        counts.setdefault(kind, Counter())[how] += 1
    return counts
