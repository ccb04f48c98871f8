"""A kit in an empty environment with the network off: installed, served, asked, ended.

    make kit test-kit
    DERMAFLUX_TEST_KIT=dist/kit .venv/bin/python -m pytest tests/deploy/airgap.py

Not among the tests that run by themselves: it unpacks half a gigabyte of libraries twice, and takes
minutes. It needs namespaces of Linux (`unshare`), and nothing of this environment but pytest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.test_dockerfile import of
from tests.serving.test_egress import CONFINE

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
ALONE = ["unshare", "--map-root-user", "--net", "--"]
CONFINED = [
    *("unshare", "--user", "--map-user=1034", "--map-group=0", "--mount", "--net", "--keep-caps"),
    *("bash", "-c", CONFINE, "confined"),
]

ASK = """
import json, os, signal, socket, subprocess, sys, time, urllib.error, urllib.request

place, folder, port = sys.argv[1], sys.argv[2], "3000"

def get(path, data=None, kind=None):
    headers = {"content-type": kind} if kind else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()

def probe(path):
    return subprocess.run([sys.executable, f"{place}/probe.py", path, port]).returncode

with open(f"{folder}/log.txt", "wb") as log:
    service = subprocess.Popen(
        [sys.executable, "-m", "bentoml", "serve", f"{place}/bento", "--host", "127.0.0.1",
         "--port", port], stdout=log, stderr=log)
told = {"user": os.getuid(), "links": [name for _, name in socket.if_nameindex()]}
try:
    end = time.monotonic() + 240
    while probe("/readyz"):
        assert service.poll() is None, "it ended"
        assert time.monotonic() < end, "it does not get ready"
        time.sleep(0.5)
    told["alive"] = probe("/livez")
    lesion = json.dumps({"lesion": {"label": "malignant"}, "seed": 7}).encode()
    status, drawn = get("/v1/generate", lesion, "application/json")
    with open(f"{folder}/drawn.png", "wb") as file:
        file.write(drawn)
    told["drawn"] = [status, drawn[:8] == b"\\x89PNG\\r\\n\\x1a\\n"]
    told["classified"] = get("/v1/classify", drawn, "image/png")[0]
    card = json.loads(get("/v1/model")[1])
    told |= {"bundle": card["bundle"], "golden": card["golden"]["result"]}
    told["metrics"] = "dermaflux_generations_total" in get("/metrics")[1].decode()
finally:
    service.send_signal(signal.SIGTERM)
    told["status"] = service.wait(150)
def command(*words):
    return subprocess.run([sys.executable, "-m", *words], cwd=f"{place}/bento/src",
                          stdout=2).returncode

told["log holds"] = command("serving.audit", "verify", f"{folder}/audit", "--key",
                            f"{folder}/audit.key")
told["signed here"] = command("serving.verify", f"{folder}/drawn.png", "--marks",
                              f"{folder}/marks")
