"""Classification over HTTP: answers, forms, and every kind of file that is no photograph."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from serving.scores import Trouble, UnavailableError
from serving.scoring import Photograph, Result
from tests.lenient import lenient
from tests.serving.live import Live, picture, running, until
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
    with live.brake.closed(), ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(
            live.client.post, "/v1/generate", json={"lesion": {"label": "benign"}}
        )
        live.brake.wait_for(1)
        assert post(live, picture(0)).status_code == 200
        live.brake.open.set()
        drawing.result()


def test_saliency_only_where_asked_for(live: Live) -> None:
    def get(query: str) -> httpx.Response:
        kind = {"content-type": "image/png"}
        data = picture(255, size=(300, 100))
        return live.client.post(f"/v1/classify{query}", content=data, headers=kind)

    assert get("").json()["saliency"] is get("?saliency=0").json()["saliency"] is None
    file = base64.b64decode(get("?saliency=1").json()["saliency"], validate=True)
    with Image.open(io.BytesIO(file), formats=["PNG"]) as drawn:
        assert (drawn.mode, drawn.size) == ("LA", (300, 100))
        alpha = drawn.getchannel("A")
        assert (alpha.getpixel((20, 50)), alpha.getpixel((150, 50))) == (0, 255)
    for query in ("?saliency=yes", "?saliency=1&saliency=1", "?saliency="):
        reply = get(query)
        assert (reply.status_code, error(reply)["field"]) == (422, "saliency")


def send(live: Live, *files: bytes, query: str = "") -> httpx.Response:
    form = [("image", (f"{number}.png", file)) for number, file in enumerate(files)]
    return live.client.post(f"/v1/classify/batch{query}", files=form)


def test_each_file_of_a_form_has_its_own_answer_or_error(live: Live) -> None:
    good = [picture(red) for red in (0, 255, 118)]
    files = [good[0], b"", good[1], b"not an image", picture(0, size=(20, 20)), good[2], bomb()]
    reply = send(live, *files)
    assert reply.status_code == 200
    results = reply.json()["results"]
    assert [one["index"] for one in results] == list(range(7))
    codes = [one["error"] and one["error"]["code"] for one in results]
    assert codes == [
        None, "invalid_image", None, "invalid_image", "unsuitable_image", None, "invalid_image"
    ]  # fmt: skip
    assert all((one["result"] is None) == (one["error"] is not None) for one in results)
    for index, file in zip((0, 2, 5), good, strict=True):
        assert results[index]["result"] == post(live, file).json()
    assert results[3]["error"]["request_id"] == reply.headers["x-request-id"]


def test_saliencies_of_a_form(live: Live) -> None:
    results = send(live, picture(0), picture(255), query="?saliency=1").json()["results"]
    assert all(one["result"]["saliency"] for one in results)


def test_a_form_has_bounds() -> None:
    with running(max_batch_files=3, max_batch_bytes=30_000, max_upload_bytes=9_000) as live:
        assert len(send(live, *[picture(0)] * 3).json()["results"]) == 3
        reply = send(live, *[picture(0)] * 4)
        assert (reply.status_code, error(reply)["code"]) == (400, "invalid_request")
        assert "one to 3 fields" in error(reply)["message"]
        reply = send(live, b"x" * 31_000)
        assert (reply.status_code, error(reply)["code"]) == (413, "body_too_large")
        codes = [one["error"] for one in send(live, b"x" * 9_001, picture(0)).json()["results"]]
        assert (codes[0]["code"], codes[1]) == ("body_too_large", None)
        typed = [("image", ("a.txt", b"x", "text/plain")), ("image", ("b.png", picture(0)))]
        results = live.client.post("/v1/classify/batch", files=typed).json()["results"]
        assert results[0]["error"]["code"] == "unsupported_media_type"
        assert results[1]["error"] is None


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{}", "application/json", 415),
        (b"--b--", "multipart/form-data", 400),
        (b"--b--\r\n", "multipart/form-data; boundary=b", 400),
        (
            b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            400,
        ),
    ],
)
def test_what_is_no_form_of_files_is_refused(
    live: Live, content: bytes, kind: str, status: int
) -> None:
    reply = live.client.post("/v1/classify/batch", content=content, headers={"content-type": kind})
    assert reply.status_code == status
    error(reply)


class Away:
    """A classifier that is not there, or never answers; its engine has something to say."""

    def __init__(self, trouble: Trouble | None = None) -> None:
        self.told = trouble
        self.asked = self.left = 0

    def trouble(self) -> Trouble | None:
        return self.told

    def note(self) -> str:
        return "in bf16, as it were"

    async def score(self, photograph: Photograph) -> Result:
        self.asked += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.left += 1
        raise AssertionError


def test_the_card_says_what_the_classifiers_engine_says() -> None:
    with running(scores=Away()) as live:
        engines = live.client.get("/v1/model").json()["engines"]
    assert {one["part"]: one["note"] for one in engines} == {
        "transformer": "", "classifier": "in bf16, as it were"
    }  # fmt: skip


@pytest.mark.parametrize("passes", [True, False])
def test_without_a_classifier_for_now_everything_else_goes_on(passes: bool) -> None:
    away = Away(Trouble("It ended.", passes=passes))
    with running(scores=away) as live:
        form = send(live, picture(0))
        for reply in (post(live, picture(0)), form, live.client.get("/readyz")):
            told = error(reply)
            assert (reply.status_code, told["code"], told["message"]) == (
                503, "not_ready", "It ended."
            )  # fmt: skip
            assert ("retry-after" in reply.headers) == passes
        drawn = live.client.post("/v1/generate", json={"lesion": {"label": "benign"}})
        assert drawn.status_code == 200
        assert live.client.get("/v1/model").status_code == 200
        away.told = None
        assert live.client.get("/readyz").status_code == 200


def test_a_classifier_that_dies_on_the_way_is_told_as_such() -> None:
    class Dying(Away):
        async def score(self, photograph: Photograph) -> Result:
            raise UnavailableError(Trouble("It ended."))

    with running(scores=Dying()) as live:
        reply = post(live, picture(0))
        assert (reply.status_code, error(reply)["code"]) == (503, "not_ready")
        (told,) = send(live, picture(0)).json()["results"]
        assert told["error"]["code"] == "not_ready"


def test_the_deadline_ends_the_wait_for_the_classifier() -> None:
    away = Away()
    with running(scores=away, deadline_seconds=0.05) as live:
        reply = post(live, picture(0))
        assert (reply.status_code, error(reply)["code"]) == (504, "deadline")
        results = send(live, *[picture(0)] * 20).json()["results"]
        assert {one["error"]["code"] for one in results} == {"deadline"}
        assert away.asked == away.left


def test_a_client_who_leaves_frees_its_places() -> None:
    away = Away()
    with running(scores=away, photographs=1) as live:
        with pytest.raises(httpx.ReadTimeout):
            live.client.post(
                "/v1/classify",
                content=picture(0),
                headers={"content-type": "image/png"},
                timeout=httpx.Timeout(30, read=0.05),
            )
        until(lambda: away.left == 1)
        assert away.asked == 1


def test_photographs_that_wait_are_bounded() -> None:
    away = Away()
    with (
        running(scores=away, photographs=4, deadline_seconds=30.0) as live,
        ThreadPoolExecutor(4) as pool,
    ):
        waiting = [pool.submit(left, live) for _ in range(4)]
        until(lambda: away.asked == 4)
        for reply in (post(live, picture(0)), send(live, picture(0))):
            assert (reply.status_code, error(reply)["code"]) == (429, "busy")
            assert int(reply.headers["retry-after"]) >= 1
        for one in waiting:
            one.result()


def left(live: Live) -> None:
    """A client who waits for a while and leaves."""
    with pytest.raises(httpx.ReadTimeout):
        live.client.post(
            "/v1/classify",
            content=picture(0),
            headers={"content-type": "image/png"},
            timeout=httpx.Timeout(30, read=1.0),
        )
