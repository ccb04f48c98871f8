from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import machine


def test_a_floor_is_the_longer_of_arithmetic_and_reading() -> None:
    floor = machine.Floor(flops=10, bytes=6)
    assert floor.seconds(rate=5, bandwidth=6) == 2
    assert floor.seconds(rate=5, bandwidth=1) == 6


def test_the_rate_of_fp32_is_the_best_of_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SIDES", (64,))
    monkeypatch.setattr(machine, "_LONG", 0.0)
    tried = machine._tries("fp32", 1)
    assert any(name.startswith("numpy") for name in tried)
    monkeypatch.setattr(machine, "_tries", lambda *_: {"slow": 1.0, "absent": None, "quick": 2.0})
    assert machine.fastest("fp32") == machine.Rate(2.0, "quick")
    assert machine.matmul_rate("float32") == 2.0


def test_what_a_processor_would_emulate_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "instructions", lambda: ("avx2", "avx512f"))
    for precision in ("bf16", "bfloat16", "int8"):
        found = machine.fastest(precision)
        assert found.per_second is None
        assert "emulated" in found.how
    with pytest.raises(ValueError, match="fp4"):
        machine.fastest("fp4")


def test_openvino_is_believed_only_where_its_graph_has_the_type() -> None:
    work = machine._openvino(64, "int8")
    have = machine.instructions()
    if "avx512_vnni" in have or "avx_vnni" in have:
        assert work is not None
    if work is not None:
        work()


def test_facts_are_read_from_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("flags\t\t: fpu avx512f avx2 amx_bf16x\n")
    assert machine.instructions(tmp_path) == ("avx2", "avx512f")
    for number, size in enumerate(("32K", "2048K", "260M", "odd")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{number}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(size + "\n")
    assert machine.last_level_cache(tmp_path) == 260 * 2**20
    assert machine.instructions(tmp_path / "none") == ()
    assert machine.last_level_cache(tmp_path / "none") == 0


def test_bandwidth_reads_far_more_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_LEAST", 2**24)
    monkeypatch.setattr(machine, "_LONG", 0.0)
    monkeypatch.setattr(machine, "last_level_cache", lambda: 2**22)
    # Slower than any register, faster than any disk.
    assert 1e8 < machine.bandwidth(rounds=1) < 1e13


def test_the_environment_names_what_decides_a_speed() -> None:
    found = machine.environment()
    assert {"processor", "cores", "instructions", "versions", "load_before"} <= set(found)
    assert found["versions"]["numpy"]
