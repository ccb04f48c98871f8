"""Requests: what is out of range is refused with its field, and nothing else is changed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dermaflux.bundle import Defaults, Limits, ModelSpec
from dermaflux.errors import RequestError
from dermaflux.request import MAX_PROMPT, validate

MODEL = ModelSpec(16, 8, 0.5, 0.1, 16, 12, guidance_embeds=True)
RULES = (Defaults(4, 3.5, 64, 96), Limits(32, 128, 16, 20, 8), MODEL)


def test_defaults_fill_what_is_left_out():
    request = validate(*RULES, "a lesion")
    assert (request.steps, request.guidance, request.height, request.width) == (4, 3.5, 64, 96)
    assert request.seed != validate(*RULES, "a lesion").seed


def test_what_is_given_is_kept():
    prompt = "  lésion 皮膚 🩺  "
    request = validate(*RULES, prompt, 2**53 - 1, np.int64(20), 0, 32, 128)
    assert request.prompt == prompt
    assert request.seed == 2**53 - 1
    assert (request.steps, request.guidance, request.height, request.width) == (20, 0.0, 32, 128)
    assert type(request.steps) is int


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_a_model_without_guidance_takes_none(guidance):
    plain = ModelSpec(16, 8, 0.5, 0.1, 16, 12, guidance_embeds=False)
    rules = (Defaults(4, None, 64, 64), RULES[1], plain)
    if guidance is None:
        assert validate(*rules, "a lesion").guidance is None
    else:
        with pytest.raises(RequestError, match="takes no guidance"):
            validate(*rules, "a lesion", guidance=guidance)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**53),
        ("seed", 1.0),
        ("seed", "7"),
        ("steps", 0),
        ("steps", 21),
        ("steps", True),
        ("guidance", math.nan),
        ("guidance", math.inf),
        ("guidance", -0.1),
        ("guidance", 31),
        ("guidance", "3"),
        ("guidance", 10**400),
        ("guidance", True),
        ("height", 16),
        ("height", 144),
        ("height", 65),
        ("width", 0),
        ("width", math.nan),
        ("prompt", ""),
        ("prompt", " \u3000 "),
        ("prompt", "a" * (MAX_PROMPT + 1)),
        ("prompt", "a\x00b"),
        ("prompt", "a\nb"),
        ("prompt", "a\x7f"),
        ("prompt", "half \ud83e of a pair"),
        ("prompt", 7),
    ],
)
def test_what_cannot_be_is_refused_by_field(field, value):
    values = {"prompt": "a lesion", field: value}
    with pytest.raises(RequestError) as refusal:
        validate(*RULES, **values)
    assert refusal.value.field == field
    assert str(refusal.value).startswith(f"{field}: ")


def test_the_longest_prompt_is_taken():
    assert validate(*RULES, "a" * MAX_PROMPT).prompt == "a" * MAX_PROMPT
