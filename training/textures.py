"""Pictures of nothing, drawn: leaves, clouds, fur and mixtures, half of them in skin's colours.

A density knows which pictures are unusual, and a cat is no more unusual than a hairy lesion. What
it lacks is a picture of the other side. Photographs of everything else are many and not ours; drawn
textures with their statistics tell lesions from most of them, if both are prepared alike
(`training.preparation`): unprepared, they are told apart by the JPEG alone. Sources: Hendrycks,
Mazeika and Dietterich, Deep Anomaly Detection with Outlier Exposure (2019); dead leaves: Lee,
Mumford and Huang, Occlusion Models for Natural Images (2001). No photograph is used in the fit.

    >>> texture(np.random.default_rng(0))
    <PIL.Image.Image image mode=RGB size=224x224>
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_SIDE: Final = 224
"""Pixels. More than is looked at (`dermaflux.appearance.SIDE`): shrunk, edges are as soft as a
camera's; drawn at that size they are jagged, which no photograph is."""
_SKIN: Final = ((120, 60, 30), (250, 200, 190))
"""Colours between these, and near to them, are those of skin, wood, fur and bread."""

Field = NDArray[np.float64]
Random = np.random.Generator


def texture(random: Random) -> Image.Image:
    """One picture; equal generators, equal pictures."""
    kind = random.integers(4)
    if kind == 3:
        where = _field(random, 2.0) > random.normal(0, 0.5)
        pixels = np.where(where[..., None], _clouds(random), _leaves(random))
    else:
        pixels = (_leaves, _clouds, _fur)[kind](random)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _palette(random: Random, count: int) -> Field:
    if random.random() < 0.5:
        return (random.uniform(*_SKIN) + random.normal(0, 35, (count, 3))).clip(0, 255)
    return random.uniform(0, 255, (count, 3))


def _field(random: Random, falls: float, stretch: float = 1.0, angle: float = 0.0) -> Field:
    """Noise whose amplitudes fall with a power of the frequency, [S, S]; stretched, it has strands
    in one direction. Natural pictures fall with about 1 (Field, 1987)."""
    down, across = np.fft.fftfreq(_SIDE)[:, None], np.fft.fftfreq(_SIDE)[None]
    along = across * np.cos(angle) + down * np.sin(angle)
    aside = down * np.cos(angle) - across * np.sin(angle)
    frequency = np.hypot(along * stretch, aside)
    frequency[0, 0] = np.inf
    noise = np.fft.fft2(random.normal(size=(_SIDE, _SIDE)))
    found = np.fft.ifft2(noise / frequency**falls).real
    return np.asarray(found / found.std())


def _coloured(random: Random, field: Field, count: int) -> Field:
    """From one colour to the next by rank."""
    colours = _palette(random, count)
    ranks = np.argsort(np.argsort(field.ravel())) / field.size * (count - 1)
    lower = np.minimum(ranks.astype(int), count - 2)
    share = (ranks - lower)[:, None]
    mixed = (1 - share) * colours[lower] + share * colours[lower + 1]
    return np.asarray(mixed.reshape(*field.shape, 3))


def _light(random: Random) -> Field:
    rows, columns = np.mgrid[-1 : 1 : _SIDE * 1j, -1 : 1 : _SIDE * 1j]
    angle, strength = random.uniform(0, 2 * np.pi), random.uniform(0, 0.5)
    return np.asarray(1 + strength * (columns * np.cos(angle) + rows * np.sin(angle)))[..., None]


def _leaves(random: Random) -> Field:
    """Discs, polygons and lines over each other, their sizes by a power law."""
    colours = _palette(random, int(random.integers(3, 12)))
    picture = Image.new("RGB", (_SIDE, _SIDE))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(random.integers(5, 120))):
        size = min(_SIDE * 0.6, 6 + 8 * random.pareto(1.5))
        x, y = random.uniform(0, _SIDE, 2)
        tint = colours[random.integers(len(colours))] + random.normal(0, 10, 3)
        fill: Any = tuple(int(value) for value in tint.clip(0, 255))
        kind = random.integers(3)
        if kind == 0:
            flat = size * random.uniform(0.3, 1)
            draw.ellipse((x - size, y - flat, x + size, y + flat), fill=fill)
        elif kind == 1:
            angles = np.sort(random.uniform(0, 2 * np.pi, int(random.integers(3, 6))))
            draw.polygon([(x + size * np.cos(a), y + size * np.sin(a)) for a in angles], fill=fill)
        else:
            angle = random.uniform(0, np.pi)
            far_x, far_y = 3 * size * np.cos(angle), 3 * size * np.sin(angle)
            ends = (x - far_x, y - far_y, x + far_x, y + far_y)
            draw.line(ends, fill=fill, width=max(1, round(size / 4)))
    pixels = np.asarray(picture, np.float64)
    if random.random() < 0.6:
        grain = _field(random, random.uniform(0.5, 1.5))
        pixels = pixels * (1 + 0.25 * random.uniform() * grain[..., None])
    return pixels * _light(random)


def _clouds(random: Random) -> Field:
    stretch, angle = float(np.exp(random.uniform(-2.2, 2.2))), random.uniform(0, np.pi)
    field = _field(random, random.uniform(0.6, 2.2), stretch, angle)
    return _coloured(random, field, int(random.integers(2, 6)))


def _fur(random: Random) -> Field:
    """Three regions with strands of their own."""
    regions = np.argmax([_field(random, 2.0) for _ in range(3)], axis=0)
    pixels = np.zeros((_SIDE, _SIDE, 3))
    for region in range(3):
        stretch, angle = float(np.exp(random.uniform(1, 2.5))), random.uniform(0, np.pi)
        strands = _field(random, random.uniform(0.6, 1.5), stretch, angle)
        pixels[regions == region] = _coloured(random, strands, 4)[regions == region]
    return pixels * _light(random)
