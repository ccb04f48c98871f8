"""The kit: whole, verifiable, signed; what is harmed, missing or added is found; its two scripts.

That it installs and serves with the network off is shown by `airgap.py`, which takes minutes.
"""

from __future__ import annotations

import http.server
import json
import re
import shutil
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy import kit as kits
from deploy.kit import KitError, Settings
from deploy.sizes import sizes
from dermaflux.bundle import Bundle
from dermaflux.errors import BundleError
from tests.tiny_bundle import write_bundle

ROOT = Path(__file__).resolve().parents[2]
PROBE = ROOT / "deploy/probe.py"


def wheel(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", content)


def fake_collect(extras: Any, have: Path | None, wheels: Path) -> None:
    wheel(wheels, "one_thing", b"#" * 1000)
    wheel(wheels, "other", b"#" * 50)


def fake_pack(kit: Path) -> None:
    shutil.copytree(ROOT / "serving/doctor", kit / "bento/src", ignore=kits.NEVER)


def make(folder: Path, **more: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kits, "collect", fake_collect)
        patch.setattr(kits, "pack", fake_pack)
        kits.make(Settings(bundle=folder / "bundle", out=folder / "kit", **more))
    return folder / "kit"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    write_bundle(folder / "bundle")
    key = folder / "site.key"
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
    openssl("ec", "-in", key, "-pubout", "-out", folder / "site.pub")
    make(folder, sign=key)
    return folder


@pytest.fixture
def kit(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine / "kit", tmp_path / "kit"))


def openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


def verify(kit: Path, *key: Path) -> tuple[int, str]:
    done = subprocess.run(
        ["sh", str(kit / "verify.sh"), *map(str, key)], cwd="/", capture_output=True, text=True
    )
    return done.returncode, done.stderr


def install(kit: Path, *words: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        ["sh", str(kit / "install.sh"), *map(str, words)], capture_output=True, text=True
    )
    return done.returncode, done.stderr


def test_a_kit_is_whole(kit: Path, pristine: Path) -> None:
    names = {file.name for file in kit.iterdir()}
    assert names >= {
        *("wheels", "bento", "bundle", "deploy", "docs", "install.sh", "verify.sh", "kit.json"),
        *("NOTICE", "LICENSE", "sbom.cdx.json", "mlbom.cdx.json", "soup.md", "constraints.txt"),
        *("requirements.txt", "SHA256SUMS", "SHA256SUMS.sig"),
    }
    bundle = Bundle.open(kit / "bundle")
    told = json.loads((kit / "kit.json").read_text())
    assert told["bundle"] == bundle.id == Bundle.open(pristine / "bundle").id
    assert bundle.id in (kit / "mlbom.cdx.json").read_text()
    assert told["bytes"] == sizes(kit)
    assert told["bytes"]["libraries"] == 1050
    lines = (kit / "requirements.txt").read_text().splitlines()
    assert [re.sub("sha256:[0-9a-f]{64}", "", line) for line in lines] == [
        "one-thing==1.0 --hash=",
        "other==1.0 --hash=",
    ]
    # Whoever reads it need not be who made it.
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in kit.rglob("*"))
    assert not [file for file in kit.rglob("*") if file.name in ("__pycache__", "secrets", ".env")]


def test_a_whole_kit_is_verified(kit: Path, pristine: Path) -> None:
    status, words = verify(kit)
    assert (status, "note: this kit is signed" in words) == (0, True)
    assert verify(kit, pristine / "site.pub")[0] == 0


@pytest.mark.parametrize("harm", ["flip", "remove", "add", "link", "rename"])
def test_what_was_done_to_a_kit_is_found(kit: Path, harm: str) -> None:
    file = kit / "bundle/bundle.json"
    if harm == "flip":
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    elif harm == "remove":
        file.unlink()
    elif harm == "add":
        wheel(kit / "wheels", "more", b"")
    elif harm == "link":
        (kit / "wheels/more").symlink_to("/etc")
    else:
        file.rename(kit / "bundle/bundle.js")
    status, words = verify(kit)
    assert status != 0
    assert "error: " in words
    # And it is not installed.
    assert install(kit, "--to", kit.parent / "opt", "--python", sys.executable)[0] != 0
    assert not (kit.parent / "opt").exists()


def test_sums_that_were_written_anew_need_the_key(kit: Path, pristine: Path) -> None:
    (kit / "NOTICE").write_text("mine")
    (kit / "SHA256SUMS").write_text(kits.sums(kit))
    assert verify(kit)[0] == 0
    status, words = verify(kit, pristine / "site.pub")
    assert status != 0
    assert "do not install" in words
    (kit / "SHA256SUMS.sig").unlink()
    status, words = verify(kit, pristine / "site.pub")
    assert (status != 0, "is not signed" in words) == (True, True)


