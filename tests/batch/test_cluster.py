"""The command on a Ray cluster of this machine: workers, Ray's own process, or itself is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dermaflux.bundle import Bundle
from dermaflux.errors import EngineError
from serving.batch import __main__ as command_line
from serving.batch import connection
from serving.batch.__main__ import main
from serving.batch.maker import Try
from serving.batch.settings import Settings
from tests.batch.test_batch import command, line, made, pictures, started, write

_MARK = "DERMAFLUX_TEST_OF_A_CLUSTER"


def children(pid: int) -> Iterator[int]:
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in file.read_text().split():
            yield int(child)
            yield from children(int(child))


def running(pid: int, words: bytes) -> list[int]:
    """The processes below another that have some words in their command lines."""
    return [
        child for child in children(pid) if words in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def workers(pid: int) -> list[int]:
    """The actors of a command: Ray names its processes by what they run."""
    return running(pid, b"MapWorker")


def driver(pid: int) -> int:
    """Ray's own process."""
    (one,) = running(pid, b"serving.batch.driver")
    return one


def test_a_killed_worker_costs_nothing_but_time(tiny_bundle: Bundle, tmp_path: Path) -> None:
    asked = write(tmp_path / "r.jsonl", [line(index, steps=20) for index in range(300)])
    out = tmp_path / "out"
    process = started(command(tiny_bundle, asked, out, "--ray", "--workers=2", "--batch=2"), out, 5)
    # On a busy machine the other may not have begun.
    os.kill(workers(process.pid)[0], signal.SIGKILL)
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


_WITHOUT_RAY = """
import sys
from serving.batch.__main__ import main
status = main(sys.argv[1:])
assert "ray" not in sys.modules
sys.exit(status)
"""


def test_another_takes_the_place_of_a_dead_driver_and_no_ray_is_in_the_command(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    asked = write(tmp_path / "r.jsonl", [line(index, steps=20) for index in range(100)])
    out = tmp_path / "out"
    options = command(tiny_bundle, asked, out, "--ray", "--workers=1", "--batch=2")[3:]
    process = started([sys.executable, "-c", _WITHOUT_RAY, *options], out, 5)
    os.kill(driver(process.pid), signal.SIGSEGV)
    said, told = process.communicate(timeout=180)
    assert process.returncode == 0, told
    assert "Ray's own process ended by signal 11 (SIGSEGV)" in told
    assert json.loads(said.splitlines()[-1])["drawn"] == 100
    assert main(command(tiny_bundle, asked, tmp_path / "whole")[3:]) == 0
    assert made(out) == made(tmp_path / "whole")


def test_a_killed_command_takes_its_cluster_along(tiny_bundle: Bundle, tmp_path: Path) -> None:
    asked = write(tmp_path / "r.jsonl", [line(index, steps=20) for index in range(2000)])
    out = tmp_path / "out"
    process = started(command(tiny_bundle, asked, out, "--ray", "--workers=1"), out, 2)
    assert ours()
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


class Deadly(Try):
    """It ends every process of others that reads it, as one does that exhausts memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return survived, (os.getpid(), self.item, self.attempt, self.request)


class Mistaken(Deadly):
    """It cannot be read in other processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return mistaken, (os.getpid(), self.item, self.attempt, self.request)


def survived(born: int, *values: Any) -> Try:
    if os.getpid() != born:
        os.kill(os.getpid(), signal.SIGKILL)
    return Deadly(*values)


def mistaken(born: int, *values: Any) -> Try:
    if os.getpid() != born:
        raise ArithmeticError("a mistake of ours")
    return Mistaken(*values)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Try], str], None]:
    """Makes the try of one item one of those above."""

    def poison(kind: type[Try], name: str) -> None:
        own = command_line.remaining

        def remaining(*values: Any) -> Iterator[Try]:
            for one in own(*values):
                is_it = one.item.name == name
                yield kind(one.item, one.attempt, one.request) if is_it else one

        monkeypatch.setattr(command_line, "remaining", remaining)

    return poison