told["torch"] = subprocess.run([sys.executable, "-c", "import torch"], stderr=-3).returncode == 0
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def kit() -> Path:
    named = Path(os.environ.get("DERMAFLUX_TEST_KIT", ROOT / "dist/kit"))
    if not (named / "kit.json").is_file():
        pytest.fail(f"there is no kit at {named}; make one with: make kit")
    return named.resolve()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Not pytest's own: a path of a Unix socket has at most 103 characters.
    made = Path(tempfile.mkdtemp(prefix="kit-"))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def run(*command: str | Path, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """In a namespace that has no network, with an environment that has nothing."""
    (folder / "nobody").mkdir(exist_ok=True)
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(folder / "nobody"), **more}
    return subprocess.run(
        list(map(str, command)), env=bare, cwd=folder, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def place(kit: Path, folder: Path) -> Path:
    """Where the kit was installed: in a folder named from where one is, with a space in it."""
    command = ["sh", kit / "install.sh", "--to", "an opt", "--python", PYTHON]
    done = run(*ALONE, *command, folder=folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (folder / "an opt/current").resolve() == Path(told["place"])
    return folder / "an opt/current"


def test_there_is_no_network_there(folder: Path) -> None:
    seek = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
    done = run(*ALONE, PYTHON, "-c", seek, folder=folder)
    assert "Network is unreachable" in done.stderr


def test_what_is_installed_is_what_was_pinned(kit: Path, place: Path, folder: Path) -> None:
    done = run(place / "venv/bin/python", "-m", "pip", "freeze", "--all", folder=folder)
    pinned = re.findall(r"^(\S+==\S+)", (kit / "requirements.txt").read_text(), re.MULTILINE)

    def plain(names: list[str]) -> set[str]:
        return {re.sub(r"[-_.]+", "-", name.split("==")[0]).lower() + "==" + name.split("==")[1]
                for name in names}  # fmt: skip

    given = plain(done.stdout.split())
    assert {one for one in given if not one.startswith(("pip==", "setuptools=="))} == {
        one for one in plain(pinned) if not one.startswith(("pip==", "setuptools=="))
    }


def test_it_serves_draws_and_classifies(kit: Path, place: Path, folder: Path) -> None:
    """As a user that is a number, where everything is read-only but one folder."""
    room = folder / "room"
    for name in ("home", "tmp"):
        (room / name).mkdir(parents=True)
    done = run(
        *(*CONFINED, place / "venv/bin/python", "-c", ASK, place, room),
        folder=folder,
        FOLDER=str(room),
        ROOT=str(ROOT),
        BENTOML_HOME=str(room / "home"),
        TMPDIR=str(room / "tmp"),
        DERMAFLUX_BUNDLE=str(place / "bundle"),
        DERMAFLUX_AUDIT=str(room / "audit"),
        DERMAFLUX_AUDIT_KEY=str(room / "audit.key"),
        DERMAFLUX_MARKS=str(room / "marks"),
        PYTHONDONTWRITEBYTECODE="1",
    )
    log = (room / "log.txt").read_text() if (room / "log.txt").exists() else ""
    assert done.returncode == 0, done.stderr + log
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {
        "user": 1034,
        "links": ["lo"],
        "alive": 0,
        "drawn": [200, True],
        "classified": 200,
        "bundle": json.loads((kit / "kit.json").read_text())["bundle"],
        "golden": "passed",
        "metrics": True,
        "status": 0,
        "log holds": 0,
        "signed here": 0,
        "torch": False,
    }


def test_a_second_installation_is_the_first(kit: Path, place: Path, folder: Path) -> None:
    before = (place / "venv/pyvenv.cfg").stat().st_mtime_ns
    command = ["sh", kit / "install.sh", "--to", "an opt", "--python", PYTHON]
    done = run(*ALONE, *command, folder=folder)
    assert done.returncode == 0, done.stderr
    assert (place / "venv/pyvenv.cfg").stat().st_mtime_ns == before
    assert not (folder / "an opt/previous").exists()


def test_the_steps_of_the_image_run(kit: Path, folder: Path) -> None:
    """Those of the Dockerfile, with its folders elsewhere: no engine for containers is needed."""
    image = folder / "image"
    image.mkdir()
    shutil.copytree(kit / "wheels", image / "wheels", copy_function=os.link)
    shutil.copy(kit / "requirements.txt", image / "wheels")
    for step in of("RUN"):
        text = step.replace("/wheels", f"{image}/wheels")
        for path in ("/opt/venv", "/var/lib/dermaflux"):
            text = text.replace(path, f"{image}{path}")
        text = re.sub(r"\bpython -m venv", f"{PYTHON} -m venv", text)
        done = run(*ALONE, "sh", "-ec", text, folder=folder)
        assert done.returncode == 0, done.stderr
    for module in ("bentoml", "onnxruntime", "openvino"):
        done = run(image / "opt/venv/bin/python", "-c", f"import {module}", folder=folder)
        assert done.returncode == 0, done.stderr
    # Gone after it was needed.
    assert run(image / "opt/venv/bin/python", "-m", "pip", folder=folder).returncode != 0
    room = image / "var/lib/dermaflux/home"
    assert room.stat().st_mode & 0o070 == 0o070
