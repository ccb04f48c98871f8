"""Ray's own process from outside: one that ends, that fails, that does not listen. Without Ray."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from dermaflux.errors import Cancelled, EngineError
from dermaflux.prompt import Lesion
from dermaflux.request import Request
from serving.batch import cluster, connection
from serving.batch.connection import BlocksLost, joined
from serving.batch.items import Item
from serving.batch.maker import Tools, Try
from serving.batch.settings import Settings

_SPEAKS = """
import os, signal, sys
from multiprocessing.connection import Connection
from serving.batch.connection import Blocks, Failure
with open(sys.argv[1], "a") as file:
    print("begun", file=file)
ends = Connection(int(sys.argv[2]))
settings = ends.recv()
{then}
"""
_ASKED = """
ends.send(None)
while not isinstance(ends.recv(), Blocks):
    pass
"""
SEGFAULT = "os.kill(os.getpid(), signal.SIGSEGV)"
REQUEST = Request("a lesion", seed=0, steps=1, guidance=None, height=64, width=64)
TRY = Try(Item("0000000", 0, Lesion("benign"), REQUEST), 0, REQUEST)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A line for each process that was begun."""
    return tmp_path / "begun"


@pytest.fixture
def speaking(monkeypatch: pytest.MonkeyPatch, begun: Path):
    """Puts another program in the place of Ray's process."""

    def speak(then: str) -> None:
        program = (sys.executable, "-c", _SPEAKS.format(then=then), str(begun))
        monkeypatch.setattr(connection, "_COMMAND", program)

    return speak


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(out=tmp_path / "out", ray="local")


def draw(settings: Settings, tries: list[Any]) -> list[bytes]:
    with joined(settings) as driver:
        return list(driver.draw(Tools(Path("bundle")), tries, batch=2, lost=1))


def test_what_comes_back_is_passed_on(speaking, settings: Settings) -> None:
    speaking(_ASKED + "ends.send(b'one'); ends.send(b'two'); ends.send(None); ends.poll(None)")
    assert draw(settings, [1, 2, 3]) == [b"one", b"two"]


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ("Failure('no memory')", EngineError, "the cluster cannot draw: no memory. What came back"),
        ("Failure('killed', deaths=True)", BlocksLost, "killed"),
        ("Failure('1 / 0', trace='a trace')", EngineError, "the cluster cannot draw: 1 / 0"),
    ],
    ids=["of the cluster", "of its processes", "of ours"],
)
def test_why_nothing_comes_back_is_told(
    speaking, settings: Settings, caplog, answer: str, kind: type[EngineError], words: str
) -> None:
    speaking(_ASKED + f"ends.send({answer}); ends.poll(None)")
    with pytest.raises(kind, match=words):
        draw(settings, [1])
    assert ("a trace" in caplog.text) == ("trace" in answer)


def test_why_there_is_no_cluster_is_told(speaking, settings: Settings) -> None:
    speaking("ends.send(Failure('timed out.\\nand more'))")
    with pytest.raises(EngineError, match="no Ray cluster at local: timed out; give the address"):
        draw(settings, [1])


def test_a_process_that_does_not_leave_is_ended(speaking, settings: Settings, monkeypatch) -> None:
    monkeypatch.setattr(connection, "_LEAVING", 0.1)
    speaking(_ASKED + "ends.send(None); signal.sigwait({signal.SIGTERM})")
    assert draw(settings, [1]) == []


def work(settings: Settings, stopped: bool = False) -> None:
    cluster.work_on_ray(
        settings, Tools(Path("bundle")), None, None, [TRY], cancelled=lambda: stopped, settled=print
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "when", ["", "ends.send(None);", _ASKED], ids=["joining", "joined", "drawing"]
)
def test_a_process_that_dies_again_and_again_ends_the_command(
    speaking, settings: Settings, begun: Path, when: str
) -> None:
    speaking(when + SEGFAULT)
    with pytest.raises(EngineError, match=r"ended by signal 11 \(SIGSEGV\); .* same command again"):
        work(settings)
    assert begun.read_text().splitlines() == ["begun"] * 3


def test_one_that_dies_of_the_signal_to_stop_is_not_begun_again(
    speaking, settings: Settings, begun: Path
) -> None:
    speaking("sys.exit(1)")
    with pytest.raises(Cancelled):
        work(settings, stopped=True)
    assert begun.read_text().splitlines() == ["begun"]


_REAL = """
import sys
from serving.batch import driver
driver._joined = lambda settings: False
driver.main(sys.argv[1:])
"""


@pytest.mark.parametrize("after", ["nothing", "joining"])
def test_what_cannot_be_read_is_told_and_ends_it(settings: Settings, after: str) -> None:
    """Once it waited for ever, or ended as if all were well."""
    ours, theirs = Pipe()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _REAL, str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        theirs.close()
        if after == "joining":
            ours.send(settings)
            assert ours.recv() is None
        ours.send_bytes(b"no pickle")
        _, said = process.communicate(timeout=60)
    assert "UnpicklingError" in said
    assert process.returncode == (1 if after == "nothing" else 0)
