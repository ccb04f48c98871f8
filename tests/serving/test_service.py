"""The service as it is run: from a Bento in another folder, without torch, within seconds."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from dermaflux.bundle import Bundle
from dermaflux.hardware import Machine, Memory
from tests.core.test_doctor import with_golden
from tests.serving.live import picture, until
from tests.tiny_bundle import write_bundle

ROOT = Path(__file__).resolve().parents[2]
BENTOML = [sys.executable, "-m", "bentoml"]
START_SECONDS = 5.0
FRAMEWORK = "import bentoml, _bentoml_sdk, _bentoml_impl.server.app"
FRAMEWORK_SECONDS = 3.4  # measured beside 4.9 s from import to ready, on two quiet cores

START = """
import os, sys, time
begin = time.monotonic()
from serving.service import DermaFlux
from starlette.testclient import TestClient
with TestClient(DermaFlux.to_asgi()) as client:
    while (reply := client.get("/readyz")).status_code == 503:
        assert "loaded" in reply.json()["error"]["message"], reply.text
        time.sleep(0.01)
    assert reply.status_code == 200
    print("ready", time.monotonic() - begin)
    assert client.get("/v1/model").json()["golden"]["result"] == "passed"
    wanted = {"lesion": {"label": "benign"}, "steps": 1}
    assert client.post("/v1/generate", json=wanted).status_code == 200
    image = open(sys.argv[1], "rb").read()
    reply = client.post("/v1/classify", content=image, headers={"content-type": "image/png"})
    assert reply.status_code == 200
heavy = {"torch", "diffusers", "transformers", "timm", "peft", "torchvision",
         "openvino_telemetry"} & set(sys.modules)
assert not heavy, heavy
"""

PROBE = """
import json, time
from serving.service import DermaFlux
from starlette.testclient import TestClient
with TestClient(DermaFlux.to_asgi()) as client:
    while "loaded" in client.get("/readyz").text:
        time.sleep(0.01)
    wanted = {"lesion": {"label": "benign"}, "steps": 1}
    replies = [client.get("/readyz"), client.post("/v1/generate", json=wanted)]
    golden = client.get("/v1/model").json()["golden"]["result"]
    alive = client.get("/livez").status_code
    print(json.dumps([[r.status_code for r in replies], golden, alive, replies[0].text]))
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(("DERMAFLUX_", "BENTOML_", "PROMETHEUS_", "PYTHONPATH"))
    }
    # Nothing may go out, and what tries fails at once.
    dead = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    own = {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "true", "NO_PROXY": "127.0.0.1"}
    return {**kept, **dead, **own, **more}


