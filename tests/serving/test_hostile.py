"""Hostile bodies and headers by the thousand, from seeds: every answer is a result or a refusal in
our form, none is a failure of ours, and the service answers as before afterwards."""

from __future__ import annotations

import gc
import io
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image

from dermaflux.errors import ImageError
from dermaflux.images import decode_upload
from serving.keys import line, made
from tests.serving.live import Live, picture, running

ROUNDS = 250
"""Of each kind. A run with 6,000 and other seeds (43,000 requests, 66,000 files) found nothing."""
LESION = {"lesion": {"label": "benign", "colors": ["black"]}, "seed": 7, "steps": 1, "width": 64}
ODD: tuple[object, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1.5,
        10**400,
        2**63,
        1e308,
        "",
        "\x00",
        "\ud800".encode("utf-16", "replace"),
    ),
    *("benign", "a" * 5000, "../../etc/passwd", "{{7*7}}", "%s%n", "http://127.0.0.1/", "\u202e"),
    *([], [[]], {}, {"label": {}}, ["benign"] * 2000, {"$ref": "#"}),
)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The bytes with a few changes as a damaged or a malicious file has."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(out) + 1)
        kind = chance.randrange(6)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = chance.randbytes(chance.choice((1, 4, 64)))
        elif kind == 3:
            del out[at : at + chance.choice((1, 4, 64))]
        elif kind == 4:
            # A length that lies.
            out[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)))
        else:
            out += out[at:]
    return bytes(out)


def files() -> Iterator[bytes]:
    """Pictures of every form we take, and of some that we do not."""
    for form in ("PNG", "JPEG", "WEBP"):
        yield picture(200, form)
    for form, mode in (
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("PNG", "LA"),
        ("JPEG", "CMYK"),
        ("GIF", "P"),
    ):
        stream = io.BytesIO()
        Image.new(mode, (70, 66)).save(stream, form)
        yield stream.getvalue()
    for form in ("BMP", "TIFF", "ICO"):
        yield picture(200, form)


def changed(body: dict[str, object], chance: random.Random) -> bytes:
    """A request with odd values at odd places, or one that is hardly JSON."""
    copy = json.loads(json.dumps(body))
    owner = chance.choice((copy, copy.get("lesion") or copy))
    name = chance.choice([*owner, "prompt", "format", "n", "quality", "__proto__", "x" * 300])
    owner[name] = chance.choice([odd for odd in ODD if not isinstance(odd, bytes)])
    text = json.dumps(copy).encode()
    if chance.random() < 0.4:
        text = mutated(text, chance)
    if chance.random() < 0.05:
        text = chance.choice((b"[" * 20_000, b'{"a":' * 20_000, b"\xff\xfe", b"NaN", b'"' * 50_000))
    return text


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    key, entry = made("ward3", ["generate", "classify", "free-text"])
    with running(keys_inline=line(entry), deadline_seconds=20.0) as app:
        app.client.headers["x-api-key"] = key
        yield app


def judged(reply: httpx.Response) -> int:
    """The status, of a reply in one of the forms that there are."""
    assert reply.status_code < 500, reply.text
    if reply.status_code != 200:
        told = reply.json()["error"]
        assert told["message"]
        assert len(reply.content) < 2_000
    return reply.status_code


def still_right(live: Live) -> None:
    png = live.client.post("/v1/generate", json=LESION)
    assert png.headers["content-type"] == "image/png"
    form = {"image": ("a.png", picture(200), "image/png")}
    assert live.client.post("/v1/classify", files=form).status_code == 200


def test_json(live: Live) -> None:
    chance = random.Random(1)
    header = {"content-type": "application/json"}
    found: Counter[int] = Counter()
    for path in ("/v1/generate", "/v1/generate/stream", "/v1/images/generations"):
        for _ in range(ROUNDS):
            reply = live.client.post(path, content=changed(LESION, chance), headers=header)
            found[judged(reply)] += 1
    assert {400, 422} <= set(found) <= {200, 400, 403, 413, 415, 422}, found
    still_right(live)


