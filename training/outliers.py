"""Pictures that a classifier of lesions must not judge, made of real ones or drawn.

Nobody collects what a camera sees by mistake, so it is made: real pictures spoilt, and things that
are no lesion at all. The photographs (a cat, a street, a cup of coffee) are those that scikit-image
and scikit-learn carry in their packages. Equal generators make equal pictures.

    >>> KINDS["dark"].make(picture, mask, np.random.default_rng(0))
    <PIL.Image.Image mode=RGB size=224x224>
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from dermaflux.errors import DatasetError

Mask = NDArray[np.bool_]
Random = np.random.Generator

PHOTOGRAPHS: Final = (
    ("skimage.data", "astronaut.png"), ("skimage.data", "camera.png"),
    ("skimage.data", "chelsea.png"), ("skimage.data", "clock_motion.png"),
    ("skimage.data", "coffee.png"), ("skimage.data", "coins.png"),
    ("skimage.data", "brick.png"), ("skimage.data", "grass.png"),
    ("skimage.data", "gravel.png"), ("skimage.data", "motorcycle_left.png"),
    ("skimage.data", "rocket.jpg"),
    ("sklearn.datasets.images", "china.jpg"), ("sklearn.datasets.images", "flower.jpg"),
)  # fmt: skip
OTHER_MEDICAL: Final = (
    ("skimage.data", "cell.png"), ("skimage.data", "hubble_deep_field.jpg"),
    ("skimage.data", "ihc.png"), ("skimage.data", "microaneurysms.png"),
    ("skimage.data", "moon.png"), ("skimage.data", "retina.jpg"),
)  # fmt: skip
"""Round and orange things, and stains: nearer to a dermoscope's picture than a street is."""
_SIDE: Final = 224


@dataclass(frozen=True)
class Kind:
    """One kind of outlier. `make` takes a picture of a lesion, its mask [H, W] or None, and a
    generator; it gives None where this picture cannot be made into one. `about` says what it is.

    A kind of the group "marks" or "skin" still shows a lesion that could be judged: how many are
    refused is told, and is no miss or hit.
    """

    group: str
    about: str
    make: Callable[[Image.Image, Mask | None, Random], Image.Image | None]


def _array(picture: Image.Image) -> NDArray[np.float64]:
    return np.asarray(picture.convert("RGB"), np.float64)


def _image(pixels: NDArray[Any]) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _of_pixels(change: Callable[[NDArray[np.float64], Random], NDArray[Any]]) -> Any:
    return lambda picture, mask, random: _image(change(_array(picture), random))


def _drawn(draw: Callable[[Random], Image.Image]) -> Any:
    return lambda picture, mask, random: draw(random)


def _blurred(share: float) -> Any:
    """Gaussian, its sigma a share of the shorter side."""
    return lambda picture, mask, random: picture.filter(
        ImageFilter.GaussianBlur(share * min(picture.size))
    )


def _shaken(share: float) -> Any:
    """A camera that moved in a straight line, by a share of the side, in any direction."""

    def change(pixels: NDArray[np.float64], random: Random) -> NDArray[np.float64]:
        steps, angle = max(2, round(share * min(pixels.shape[:2]))), random.uniform(0, np.pi)
        ways = np.linspace(-0.5, 0.5, steps) * share * min(pixels.shape[:2])
        pad = round(share * min(pixels.shape[:2])) + 1
        wide = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
        rows, columns = pixels.shape[:2]
        total = np.zeros_like(pixels)
        for way in ways:
            y, x = pad + round(way * np.sin(angle)), pad + round(way * np.cos(angle))
            total += wide[y : y + rows, x : x + columns]
        return np.asarray(total / steps)

    return _of_pixels(change)


def _squeezed(quality: int) -> Any:
    def make(picture: Image.Image, mask: Mask | None, random: Random) -> Image.Image:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        with Image.open(stream) as found:
            return found.convert("RGB")

    return make


def _pixelated(side: int) -> Any:
    def make(picture: Image.Image, mask: Mask | None, random: Random) -> Image.Image:
        small = picture.resize((side, side), Image.Resampling.BOX)
        return small.resize(picture.size, Image.Resampling.BICUBIC)

    return make


