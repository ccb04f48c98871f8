"""Marks on what the service draws, and what `POST /v1/verify` says of any picture."""

from __future__ import annotations

import base64
import email
import email.policy
import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from dermaflux.images import read_marks
from dermaflux.marks import Registry
from dermaflux.marks.registry import RegistryError
from serving import marking
from tests.serving.live import Live, picture, running, until
from tests.serving.test_generate import PROMPT, error, events

ASK = {"prompt": PROMPT, "seed": 7, "steps": 2, "width": 128, "height": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site") / "marks"


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[Live]:
    """The app that signs, and has an audit log."""
    audit = {"audit": folder.parent / "audit", "audit_key": folder.parent / "seal"}
    with running(marks=folder, audit_fsync="never", **audit) as live:
        yield live


def pixels(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as one:
        return np.asarray(one.convert("RGB"))


def sha256(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def verified(live: Live, data: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(data)) as one:
        kind = {"content-type": f"image/{(one.format or '').lower()}"}
    reply = live.client.post("/v1/verify", content=data, headers=kind)
    assert reply.status_code == 200, reply.text
    document = live.client.get("/openapi.json").json()
    form = {"$ref": "#/components/schemas/Verified", "components": document["components"]}
    Draft202012Validator(form).validate(reply.json())
    return dict(reply.json())


def plain_jpeg(data: bytes, quality: int = 75) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(data)).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


@pytest.mark.parametrize("form", [{}, {"format": "webp"}, {"format": "jpeg", "quality": 80}])
def test_signing_leaves_every_pixel_as_it_was(live: Live, site: Live, form: dict) -> None:
    plain, signed = (one.client.post("/v1/generate", json={**ASK, **form}) for one in (live, site))
    assert np.array_equal(pixels(plain.content), pixels(signed.content))
    assert len(plain.content) < len(signed.content) < len(plain.content) + 6000
    (drawn,) = live.pipeline.generate([live.pipeline.request(PROMPT, 7, 2, height=128, width=128)])
    for reply in (plain, signed):
        assert reply.headers["x-dermaflux-pixels-sha256"] == sha256(drawn)
        assert read_marks(reply.content)["dermaflux.pixels_sha256"] == sha256(drawn)
    told = verified(site, signed.content)
    assert told["shown"]
    assert (told["manifest"]["state"], told["manifest"]["trusted"]) == ("valid", True)
    assert told["manifest"]["record"]["pixels_sha256"] == sha256(drawn)
    assert told["manifest"]["record"]["watermark"] is False
    # The prompt is in the file's own texts, as before, and not in what is signed.
    assert PROMPT not in str(told)
    assert told["pixels_known"]
    assert told["audit_known"] == ("quality" not in form)
    assert told["watermark"]["present"] is False


def test_every_way_out_is_signed(site: Live) -> None:
    ask = {**ASK, "n": 2}
    reply = site.client.post("/v1/generate", json=ask, headers={"accept": "multipart/mixed"})
    kind = reply.headers["content-type"]
    message = email.message_from_bytes(
        f"Content-Type: {kind}\r\n\r\n".encode() + reply.content, policy=email.policy.HTTP
    )
    files = [part.get_payload(decode=True) for part in message.iter_parts()]
    hashes = [part["X-DermaFlux-Pixels-SHA256"] for part in message.iter_parts()]
    assert hashes == [sha256(pixels(one)) for one in files]
    with site.client.stream("POST", "/v1/generate/stream", json=ask) as reply:
        files += [base64.b64decode(d["file"]) for name, d in events(reply) if name == "image"]
    wish = {"prompt": PROMPT, "seed": 7, "steps": 2, "size": "128x128"}
    told = site.client.post("/v1/images/generations", json=wish).json()
    files += [base64.b64decode(one["b64_json"]) for one in told["data"]]
    with site.client.stream("POST", "/v1/images/generations", json={**wish, "stream": True}) as one:
        files += [base64.b64decode(data["b64_json"]) for _, data in events(one)]
    assert len(files) == 6
    assert {verified(site, one)["manifest"]["state"] for one in files} == {"valid"}


def test_watermark_is_found_where_all_else_was_lost(live: Live, tmp_path: Path) -> None:
    plain = live.client.post("/v1/generate", json=ASK)
    with running(marks=tmp_path / "marks", watermark=True) as site:
        marked = site.client.post("/v1/generate", json=ASK)
        told = verified(site, plain_jpeg(marked.content))
        other = verified(site, plain_jpeg(plain.content))
        assert site.client.get("/v1/model").json()["kept"]["watermark"]
    header = "x-dermaflux-pixels-sha256"
    # Of the exact pixels, which the file has no more.
    assert marked.headers[header] == plain.headers[header] == sha256(pixels(plain.content))
    difference = np.abs(pixels(marked.content).astype(int) - pixels(plain.content))
    assert 0 < difference.mean() < 5
    assert told["shown"]
    assert (told["manifest"]["state"], told["pixels_known"]) == ("absent", False)
    assert told["watermark"]["present"]
    assert not other["watermark"]["present"]


def test_pictures_that_were_never_ours_are_not_shown(site: Live) -> None:
    told = verified(site, picture(90))
    assert not told["shown"]
    assert not told["claimed"]
    assert (told["pixels_known"], told["audit_known"]) == (False, False)
    # Asking leaves nothing behind that would make it known.
    assert verified(site, picture(90)) == told
    assert "That does not make it a photograph" in told["sentences"][-1]


def test_a_form_with_a_picture_is_taken(site: Live) -> None:
    data = site.client.post("/v1/generate", json=ASK).content
    form = {"image": ("a name.png", data, "image/png")}
    assert site.client.post("/v1/verify", files=form).json() == verified(site, data)


def test_without_keys_and_log_nothing_is_trusted(live: Live, site: Live) -> None:
    told = verified(live, site.client.post("/v1/generate", json=ASK).content)
    assert (told["manifest"]["state"], told["manifest"]["trusted"]) == ("valid", False)
    assert (told["shown"], told["claimed"]) == (False, True)
    assert (told["pixels_known"], told["audit_known"], told["watermark"]) == (None, None, None)


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"", "image/png", 400, "invalid_image"),
        (b"no picture", "image/png", 400, "invalid_image"),
        (picture(1)[:-60], "image/png", 400, "invalid_image"),
        (picture(1), "text/plain", 415, "unsupported_media_type"),
        (picture(1, size=(8, 8)), "image/png", 400, "invalid_image"),
    ],
)
def test_what_is_no_picture_is_refused(
    site: Live, content: bytes, kind: str, status: int, code: str
) -> None:
    reply = site.client.post("/v1/verify", content=content, headers={"content-type": kind})
    assert (reply.status_code, error(reply)["code"]) == (status, code)


