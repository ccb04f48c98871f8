"""One image asked for: `Request`, and the check that turns a caller's values into one.

>>> validate(defaults, limits, spec, "dermoscopic image of a benign lesion", seed=7)
Request(prompt='dermoscopic image of a benign lesion', seed=7, steps=20, ...)
"""

from __future__ import annotations

import math
import operator
import secrets
import unicodedata
from dataclasses import dataclass
from typing import Final

from dermaflux.bundle import Defaults, Limits, ModelSpec
from dermaflux.errors import RequestError
from dermaflux.flow import MAX_SEED

MAX_PROMPT: Final = 2000
"""Characters. A bundle reads 64 to 512 tokens, so what is longer is a mistake or an attack."""
MAX_GUIDANCE: Final = 30.0
"""Flux was distilled with guidance of 1 to about 10; three times that is still a sane try."""


@dataclass(frozen=True)
class Request:
    """One image, whole: no field is left to a default, so it can be repeated from its record."""

    prompt: str
    seed: int
    steps: int
    guidance: float | None
    height: int
    width: int


def validate(
    defaults: Defaults,
    limits: Limits,
    model: ModelSpec,
    prompt: str,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Request:
    """A request with the bundle's defaults where nothing was said, and a random seed.

    Raises:
        RequestError: the field, the value found and the value needed.
    """
    return Request(
        prompt=_prompt(prompt),
        seed=secrets.randbelow(MAX_SEED + 1)
        if seed is None
        else _integer("seed", seed, 0, MAX_SEED),
        steps=defaults.steps if steps is None else _integer("steps", steps, 1, limits.max_steps),
        guidance=_guidance(model, defaults, guidance),
        height=defaults.height if height is None else _size("height", height, limits),
        width=defaults.width if width is None else _size("width", width, limits),
    )


def _prompt(prompt: str) -> str:
    if not isinstance(prompt, str):
        raise RequestError("prompt", f"needs a text, not {prompt!r}")
    if not prompt.strip():
        raise RequestError("prompt", "is empty; describe a lesion")
    if len(prompt) > MAX_PROMPT:
        raise RequestError("prompt", f"has {len(prompt)} characters; use at most {MAX_PROMPT}")
    for position, character in enumerate(prompt):
        # Cc are control characters, Cs halves of surrogate pairs, which no UTF-8 can hold.
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise RequestError(
                "prompt",
                f"has the control character U+{ord(character):04X} at position {position}; "
                "write one line of plain text",
            )
    return prompt


def _integer(field: str, value: int, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise RequestError(field, f"needs an integer, not {value!r}")
    if not low <= number <= high:
        raise RequestError(field, f"{number} is out of range; use {low} to {high}")
    return number


def _size(field: str, value: int, limits: Limits) -> int:
    size = _integer(field, value, limits.min_size, limits.max_size)
    if size % limits.size_multiple:
        raise RequestError(
            field, f"{size} is not a multiple of {limits.size_multiple}, which the model needs"
        )
    return size


def _guidance(model: ModelSpec, defaults: Defaults, value: float | None) -> float | None:
    if value is None:
        return defaults.guidance
    if not model.guidance_embeds:
        raise RequestError("guidance", f"{value!r} cannot be used: this model takes no guidance")
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0.0 <= number <= MAX_GUIDANCE:
        raise RequestError("guidance", f"{value!r} is out of range; use 0 to {MAX_GUIDANCE:g}")
    return number
