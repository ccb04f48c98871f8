from __future__ import annotations

from pathlib import Path

from benchmarks import machine


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


def test_the_environment_names_what_decides_a_speed() -> None:
    found = machine.environment()
    assert {"processor", "cores", "instructions", "versions", "load_before"} <= set(found)
    assert found["versions"]["numpy"]