def _bare_skin(picture: Image.Image, mask: Mask | None, random: Random) -> Image.Image | None:
    """The largest corner that has no lesion in it, a quarter of the side at the least."""
    if mask is None:
        return None
    height, width = mask.shape
    for share in (0.4, 0.35, 0.3, 0.25):
        rows, columns = round(share * height), round(share * width)
        # A little away from the edge, where a dermoscope's tube may be.
        y, x = round(0.04 * height), round(0.04 * width)
        corners = [
            (top, left)
            for top in (y, height - rows - y)
            for left in (x, width - columns - x)
            if not mask[top : top + rows, left : left + columns].any()
        ]
        if corners:
            top, left = corners[random.integers(len(corners))]
            box = (left, top, left + columns, top + rows)
            return picture.resize(picture.size, Image.Resampling.BICUBIC, box)
    return None


def _far_away(picture: Image.Image, mask: Mask | None, random: Random) -> Image.Image:
    """A tenth of the frame is the picture; around it is skin in uneven light, as a phone sees."""
    pixels = _array(picture)
    rim = np.concatenate([pixels[:8].reshape(-1, 3), pixels[-8:].reshape(-1, 3)])
    rows, columns = np.mgrid[-1 : 1 : _SIDE * 1j, -1 : 1 : _SIDE * 1j]
    light = 1 + 0.15 * (rows * random.uniform(-1, 1) + columns * random.uniform(-1, 1))
    light *= 1 - 0.15 * (rows**2 + columns**2) / 2
    ground = np.median(rim, axis=0) * light[..., None]
    ground += random.normal(0, 3, (_SIDE, _SIDE, 1))
    side = round(_SIDE * 0.1**0.5)
    small = _array(picture.resize((side, side), Image.Resampling.LANCZOS))
    y, x = random.integers(_SIDE // 4, _SIDE * 3 // 4 - side, 2)
    # Soft edges: a lesion on skin, and not a picture on it.
    ramp = np.minimum(np.linspace(0, 1, side), np.linspace(1, 0, side)) * 4
    soft = np.minimum(1, np.minimum(ramp[:, None], ramp[None]))[..., None]
    place = ground[y : y + side, x : x + side]
    ground[y : y + side, x : x + side] = soft * small + (1 - soft) * place
    return _image(ground)


def _cast(pixels: NDArray[np.float64], random: Random) -> NDArray[np.float64]:
    """A white balance far off: a warm lamp, a cold one, or a green tube."""
    gains = ((1.35, 1.0, 0.55), (0.65, 0.95, 1.4), (0.75, 1.2, 0.7))
    return np.asarray(pixels * np.array(gains[random.integers(len(gains))]))


def _darker_skin(pixels: NDArray[np.float64], random: Random) -> NDArray[np.float64]:
    """Roughly the change from light to dark brown skin: (226, 188, 168) becomes (110, 72, 54)."""
    return np.asarray(pixels * np.array((110 / 226, 72 / 188, 54 / 168)))


def _ruler(draw: ImageDraw.ImageDraw, size: tuple[int, int], y: int, height: int) -> None:
    width = size[0]
    draw.rectangle((0, y, width, y + height), fill=(235, 235, 228))
    step = width / 40
    for number in range(41):
        long = 0.6 if number % 10 == 0 else 0.45 if number % 5 == 0 else 0.3
        x = round(number * step)
        draw.line((x, y, x, y + height * long), fill=(20, 20, 20), width=1)
        if number % 10 == 0:
            font = ImageFont.load_default(max(8, height // 3))
            draw.text((x + 2, y + height * 0.6), str(number // 10), fill=(20, 20, 20), font=font)


def _with_ruler(picture: Image.Image, mask: Mask | None, random: Random) -> Image.Image:
    """Over the lower or upper part, as many real pictures have one."""
    marked = picture.copy()
    height = round(picture.height * 0.16)
    y = int(random.choice([0, picture.height - height]))
    _ruler(ImageDraw.Draw(marked), picture.size, y, height)
    return marked


def _with_ink(picture: Image.Image, mask: Mask | None, random: Random) -> Image.Image:
    """A pen's strokes around and across."""
    marked = picture.copy()
    draw = ImageDraw.Draw(marked)
    for _ in range(3):
        points = [tuple(random.uniform(0, 1, 2) * picture.size) for _ in range(3)]
        draw.line(points, fill=(60, 40, 130), width=max(2, picture.width // 40), joint="curve")
    return marked


def _only_ruler(random: Random) -> Image.Image:
    shade = random.integers(60, 230, 3)
    picture = _image(np.full((_SIDE, _SIDE, 3), shade) + random.normal(0, 4, (_SIDE, _SIDE, 1)))
    draw = ImageDraw.Draw(picture)
    height = int(random.integers(50, 120))
    _ruler(draw, picture.size, int(random.integers(20, _SIDE - height - 20)), height)
    return picture.rotate(int(random.integers(0, 4)) * 90)


def _page(random: Random) -> Image.Image:
    picture = Image.new("RGB", (_SIDE, _SIDE), (250, 250, 246))
    draw, y = ImageDraw.Draw(picture), 8
    size = int(random.integers(8, 18))
    font = ImageFont.load_default(size)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz    "))
    while y < _SIDE:
        text = "".join(random.choice(letters, 60))
        draw.text((10, y), text, fill=(25, 25, 30), font=font)
        y += size + 4
    return picture


def _screen(random: Random) -> Image.Image:
    """A program's window: a bar, a list, boxes and a picture's empty frame."""
    light = random.random() < 0.5
    ground, ink = ((243, 244, 246), (40, 44, 52)) if light else ((30, 32, 38), (220, 222, 226))
    picture = Image.new("RGB", (_SIDE, _SIDE), ground)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(10)
    colour = tuple(int(v) for v in random.integers(30, 220, 3))
    draw.rectangle((0, 0, _SIDE, 22), fill=colour)
    draw.text((6, 5), "Patients   Visits   Images", fill=(255, 255, 255), font=font)
    for row in range(int(random.integers(5, 11))):
        y = 32 + 17 * row
        draw.text((8, y), f"{random.integers(10**6):06}", fill=ink, font=font)
        draw.rectangle((60, y, 60 + int(random.integers(20, 60)), y + 9), fill=colour)
    draw.rectangle((140, 34, 214, 110), outline=ink)
    return picture


def _gradient(random: Random) -> Image.Image:
    first, second = random.uniform(0, 255, (2, 3))
    ramp = np.linspace(0, 1, _SIDE)[:, None, None]
    turned = np.broadcast_to(first * (1 - ramp) + second * ramp, (_SIDE, _SIDE, 3))
    return _image(np.rot90(turned, int(random.integers(4))))


def _board(random: Random) -> Image.Image:
    square = int(random.integers(4, 40))
    rows, columns = np.mgrid[:_SIDE, :_SIDE] // square
    colours = random.uniform(0, 255, (2, 3))
    return _image(colours[(rows + columns) % 2])


def _static(random: Random) -> Image.Image:
    """Noise in grains of 1 to 8 pixels."""
    grains = _SIDE // int(random.choice([1, 2, 4, 8]))
    noise = _image(random.uniform(0, 255, (grains, grains, 3)))
    return noise.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)


def _one_colour(random: Random) -> Image.Image:
    return Image.new("RGB", (_SIDE, _SIDE), tuple(int(v) for v in random.integers(0, 256, 3)))


def _photograph(names: tuple[tuple[str, str], ...]) -> Any:
    """Somewhere in one of the photographs, a third of its side at the least."""

    def make(picture: Image.Image, mask: Mask | None, random: Random) -> Image.Image:
        found = photograph(*names[random.integers(len(names))])
        side = round(min(found.size) * random.uniform(0.33, 1.0))
        x = int(random.integers(found.width - side + 1))
        y = int(random.integers(found.height - side + 1))
        return found.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, (x, y, x + side, y + side))

    return make


def photograph(package: str, name: str) -> Image.Image:
    """A photograph that a package carries, in RGB.

    Raises:
        DatasetError: this version of the package has it no longer.
    """
    try:
        with as_file(files(package) / name) as path, Image.open(path) as found:
            return found.convert("RGB")
    except (OSError, ModuleNotFoundError) as error:
        raise DatasetError(
            f"{package} has no {name} ({error}); install the versions of constraints.txt"
        ) from error


KINDS: Final[Mapping[str, Kind]] = {
    "black": Kind("quality", "nothing but black", _of_pixels(lambda p, r: p * 0)),
    "white": Kind("quality", "nothing but white", _of_pixels(lambda p, r: p * 0 + 255)),
    "dark": Kind("quality", "an eighth of the light", _of_pixels(lambda p, r: p * 0.125)),
    "dim": Kind("quality", "a third of the light", _of_pixels(lambda p, r: p * 0.33)),
    "overexposed": Kind("quality", "three times the light", _of_pixels(lambda p, r: p * 3)),
    "bright": Kind("quality", "1.7 times the light", _of_pixels(lambda p, r: p * 1.7)),
    "faint": Kind("quality", "a tenth of the contrast", _of_pixels(
        lambda p, r: p.mean((0, 1)) + 0.1 * (p - p.mean((0, 1))))),
    "blur_1": Kind("quality", "Gaussian, sigma 1 % of the side", _blurred(0.01)),
    "blur_2": Kind("quality", "Gaussian, sigma 2 % of the side", _blurred(0.02)),
    "blur_4": Kind("quality", "Gaussian, sigma 4 % of the side", _blurred(0.04)),
    "shaken_5": Kind("quality", "moved by 5 % of the side", _shaken(0.05)),
    "shaken_12": Kind("quality", "moved by 12 % of the side", _shaken(0.12)),
    "noise_25": Kind("quality", "noise, sigma 25 of 255", _of_pixels(
        lambda p, r: p + r.normal(0, 25, p.shape))),
    "noise_60": Kind("quality", "noise, sigma 60 of 255", _of_pixels(
        lambda p, r: p + r.normal(0, 60, p.shape))),
    "jpeg_3": Kind("quality", "JPEG of quality 3", _squeezed(3)),
    "pixels_24": Kind("quality", "24 pixels a side, enlarged", _pixelated(24)),
    "bare_skin": Kind("content", "a corner without the lesion, enlarged", _bare_skin),
    "far_away": Kind("content", "the lesion's picture on a tenth of the frame", _far_away),
    "colour_cast": Kind("content", "white balance of another lamp", _of_pixels(_cast)),
    "grey": Kind("content", "without colours", _of_pixels(
        lambda p, r: p.mean(2, keepdims=True).repeat(3, 2))),
    "negative": Kind("content", "a negative", _of_pixels(lambda p, r: 255 - p)),
    "channels": Kind("content", "red and blue exchanged", _of_pixels(lambda p, r: p[..., ::-1])),
    "ruler": Kind("content", "a ruler and no lesion", _drawn(_only_ruler)),
    "page": Kind("content", "a page of text", _drawn(_page)),
    "screen": Kind("content", "a program's window", _drawn(_screen)),
    "one_colour": Kind("content", "one colour", _drawn(_one_colour)),
    "gradient": Kind("content", "one colour turning into another", _drawn(_gradient)),
    "chessboard": Kind("content", "squares of two colours", _drawn(_board)),
    "static": Kind("content", "coloured noise", _drawn(_static)),
    "photograph": Kind("content", "photographs of other things", _photograph(PHOTOGRAPHS)),
    "cat": Kind("content", "a cat", _photograph((("skimage.data", "chelsea.png"),))),
    "other_medical": Kind("content", "stains, an eye, planets", _photograph(OTHER_MEDICAL)),
    "with_ruler": Kind("marks", "a ruler beside the lesion", _with_ruler),
    "with_ink": Kind("marks", "pen strokes", _with_ink),
    "darker_skin": Kind("skin", "skin of a dark brown tone, by colour alone",
                        _of_pixels(_darker_skin)),
}  # fmt: skip
