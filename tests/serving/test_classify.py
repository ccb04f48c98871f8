"""Classification over HTTP: answers, forms, and every kind of file that is no photograph."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.lenient import lenient
from tests.serving.live import Live, picture, running
from tests.serving.test_generate import error


def post(live: Live, data: bytes, kind: str = "image/png"):  # type: ignore[no-untyped-def]
    return live.client.post("/v1/classify", content=data, headers={"content-type": kind})


@pytest.mark.parametrize(
    ("red", "label", "decision"),
    [
        (0, "benign", "benign"),
        (255, "malignant", "malignant"),
        (118, "benign", "abstain"),
        (124, "malignant", "abstain"),
    ],
)
def test_answer(live: Live, red: int, label: str, decision: str) -> None:
    reply = post(live, picture(red))
    assert reply.status_code == 200
    answer = reply.json()
    probability = answer.pop("probability")
    assert 0 <= probability <= 1
    assert (probability >= 0.4) == (label == "malignant")
    assert answer == {
        "label": label,
        "threshold": 0.4,
        "abstain": [0.3, 0.5],
        "decision": decision,
        "accepted": True,
        "reasons": [],
        "saliency": None,
        "bundle": "0123456789abcdef",
    }
    assert live.count("dermaflux_decisions_total", decision=decision) == 1


def test_a_picture_that_cannot_be_judged_gets_no_decision_and_the_reason() -> None:
    with running(intake=lenient(2, light=200.0)) as live:
        reply = post(live, picture(255))
        assert reply.status_code == 200
        answer = reply.json()
        assert answer["decision"] == "abstain"
        # Whoever does not read further than these must not find an answer there.
        assert (answer["label"], answer["probability"], answer["saliency"]) == (None, None, None)
        assert not answer["accepted"]
        (reason,) = answer["reasons"]
        assert reason["code"] == "too_dark"
        assert "at least 200 needed" in reason["text"]
        assert live.count("dermaflux_decisions_total", decision="abstain") == 1
        document = live.client.get("/openapi.json").json()
        codes = document["components"]["schemas"]["Refused"]["properties"]["code"]["enum"]
        assert reason["code"] in codes


@pytest.mark.parametrize(
    ("form", "kind"),
    [("JPEG", "image/jpeg"), ("JPEG", "image/jpg"), ("WEBP", "IMAGE/WEBP"), ("PNG", "image/jpeg")],
)
def test_formats(live: Live, form: str, kind: str) -> None:
    assert post(live, picture(255, form), kind).json()["label"] == "malignant"


def test_form_with_one_file_answers_the_same(live: Live) -> None:
    data = picture(200)
    reply = live.client.post("/v1/classify", files={"image": ("a b.png", data, "image/png")})
    assert reply.status_code == 200
    assert reply.json() == post(live, data).json()


@pytest.mark.parametrize(
    ("files", "data"),
    [
        ({"photo": ("a.png", b"x", "image/png")}, {}),
        ({"image": ("a.png", b"x", "image/png")}, {"note": "x"}),
        ([("image", ("a.png", b"x", "image/png")), ("image", ("b.png", b"x", "image/png"))], {}),
    ],
)
def test_other_forms_are_refused(live: Live, files: object, data: dict[str, str]) -> None:
    reply = live.client.post("/v1/classify", files=files, data=data)  # type: ignore[arg-type]
    assert (reply.status_code, error(reply)["code"]) == (400, "invalid_request")


def test_address_instead_of_a_file_is_refused(live: Live) -> None:
    kind = "multipart/form-data; boundary=b"
    body = (
        b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nhttp://127.0.0.1/\r\n--b--\r\n'
    )
    reply = live.client.post("/v1/classify", content=body, headers={"content-type": kind})
    assert (reply.status_code, error(reply)["field"]) == (400, "image")


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "multipart/form-data; boundary=b", "multipart/form-data; x"]
)
def test_broken_forms_are_refused(live: Live, kind: str) -> None:
    reply = post(live, b"--c\r\nnonsense", kind)
    assert reply.status_code == 400
    error(reply)


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "application/json", "image/gif", "image/svg+xml"],
)
def test_other_content_types_are_refused(live: Live, kind: str) -> None:
    reply = post(live, picture(0), kind)
    assert (reply.status_code, error(reply)["code"]) == (415, "unsupported_media_type")


def test_a_form_whose_file_has_no_type_of_its_own(live: Live) -> None:
    for part in (("lesion", picture(0)), ("lesion", picture(0), "application/octet-stream")):
        reply = live.client.post("/v1/classify", files={"image": part})
        assert reply.status_code == 200, reply.text


def bomb() -> bytes:
    """A PNG of 1.6 GB of zeros once unpacked, in a few bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(b"\0" * 100_000)),
            chunk(b"IEND", b""),
        )
    )


def animation() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (0, 255)]
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:])
    return stream.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"\x89PNG\r\n\x1a\n",
        bytes(range(256)) * 40,
        picture(0, "PNG")[:-40],
        picture(0, "JPEG", (400, 400))[:600],
        picture(0, "PNG", (8, 8)),
        picture(0, "GIF"),
        picture(0, "BMP"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        bomb(),
        animation(),
    ],
    ids=lambda data: f"{len(data)} bytes, {bytes(data[:4])!r}",
)
def test_what_is_no_photograph_is_refused(live: Live, data: bytes) -> None:
    reply = post(live, data)
    assert (reply.status_code, error(reply)["code"]) == (400, "invalid_image")


@pytest.mark.parametrize("size", [(63, 200), (200, 63), (20, 20), (401, 100), (100, 401)])
def test_pictures_that_show_too_little_are_refused(live: Live, size: tuple[int, int]) -> None:
    reply = post(live, picture(0, size=size))
    told = error(reply)
    assert (reply.status_code, told["code"], told["field"]) == (422, "unsuitable_image", "image")
    assert f"{size[0]} x {size[1]} pixels" in told["message"]


@pytest.mark.parametrize("size", [(64, 64), (64, 256), (400, 100)])
def test_pictures_just_large_and_square_enough_are_answered(
    live: Live, size: tuple[int, int]
) -> None:
    assert post(live, picture(0, size=size)).json()["label"] == "benign"


def test_long_uploads_are_refused_declared_or_chunked() -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 1000

    with running(max_upload_bytes=20_000) as live:
        for content in (b"x" * 20_001, chunks()):
            reply = live.client.post(
                "/v1/classify", content=content, headers={"content-type": "image/png"}
            )
            assert (reply.status_code, error(reply)["code"]) == (413, "body_too_large")


def test_bundle_without_classifier_says_so() -> None:
    with running(classifies=False) as live:
        reply = post(live, picture(0))
        assert (reply.status_code, error(reply)["code"]) == (404, "no_classifier")
        assert live.client.get("/v1/model").json()["classifier"] is None


def test_classification_does_not_wait_for_a_generation(live: Live) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with live.brake.closed(), ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(
            live.client.post, "/v1/generate", json={"lesion": {"label": "benign"}}
        )
        live.brake.wait_for(1)
        assert post(live, picture(0)).status_code == 200
        live.brake.open.set()
        drawing.result()
