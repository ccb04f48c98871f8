"""Soak: slopes under waves, processes from outside, and what makes a service fail."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import processes
from benchmarks.slope import growth
from benchmarks.soak import HOUR, MB, main, memory
from dermaflux.errors import DermaFluxError
from tests.serving.live import running


def readings(mb_an_hour: float, minutes: float = 4) -> tuple[list[float], list[float]]:
    """300 MB, under requests that take up to 60 MB for a moment, and a leak."""
    random = np.random.default_rng(0)
    seconds = np.arange(0, minutes * 60, 0.25)
    waves = random.integers(0, 7, len(seconds)) * 10.0
    return seconds.tolist(), ((300 + waves + mb_an_hour * seconds / HOUR) * MB).tolist()


def test_a_leak_is_found_under_waves_that_are_higher() -> None:
    found = memory(*readings(100.0), requests_an_hour=50_000, bound=30.0)
    assert not found["passed"]
    assert found["long_enough"]
    assert found["mb_an_hour"]["slope"] == pytest.approx(100, abs=2)
    assert found["bytes_a_request"] == pytest.approx(2000, rel=0.02)
    assert memory(*readings(100.0), 1.0, bound=101.0)["passed"]


def test_a_service_without_a_leak_passes() -> None:
    found = memory(*readings(0.0), requests_an_hour=1.0, bound=30.0)
    assert found["passed"]
    assert found["long_enough"]
    assert found["mb_an_hour"]["slope"] == 0


def test_a_run_too_short_to_tell_says_so() -> None:
    random = np.random.default_rng(1)
    seconds = np.arange(0, 5, 0.25).tolist()
    noisy = ((300 + random.normal(0, 1, len(seconds))) * MB).tolist()
    found = memory(seconds, noisy, 1.0, bound=30.0)
    assert found["passed"]
    assert not found["long_enough"]
    with pytest.raises(DermaFluxError, match="too few for a slope"):
        memory(seconds[:2], noisy[:2], 1.0, bound=30.0)


def test_the_interval_holds_the_slope_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    x = np.arange(10.0)
    held = 0
    for _ in range(400):
        found = growth(x.tolist(), (2 * x + random.normal(0, 3, 10)).tolist())
        assert found.low <= found.slope <= found.high
        held += found.low <= 2 <= found.high
    # 95 % of 400 is 380, with a deviation of 4.4; Sen's interval of ten readings is a little wide.
    assert 364 <= held <= 400


def test_a_wild_reading_does_not_move_the_slope() -> None:
    found = growth([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 1000])
    assert found.slope == 1


CHILD = """
import sys, time
file = open(sys.argv[1]); more = bytearray(40_000_000); print("ready", flush=True); sys.stdin.read()
"""


def test_processes_are_found_by_their_port_with_their_children(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        with pytest.raises(DermaFluxError, match=f"listen on port {port}"):
            processes.listening(port)
        listener.listen()
        assert processes.listening(port) == [os.getpid()]
    alone = processes.seen([os.getpid()])
    assert alone.processes == 1
    file = tmp_path / "file"
    file.touch()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in processes.family([os.getpid()])
        assert os.getpid() not in processes.family([child.pid])
        seen = processes.seen([child.pid])
        assert seen.rss_bytes > 40_000_000
        assert seen.open_files == 4
        with file.open():
            assert processes.seen([os.getpid()]).open_files >= alone.open_files + 1
    finally:
        child.communicate()
    assert processes.seen([child.pid]).processes == 0
    assert child.pid not in processes.family([child.pid])


def soak(url: str, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:  # type: ignore[type-arg]
    status = main([url, "--minutes=0.02", "--callers=6", "--every=0.02", "--steps=2", *words])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_against_a_service(tmp_path: Path, capsys) -> None:
    out = tmp_path / "soak.json"
    with running(waiting=2) as live:
        status, result = soak(live.url, capsys, f"--out={out}", "--bound=1e9")
    assert result == json.loads(out.read_text())
    assert result["unexpected"] == {}
    assert result["outcomes"]["leave_stream"]["200 left"] > 0
    assert result["outcomes"]["bad"]["refused"] > 0
    assert result["before"]["processes"] >= 1
    # The app by itself has no /livez, which BentoML answers: the probes do not pass, all else does.
    assert status == 1
    assert result["probes_without_200"] > 0
    assert {name for name, passed in result["passed"].items() if not passed} == {"probes"}


def test_a_service_that_fails_does_not_pass(capsys) -> None:
    with running(fails=RuntimeError("broken")) as live:
        status, result = soak(live.url, capsys)
    assert status == 1
    assert not result["passed"]["answers"]
    assert not result["passed"]["slots"]
    assert result["unexpected"]["generate: 500 internal"] > 0
    assert "bad: refused" not in result["unexpected"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--minutes=0"], "--minutes 0.0 is out of range"),
        (["--warm-up=0.95"], "is a share"),
        (["--probe-ms=nan"], "--probe-ms nan is out of range"),
        ([], "does not answer"),
    ],
)
def test_what_cannot_be_watched_is_one_sentence(words: list[str], told: str, capsys) -> None:
    assert main(["http://127.0.0.1:9", *words]) == 2
    assert told in capsys.readouterr().err
