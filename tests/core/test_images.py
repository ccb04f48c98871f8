"""Pictures: what is decoded, what is refused, and that marks survive the way to a file."""

from __future__ import annotations

import contextlib
import io
import random
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dermaflux.errors import ImageError
from dermaflux.images import (
    NOTICE,
    SOURCE_TYPE,
    decode_upload,
    encode,
    read_marks,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_are_read(form):
    picture = decode_upload(encoded(Image.fromarray(PIXELS), form))
    assert (picture.mode, picture.size) == ("RGB", (64, 48))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    form = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    if mode == "I;16":
        source = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    else:
        source = Image.fromarray(PIXELS).convert(mode)
    picture = decode_upload(encoded(source, form))
    assert (picture.mode, picture.size) == ("RGB", (64, 48))
    if mode in ("L", "I;16"):
        expected = np.asarray(source.convert("L")) if mode == "L" else PIXELS[..., 0]
        assert np.array_equal(np.asarray(picture)[..., 0], expected)


def test_transparency_is_put_over_white():
    source = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    assert decode_upload(encoded(source, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 128))
    assert decode_upload(encoded(half, "PNG")).getpixel((0, 0)) == (127, 127, 127)


def test_a_photograph_is_turned_upright():
    source = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = decode_upload(encoded(source, "PNG", exif=exif))
    assert picture.size == (48, 64)
    assert np.array_equal(np.asarray(picture), np.rot90(PIXELS, -1))


def test_a_phone_s_jpeg_of_several_frames_is_its_first():
    first, second = Image.fromarray(PIXELS), Image.new("RGB", (64, 48))
    data = encoded(first, "MPO", save_all=True, append_images=[second], quality=100)
    assert np.array_equal(
        np.asarray(decode_upload(data)),
        np.asarray(decode_upload(encoded(first, "JPEG", quality=100))),
    )


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_animations_are_refused(form):
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    with pytest.raises(ImageError, match="animated"):
        decode_upload(encoded(frames[0], form, save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(form):
    with pytest.raises(ImageError, match="not a JPEG, PNG or WebP"):
        decode_upload(encoded(Image.fromarray(PIXELS), form))


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", b"<svg/>", b"\xff\xd8\xff", b"\0" * 99]
)
def test_garbage_is_refused(data):
    with pytest.raises(ImageError):
        decode_upload(data)


def test_sizes_are_bounded_before_pixels_are_read():
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(ImageError, match="pixels"):
        decode_upload(bomb)
    with pytest.raises(ImageError, match="use at most 1000 in all"):
        decode_upload(encoded(Image.fromarray(PIXELS), "PNG"), max_pixels=1000)
    with pytest.raises(ImageError, match="at least 16"):
        decode_upload(encoded(Image.new("RGB", (64, 15)), "PNG"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damage_is_an_image_error_or_an_image(form):
    data = encoded(Image.fromarray(PIXELS), form)
    with pytest.raises(ImageError, match="damaged|not a"):
        decode_upload(data[: len(data) // 2])
    chance = random.Random(0)
    for _ in range(200):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 8)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        with contextlib.suppress(ImageError):
            assert decode_upload(bytes(broken)).mode == "RGB"


FORMS = [("png", None), ("webp", None), ("webp", 80), ("jpeg", None), ("jpeg", 100)]


@pytest.mark.parametrize(("form", "quality"), FORMS)
def test_marks_are_read_as_they_were_written(form, quality):
    text = {
        "prompt": "lésion 皮膚 🩺 <&> \"quoted\" 'single' \ufffe \\u0041 &quot;",
        "seed": "7",
        "bundle": "0123456789abcdef",
    }
    data = encode(PIXELS, text, form, quality)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == form.upper()
        # Without loss, but for JPEG and where a quality was asked for.
        lossless = np.array_equal(np.asarray(picture), PIXELS)
        assert lossless == (form != "jpeg" and quality is None)
    marks = read_marks(data)
    assert {f"dermaflux.{key}": value for key, value in text.items()}.items() <= marks.items()
    assert marks["DigitalSourceType"] == SOURCE_TYPE
    assert marks["Description"] == NOTICE
    assert data == encode(PIXELS, text, form, quality)


@pytest.mark.parametrize(("form", "quality"), FORMS)
def test_the_longest_prompt_fits_into_the_marks(form, quality):
    for letter in ("皮", "🩺", '"', "'", "&"):
        text = {"prompt": letter * 2000}
        assert read_marks(encode(PIXELS, text, form, quality))["dermaflux.prompt"] == text["prompt"]


@pytest.mark.parametrize(("form", "quality"), FORMS)
def test_the_synthetic_mark_is_where_other_programs_look(form, quality):
    data = encode(PIXELS, {"prompt": "\"'<&> 皮膚"}, form, quality)
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        packet = ElementTree.fromstring(picture.info["xmp"])
    (description,) = packet.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    iptc = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    assert description.get(f"{iptc}DigitalSourceType") == SOURCE_TYPE


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_picture_without_marks_has_none(form):
    assert read_marks(encoded(Image.fromarray(PIXELS), form)) == {}
    strange = b'<x dermaflux:record="[1, 2"/><y dermaflux:record="3"/>'
    if form != "PNG":
        assert read_marks(encoded(Image.fromarray(PIXELS), form, xmp=strange)) == {}
    with pytest.raises(ImageError, match="not a PNG"):
        read_marks(b"GIF89a")
