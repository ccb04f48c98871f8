"""The command on a Ray cluster of this machine, with two workers, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dermaflux.bundle import Bundle
from serving.batch.__main__ import main
from tests.batch.test_batch import command, line, made, pictures, started, write


def children(pid: int) -> Iterator[int]:
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in file.read_text().split():
            yield int(child)
            yield from children(int(child))


def workers(pid: int) -> list[int]:
    """The actors of a driver: Ray names its processes by what they run."""
    return [
        child
        for child in children(pid)
        if b"MapWorker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def test_a_killed_worker_costs_nothing_but_time(tiny_bundle: Bundle, tmp_path: Path) -> None:
    asked = write(tmp_path / "r.jsonl", [line(index, steps=20) for index in range(300)])
    out = tmp_path / "out"
    process = started(command(tiny_bundle, asked, out, "--ray", "--workers=2", "--batch=2"), out, 5)
    before = workers(process.pid)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    said, told = process.communicate(timeout=180)
    assert process.returncode == 0, told
    assert json.loads(said.splitlines()[-1])["drawn"] == 300
    assert main(command(tiny_bundle, asked, tmp_path / "whole")[3:]) == 0
    assert made(out) == made(tmp_path / "whole")


def test_a_stopped_cluster_job_goes_on_without_one(tiny_bundle: Bundle, tmp_path: Path) -> None:
    asked = write(tmp_path / "r.jsonl", [line(index, steps=20) for index in range(300)])
    out = tmp_path / "out"
    process = started(command(tiny_bundle, asked, out, "--ray", "--batch=2"), out, 5)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "the same command goes on" in told
    there = sum(1 for _ in pictures(out))
    assert 5 <= there < 300
    assert main(command(tiny_bundle, asked, out)[3:]) == 0
    assert sum(1 for _ in pictures(out)) == 300


def test_a_cluster_that_is_not_there_is_told(tiny_bundle, tmp_path, capsys) -> None:
    asked = write(tmp_path / "r.jsonl", [line(0)])
    status = main(command(tiny_bundle, asked, tmp_path / "out", "--ray=127.0.0.1:1")[3:])
    assert status == 2
    assert "no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err


def test_without_ray_the_option_says_what_to_install(tiny_bundle, tmp_path, monkeypatch, capsys):
    asked = write(tmp_path / "r.jsonl", [line(0)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status = main(command(tiny_bundle, asked, tmp_path / "out", "--ray")[3:])
    assert status == 2
    assert "pip install" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def gone() -> Iterator[None]:
    """No process of a cluster outlives its test."""
    yield
    until = time.monotonic() + 20
    while left := workers(os.getpid()):
        assert time.monotonic() < until, left
        time.sleep(0.1)