def test_another_key_is_not_the_sites(kit: Path, tmp_path: Path) -> None:
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", tmp_path / "a.key")
    openssl("ec", "-in", tmp_path / "a.key", "-pubout", "-out", tmp_path / "a.pub")
    assert verify(kit, tmp_path / "a.pub")[0] != 0


def test_a_kit_that_cannot_be_made_leaves_the_one_before(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pristine / "bundle", tmp_path / "bundle")
    before = make(tmp_path)

    def fails(*_: object) -> None:
        raise KitError("no index")

    monkeypatch.setattr(kits, "collect", fails)
    with pytest.raises(KitError):
        kits.make(Settings(bundle=tmp_path / "bundle", out=before))
    assert verify(before)[0] == 0
    assert {file.name for file in tmp_path.iterdir()} == {"bundle", "kit"}


def test_a_damaged_bundle_is_not_packed(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine / "bundle", tmp_path / "bundle")
    graph = next((tmp_path / "bundle").rglob("*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match="sha256"):
        make(tmp_path)


def test_an_extra_that_is_not_there_is_told() -> None:
    with pytest.raises(KitError, match="nonsense"):
        kits.asked(["nonsense"])
    assert "uv>=0.8" in kits.asked(["serving"])
    assert any(one.startswith("scikit-image") for one in kits.asked(["batch"]))


def test_installation_says_what_it_does_not_take(kit: Path, tmp_path: Path) -> None:
    assert "--nothing is not known" in install(kit, "--nothing")[1]
    assert "--to needs a value" in install(kit, "--to")[1]
    assert "there is no no-python" in install(kit, "--to", tmp_path, "--python", "no-python")[1]
    text = (kit / "kit.json").read_text()
    (kit / "kit.json").write_text(text.replace('"python": "3.', '"python": "4.'))
    (kit / "SHA256SUMS").write_text(kits.sums(kit))
    status, words = install(kit, "--to", tmp_path / "opt", "--python", sys.executable)
    assert (status != 0, "this kit is for Python 4." in words) == (True, True)


def test_a_place_that_takes_no_files_is_told_before_anything_is_made(
    kit: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    python = Path(sys.base_prefix) / f"bin/python{version}"
    status, words = install(kit, "--to", tmp_path / "file/opt", "--python", python)
    assert (status != 0, "takes no files; run this as a user" in words) == (True, True)


def test_going_back(kit: Path, tmp_path: Path) -> None:
    to = tmp_path / "opt"
    to.mkdir()
    (to / "current").symlink_to("releases/new")
    assert "no release before" in install(kit, "--to", to, "--back")[1]
    (to / "previous").symlink_to("releases/old")
    assert install(kit, "--to", to, "--back")[0] == 0
    links = [str((to / name).readlink()) for name in ("current", "previous")]
    assert links == ["releases/old", "releases/new"]
    assert {file.name for file in to.iterdir()} == {"current", "previous"}


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/livez" else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def answering(context: ssl.SSLContext | None = None) -> Iterator[int]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Answers)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def probed(port: int, path: str, **environment: str) -> int:
    command = [sys.executable, str(PROBE), path, str(port)]
    return subprocess.run(command, env=environment, capture_output=True).returncode


def test_the_probe_tells_life_from_readiness() -> None:
    with answering() as port:
        assert (probed(port, "/livez"), probed(port, "/readyz")) == (0, 1)
    assert probed(port, "/livez") == 1


def test_the_probe_asks_over_tls_and_knows_a_refusal(tmp_path: Path) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-subj", "/CN=ward", "-days", "2", "-keyout", key, "-out", cert),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    tls = {"DERMAFLUX_TLS_CERT": str(cert)}
    with answering(context) as port:
        assert probed(port, "/livez", **tls) == 0
        assert probed(port, "/readyz", **tls) == 1
        assert probed(port, "/livez") == 1
    context.load_verify_locations(cert)
    context.verify_mode = ssl.CERT_REQUIRED
    mutual = {**tls, "DERMAFLUX_TLS_CA": str(cert)}
    with answering(context) as port:
        assert probed(port, "/livez", **mutual) == 0
        assert probed(port, "/readyz", **mutual) == 1
        shown = {"PROBE_CERT": str(cert), "PROBE_KEY": str(key)}
        assert probed(port, "/livez", **mutual, **shown) == 0
        assert probed(port, "/readyz", **mutual, **shown) == 1
    assert probed(port, "/livez", **mutual) == 1
