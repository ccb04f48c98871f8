from __future__ import annotations

import pytest

from benchmarks import rates


def test_a_floor_is_the_longer_of_arithmetic_and_reading() -> None:
    floor = rates.Floor(flops=10, bytes=6)
    assert floor.seconds(rate=5, bandwidth=6) == 2
    assert floor.seconds(rate=5, bandwidth=1) == 6


def test_the_rate_of_fp32_is_the_best_of_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_SIDES", (64,))
    monkeypatch.setattr(rates, "_LONG", 0.0)
    tried = rates._tries("fp32", 1)
    assert any(name.startswith("numpy") for name in tried)
    monkeypatch.setattr(rates, "_tries", lambda *_: {"slow": 1.0, "absent": None, "quick": 2.0})
    assert rates.fastest("fp32") == rates.Rate(2.0, "quick")
    assert rates.matmul_rate("float32") == 2.0


def test_what_a_processor_would_emulate_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "instructions", lambda: ("avx2", "avx512f"))
    for precision in ("bf16", "bfloat16", "int8"):
        found = rates.fastest(precision)
        assert found.per_second is None
        assert "emulated" in found.how
    with pytest.raises(ValueError, match="fp4"):
        rates.fastest("fp4")


def test_openvino_is_believed_only_where_its_graph_has_the_type() -> None:
    work = rates._openvino(64, "int8")
    have = rates.instructions()
    if "avx512_vnni" in have or "avx_vnni" in have:
        assert work is not None
    if work is not None:
        work()


def test_bandwidth_reads_far_more_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_LEAST", 2**24)
    monkeypatch.setattr(rates, "_LONG", 0.0)
    monkeypatch.setattr(rates, "last_level_cache", lambda: 2**22)
    # Slower than any register, faster than any disk.
    assert 1e8 < rates.bandwidth(rounds=1) < 1e13