def start(bundle: Path, folder: Path) -> float:
    """Import, start, draw and classify in a new process; seconds from import to ready."""
    image = folder / "image.png"
    image.write_bytes(picture(200))
    metrics = folder / "metrics"
    metrics.mkdir(exist_ok=True)
    variables = {
        "DERMAFLUX_BUNDLE": str(bundle),
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
        # BentoML's own timeout is out of force, so this cannot hurt.
        "BENTOML_CONFIG_OPTIONS": "services.dermaflux.traffic.timeout=0.001",
    }
    done = subprocess.run(
        [sys.executable, "-c", START, str(image)],
        cwd=ROOT,
        env=environment(folder / "home", **variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"^ready ([\d.]+)$", done.stdout, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny bundle that draws its golden image."""
    return with_golden(write_bundle(tmp_path_factory.mktemp("right") / "bundle"))


def test_service_runs_without_torch(right: Bundle, tmp_path: Path) -> None:
    assert start(right.path, tmp_path) > 0


@pytest.mark.parametrize(
    ("variables", "statuses", "result"),
    [({}, [503, 503], "failed"), ({"DERMAFLUX_GOLDEN": "0"}, [200, 200], "skipped")],
)
def test_engines_that_draw_another_image_than_the_export_are_not_ready(
    right: Bundle, tmp_path: Path, variables: dict[str, str], statuses: list[int], result: str
) -> None:
    copy = shutil.copytree(right.path, tmp_path / "bundle")
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["golden"]["request"]["seed"] += 1
    (copy / "bundle.json").write_text(json.dumps(manifest))
    (tmp_path / "metrics").mkdir()
    variables = {
        "DERMAFLUX_BUNDLE": str(copy),
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=ROOT,
        env=environment(tmp_path / "home", **variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told, golden, alive, text = json.loads(done.stdout.splitlines()[-1])
    assert (told, golden, alive) == (statuses, result, 200)
    assert ("dB PSNR, needed are at least 30 dB" in text) == (result == "failed")


def checked(bundle: Path, monkeypatch: pytest.MonkeyPatch, **variables: str) -> str | None:
    """What the parent process says before it starts workers, or None where it starts them."""
    from serving.service import DermaFlux

    for name in [name for name in os.environ if name.startswith("DERMAFLUX_")]:
        monkeypatch.delenv(name)
    for name, value in {"BUNDLE": str(bundle), **variables}.items():
        monkeypatch.setenv(f"DERMAFLUX_{name}", value)
    try:
        DermaFlux.inner.check()
    except SystemExit as end:
        return str(end.code)
    return None


def test_bundle_that_does_not_fit_is_refused_before_workers_start(
    right: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checked(right.path, monkeypatch) is None
    small = Machine(2, Memory(10**9, 50_000_000, "test"), no_gpu="none")
    monkeypatch.setattr("dermaflux.residency.look", lambda: small)
    words = checked(right.path, monkeypatch)
    assert words is not None
    assert words.startswith("error: the bundle tiny does not fit here")
    assert "has 50 MB free of 1.0 GB" in words


def test_processes_that_would_send_pickles_over_tcp_are_refused(
    right: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENTOML_NO_UDS", "1")
    words = checked(right.path, monkeypatch)
    assert words is not None
    assert "carries pickles" in words
    assert words.endswith("BENTOML_NO_UDS is set; unset it")
    monkeypatch.delenv("BENTOML_NO_UDS")
    monkeypatch.setattr("platform.release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    words = checked(right.path, monkeypatch)
    assert words is not None
    assert "run the service on Linux" in words


@pytest.mark.parametrize(
    "name", ["tokenizer/tokenizer.json", "golden.png", "transformer/model.onnx"]
)
def test_files_that_will_be_served_are_compared_with_what_was_exported(
    right: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    copy = shutil.copytree(right.path, tmp_path / "bundle")
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    words = checked(copy, monkeypatch, PRECISION="fp32")
    assert words is not None
    assert f"by sha256: {name}. Copy the bundle anew" in words
    # What is not served is not read: of 60 GB that is most.
    served_anyhow = "transformer" not in name
    assert (checked(copy, monkeypatch, PRECISION="int8") is None) != served_anyhow


def test_service_is_ready_within_seconds_on_the_embedded_default(
    bundle: Path, tmp_path: Path
) -> None:
    """Under five seconds; on a slower or busier machine, as many times BentoML's own import.

    Both are measured in turn, so that what else the machine does disturbs both.
    """
    took, frame = [], []
    for _ in range(3):  # the first may read everything from a cold disk
        took.append(start(bundle, tmp_path))
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", FRAMEWORK], env=environment(tmp_path), check=True)
        frame.append(time.monotonic() - begin)
    assert min(took) < START_SECONDS * max(1.0, min(frame) / FRAMEWORK_SECONDS), (took, frame)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"DERMAFLUX_BUNDLE": "nowhere"}, "Make it with: python -m export"),
        ({"DERMAFLUX_WAITING": "many"}, "DERMAFLUX_WAITING is 'many'; it needs a whole number"),
        ({"DERMAFLUX_ENGINE": "abacus"}, "engine 'abacus' is not known"),
        ({"DERMAFLUX_ENGINE": "eager"}, "the eager engine runs a checkpoint"),
        ({"DERMAFLUX_PRECISION": "int1"}, "precision 'int1' is not in"),
    ],
)
def test_start_that_cannot_be_ends_in_one_sentence(
    tiny_bundle: Bundle, tmp_path: Path, variables: dict[str, str], sentence: str
) -> None:
    variables = {"DERMAFLUX_BUNDLE": str(tiny_bundle.path), **variables}
    done = subprocess.run(
        [*BENTOML, "serve", "serving.service:DermaFlux", "--port", str(free_port())],
        cwd=ROOT,
        env=environment(tmp_path, **variables),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_requirements_of_the_bento_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    packed = ("serving", "batch", "attributes", "cpu")
    needed = {*project["dependencies"], *(one for name in packed for one in extras[name])}
    needed.remove("dermaflux[attributes]")
    bento = yaml.safe_load((ROOT / "bentofile.yaml").read_text())
    assert set(bento["python"]["packages"]) == needed
    assert {"name": "BENTOML_DO_NOT_TRACK", "value": "true"} in bento["envs"]


@pytest.fixture(scope="module")
def bento(right: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BENTOML_HOME with a Bento of this project around the tiny bundle."""
    project = tmp_path_factory.mktemp("project")
    for name in ("dermaflux", "serving"):
        shutil.copytree(ROOT / name, project / name)
    for name in ("bentofile.yaml", ".bentoignore", "LICENSE"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(right.path, project / "bundles/mini")
    home = tmp_path_factory.mktemp("bentoml_home")
    done = subprocess.run(
        [*BENTOML, "build"], cwd=project, env=environment(home), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return home


@dataclass(frozen=True)
class Served:
    """A Bento that is served: a client, its address, the first process, and the file of its log."""

    client: httpx.Client
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    first: str
    """What its first reply was, while it was loading."""

    def classify(self) -> httpx.Response:
        kind = {"content-type": "image/png"}
        return self.client.post("/v1/classify", content=picture(200), headers=kind)

    def generate(self) -> httpx.Response:
        return self.client.post("/v1/generate", json={"lesion": {"label": "benign"}})


@pytest.fixture(scope="module")
def served(bento: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The Bento, served from another folder than it was built in."""
    port, folder = free_port(), tmp_path_factory.mktemp("elsewhere")
    log = folder / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*BENTOML, "serve", "dermaflux:latest", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment(bento),
            stdout=stream,
            stderr=stream,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
            told: list[httpx.Response] = []
            until(lambda: process.poll() is not None or ready(client, told), seconds=180)
            assert process.poll() is None, log.read_text()
            yield Served(client, port, process, log, told[0].text)
    finally:
        process.terminate()
        assert process.wait(120) == 0


def test_built_bento_serves_from_another_folder(bento: Path, right: Bundle, served: Served) -> None:
    client = served.client
    assert "The engines are being loaded and proved." in served.first
    card = client.get("/v1/model").json()
    assert card["bundle"] == right.id
    assert card["golden"]["result"] == "passed"
    image = served.generate()
    assert image.headers["content-type"] == "image/png"
    form = {"image": ("drawn.png", image.content, "image/png")}
    assert client.post("/v1/classify", files=form).json()["bundle"] == right.id
    assert "DermaFlux" in client.get("/").text
    for number in range(20):
        reply = client.get(f"/scan/{number}.php")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
    # The classifier's own routes are on its socket alone.
    assert client.post("/score", content=b"[]").status_code == 404
    assert client.post("/livez").json()["error"]["code"] == "method_not_allowed"
    for path in ("/livez", "/healthz", "/readyz"):
        assert client.get(path).status_code == 200
    metrics = client.get("/metrics").text
    assert 'dermaflux_generations_total{outcome="done"} 1.0' in metrics
    assert 'bentoml_service_request_total{endpoint="/v1/classify"' in metrics
    assert "/scan/" not in metrics
    source = re.search(r"(\S+) \(\w+\) loaded in [\d.]+ s", served.log.read_text())
    assert source is not None
    assert Path(source[1]).is_relative_to(bento)
    assert "Traceback" not in served.log.read_text()


def test_many_callers_at_once_each_get_their_own_answer(served: Served) -> None:
    """More photographs than one batch, a fifth of them no pictures, and none of them lost."""
    reds = [number % 250 for number in range(300)]

    def ask(red: int) -> tuple[int, int, float | None]:
        data = picture(red) if red % 5 else b"no picture"
        kind = {"content-type": "image/png"}
        for _ in range(100):
            reply = served.client.post("/v1/classify", content=data, headers=kind)
            if reply.status_code != 429:
                break
        return red, reply.status_code, reply.json().get("probability")

    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(ask, reds))
    assert [status for red, status, _ in found] == [200 if red % 5 else 400 for red in reds]
    alone = dict.fromkeys(red for red in reds if red % 5)
    for red in list(alone)[:20]:
        alone[red] = ask(red)[2]
        assert {told for other, _, told in found if other == red} == {alone[red]}
    sizes = re.findall(
        r"adaptive_batch_size_(?:count|sum)\{.*\} ([\d.]+)", served.client.get("/metrics").text
    )
    assert float(sizes[0]) != float(sizes[1]), "no batch had more than one photograph"


def test_generation_goes_on_when_the_process_of_the_classifier_dies(served: Served) -> None:
    (scorer,) = [
        child
        for child in psutil.Process(served.process.pid).children()
        if "dermaflux_scorer" in child.cmdline()
    ]
    scorer.kill()
    until(lambda: served.client.get("/readyz").status_code == 503)
    reply = served.classify()
    told = reply.json()["error"]
    assert (reply.status_code, told["code"]) == (503, "not_ready")
    assert "being started again" in told["message"]
    assert int(reply.headers["retry-after"]) >= 1
    assert served.generate().status_code == 200
    assert served.client.get("/livez").status_code == 200
    # BentoML looks every ten seconds.
    until(lambda: served.client.get("/readyz").status_code == 200, seconds=60)
    assert served.classify().status_code == 200


def test_a_service_that_is_told_to_end_finishes_what_it_has_begun(served: Served) -> None:
    """The last test of this service: a photograph is on its way when the signal comes."""
    data = picture(200)
    head = (
        "POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
        f"Content-Length: {len(data)}\r\nExpect: 100-continue\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.settimeout(60)
        slow.sendall(head.encode())
        # Said when the service begins to read the body.
        assert slow.recv(1000).startswith(b"HTTP/1.1 100 ")
        slow.sendall(data[:100])
        served.process.terminate()
        until(lambda: served.client.get("/readyz").status_code == 503)
        for reply in (served.client.get("/readyz"), served.classify(), served.generate()):
            assert "about to end" in reply.json()["error"]["message"]
            assert "retry-after" in reply.headers
        assert served.client.get("/livez").status_code == 200
        slow.sendall(data[100:])
        answer = b""
        while chunk := slow.recv(65_536):
            answer += chunk
            if answer.endswith(b"}"):
                break
    assert answer.startswith(b"HTTP/1.1 200"), answer
    assert b'"decision"' in answer
    assert served.process.wait(120) == 0
    assert "Traceback" not in served.log.read_text()


def ready(client: httpx.Client, told: list[httpx.Response]) -> bool:
    try:
        told.append(client.get("/readyz", timeout=30))
    except httpx.TransportError:
        return False
    return told[-1].status_code == 200


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