def test_pictures(live: Live) -> None:
    chance = random.Random(2)
    found: Counter[int] = Counter()
    for data in files():
        for _ in range(ROUNDS // 10):
            kind = chance.choice(("image/png", "image/jpeg", "image/webp", "image/jpg"))
            reply = live.client.post(
                "/v1/classify", content=mutated(data, chance), headers={"content-type": kind}
            )
            found[judged(reply)] += 1
    assert {200, 400} <= set(found) <= {200, 400, 422}, found
    still_right(live)


def test_forms(live: Live) -> None:
    chance = random.Random(3)
    found: Counter[int] = Counter()
    whole = httpx.Request("POST", "http://a", files=[("image", ("a.png", picture(9), "image/png"))])
    body = whole.read()
    kind = whole.headers["content-type"]
    for path in ("/v1/classify", "/v1/classify/batch"):
        for _ in range(ROUNDS):
            odd = kind if chance.random() < 0.8 else odd_type(kind, chance)
            reply = live.client.post(
                path, content=mutated(body, chance), headers={"content-type": odd}
            )
            found[judged(reply)] += 1
    assert {200, 400} <= set(found) <= {200, 400, 413, 415, 422}, found
    still_right(live)


def odd_type(kind: str, chance: random.Random) -> str:
    return chance.choice(
        (
            "multipart/form-data",
            "multipart/form-data; boundary=",
            f"multipart/form-data; boundary={'a' * 300}",
            kind + "; charset=utf-7",
            kind.upper(),
            "multipart/mixed; boundary=a",
            "; ;",
            "image/png; boundary=--",
        )
    )


def test_keys_and_headers(live: Live) -> None:
    chance = random.Random(4)
    found: Counter[int] = Counter()
    letters = [chr(code) for code in range(33, 256) if code != 127]
    for _ in range(ROUNDS):
        text = "".join(chance.choices(letters, k=chance.choice((1, 10, 53, 500))))
        name = chance.choice(
            ("authorization", "x-api-key", "x-request-id", "accept", "traceparent")
        )
        value = f"Bearer {text}" if name == "authorization" else text
        # A wrong key beside a right one harms nobody: the one that is right is taken.
        reply = live.client.get("/v1/model", headers={name: value.encode("latin-1")})
        assert "\n" not in reply.headers["x-request-id"]
        found[judged(reply)] += 1
    assert {200, 401} <= set(found) <= {200, 401, 429}, found


@pytest.mark.parametrize("file", [*files()], ids=lambda _: "")
def test_decoder_takes_a_picture_or_says_what_is_wrong(file: bytes) -> None:
    chance = random.Random(5)
    for _ in range(ROUNDS):
        try:
            image = decode_upload(mutated(file, chance), max_pixels=100_000)
        except ImageError:
            continue
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= 100_000


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, with hardly any data."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9)))


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)])
def test_bombs_take_no_memory(size: tuple[int, int]) -> None:
    tracemalloc.start()
    with pytest.raises(ImageError):
        decode_upload(bomb(*size))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


UPLOAD = 4_000_000


@pytest.mark.parametrize(
    ("path", "kind", "status"),
    [
        ("/v1/classify", "image/png", 400),
        ("/v1/classify", "multipart/form-data; boundary=x", 400),
        ("/v1/classify/batch", "multipart/form-data; boundary=x", 400),
        ("/v1/verify", "image/png", 400),
        ("/v1/generate", "application/json", 413),
    ],
)
def test_refused_uploads_are_freed_at_once(live: Live, path: str, kind: str, status: int) -> None:
    """Not when Python next collects what refers to itself in a circle."""
    wrong = b'--x\r\nContent-Disposition: form-data; name="other"; filename="a"\r\n\r\n'
    body = (wrong if "form" in kind else b"") + bytes(UPLOAD)
    body += b"\r\n--x--\r\n" if "form" in kind else b""

    def ask() -> None:
        reply = live.client.post(path, content=body, headers={"content-type": kind})
        assert judged(reply) == status

    ask()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(5):
            ask()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert after - before < UPLOAD


@pytest.mark.parametrize("address", ["http://127.0.0.1/a.png", "https://a/b", "file:///etc/passwd"])
@pytest.mark.parametrize("path", ["/v1/classify", "/v1/classify/batch"])
def test_addresses_are_no_pictures(live: Live, path: str, address: str) -> None:
    """BentoML would fetch them."""

    def ask(**more: object) -> int:
        return judged(live.client.post(path, **more))  # type: ignore[arg-type]

    assert ask(files={"image": (None, address)}) == 400
    assert ask(json={"image": address}) == 415
    assert ask(data={"image": address}) == 415
    # In a form of several each file has an answer of its own.
    named = ask(files={"image": ("a", address.encode(), "image/png")})
    assert named == (200 if path.endswith("batch") else 400)
