from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dermaflux.engines.ov_evidence import computed_in


def compiled(*operations: tuple[str, str, str]) -> Any:
    """A model whose executed graph has these: kind, primitive, and what its weights are held in."""
    names = ("layerType", "primitiveType", "runtimePrecision")

    def told(values: tuple[str, str, str]) -> Any:
        said = [SimpleNamespace(astype=lambda _, value=value: value) for value in values]
        info = dict(zip(names, said, strict=True))
        return SimpleNamespace(get_rt_info=lambda: info)

    graph = SimpleNamespace(get_ops=lambda: [told(one) for one in operations])
    return SimpleNamespace(get_runtime_model=lambda: graph)


def test_operations_are_counted_by_the_type_that_they_run_in():
    model = compiled(
        ("FullyConnected", "brgemm_avx512_i8", "i8"),
        ("FullyConnected", "brgemm_avx512_f32", "u8"),
        ("FullyConnected", "brgemm_avx512_f32", "f32"),
        ("Convolution", "brgconv_avx512_I8", "u8"),
        ("ScaledDotProductAttention", "ref_any_f32", "f32"),
        ("Eltwise", "jit_avx512_f32", "f32"),
    )
    products = {"i8": 1, "f32 of 8-bit weights": 1, "f32": 1}
    assert computed_in(model) == {
        "FullyConnected": products, "Convolution": {"i8": 1},
        "ScaledDotProductAttention": {"f32": 1},
    }  # fmt: skip
    assert computed_in(model, ("FullyConnected",)) == {"FullyConnected": products}