def test_long_pictures_are_refused() -> None:
    with running(max_upload_bytes=1_000) as live:
        kind = {"content-type": "image/png"}
        reply = live.client.post("/v1/verify", content=b"x" * 1_001, headers=kind)
        assert (reply.status_code, error(reply)["code"]) == (413, "body_too_large")


def test_pictures_that_wait_are_bounded(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marking, "WAITING", 0)
    looking, kind = live.brake, {"content-type": "image/png"}

    def held(*arguments: Any, **more: Any) -> Any:
        looking()
        return verify(*arguments, **more)

    verify = marking.verify
    monkeypatch.setattr(marking, "verify", held)
    with ThreadPoolExecutor(1) as pool, looking.closed():
        first = pool.submit(live.client.post, "/v1/verify", content=picture(1), headers=kind)
        looking.wait_for(1)
        reply = live.client.post("/v1/verify", content=picture(1), headers=kind)
        assert (reply.status_code, error(reply)["code"]) == (429, "busy")
        # Others are answered meanwhile.
        assert live.client.get("/v1/model", timeout=5).status_code == 200
        looking.open.set()
        assert first.result().status_code == 200
    until(lambda: live.client.post("/v1/verify", content=picture(1), headers=kind).is_success)


def test_what_cannot_be_registered_does_not_go_out(
    site: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RegistryError("no space left")

    monkeypatch.setattr(Registry, "add", full)
    reply = site.client.post("/v1/generate", json=ASK)
    assert (reply.status_code, error(reply)["code"]) == (503, "not_ready")
    assert "have to be marked" in error(reply)["message"]
    assert "no space" not in reply.text
    assert int(reply.headers["retry-after"]) > 0
    with site.client.stream("POST", "/v1/generate/stream", json=ASK) as stream:
        told = list(events(stream))
    assert (told[-1][0], told[-1][1]["error"]["code"]) == ("error", "not_ready")
    assert "image" not in [name for name, _ in told]


def test_keys_and_registry_of_an_earlier_start_are_used_again(folder: Path, site: Live) -> None:
    data = site.client.post("/v1/generate", json=ASK).content
    assert (folder / "keys/key.pem").stat().st_mode & 0o077 == 0
    with running(marks=folder) as again:
        assert verified(again, data)["shown"]
        assert verified(again, plain_png(data))["pixels_known"]


def plain_png(data: bytes) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(data)).save(stream, "PNG")
    return stream.getvalue()