def test_an_item_that_ends_its_process_fails_and_no_other_does(
    tiny_bundle, tmp_path, capsys, poisoned
) -> None:
    asked = write(tmp_path / "r.jsonl", [line(index) for index in range(20)])
    out = tmp_path / "out"
    poisoned(Deadly, "0000009")
    status = main(command(tiny_bundle, asked, out, "--ray", "--batch=4")[3:])
    said = capsys.readouterr()
    assert status == 1, said.err
    told = json.loads(said.out.splitlines()[-1])
    assert (told["kept"], told["failed"], told["drawn"]) == (19, 1, 19)
    (failed,) = [json.loads(one) for one in (out / "failed.jsonl").read_text().splitlines()]
    assert failed["id"] == "0000009"
    assert "its process died 3 times" in failed["reason"]


def test_a_mistake_of_ours_ends_the_command(tiny_bundle, tmp_path, capsys, poisoned) -> None:
    asked = write(tmp_path / "r.jsonl", [line(index) for index in range(4)])
    poisoned(Mistaken, "0000002")
    status = main(command(tiny_bundle, asked, tmp_path / "out", "--ray", "--workers=1")[3:])
    assert status == 2
    assert "ArithmeticError: a mistake of ours" in capsys.readouterr().err


def test_why_no_worker_can_start_is_told(tiny_bundle, tmp_path, capsys) -> None:
    asked = write(tmp_path / "r.jsonl", [line(0)])
    more = ("--ray", "--workers=1", "--engine=onnxruntime-cuda")
    status = main(command(tiny_bundle, asked, tmp_path / "out", *more)[3:])
    assert status == 2
    said = capsys.readouterr().err
    assert "the cluster cannot draw: no engine can run" in said
    assert "SystemException" not in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: .*refused"),
        ("head", "no Ray cluster at head: that is no HOST:PORT"),
        ("head:99999", "that is no HOST:PORT"),
        ("ray://127.0.0.1:10001", "only the cluster itself can be joined"),
        ("auto", "no Ray cluster at auto: .*refused"),
    ],
)
def test_an_address_without_a_cluster_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, words: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(EngineError, match=words):
        connection.reachable(Settings(out=tmp_path / "out", ray=address))


def test_without_an_address_nothing_is_reached_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[object] = []
    monkeypatch.setattr(connection.socket, "create_connection", lambda *to, **_: reached.append(to))
    connection.reachable(Settings(out=tmp_path / "out"))
    connection.reachable(Settings(out=tmp_path / "out", ray="local"))
    assert reached == []


def test_a_cluster_that_is_not_there_is_told(tiny_bundle, tmp_path, capsys) -> None:
    asked = write(tmp_path / "r.jsonl", [line(0)])
    status = main(command(tiny_bundle, asked, tmp_path / "out", "--ray=127.0.0.1:1")[3:])
    assert status == 2
    assert "no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_ray_the_option_says_what_to_install(tiny_bundle, tmp_path, monkeypatch, capsys):
    asked = write(tmp_path / "r.jsonl", [line(0)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status = main(command(tiny_bundle, asked, tmp_path / "out", "--ray")[3:])
    assert status == 2
    assert "pip install" in capsys.readouterr().err


def ours() -> list[int]:
    """Processes that were begun by a test here: they have its mark from whoever began them."""
    mark = f"{_MARK}={os.environ[_MARK]}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@pytest.fixture(autouse=True)
def gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No process of a command or a cluster outlives its test."""
    monkeypatch.setenv(_MARK, str(tmp_path))
    # Ray's workers give way to all others; on a busy machine they would not begin within a minute.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    yield
    # Workers that were just beginning look half a minute for a cluster whose driver has crashed.
    until = time.monotonic() + 60
    while left := ours():
        assert time.monotonic() < until, left
        time.sleep(0.1)
