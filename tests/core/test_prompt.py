"""Captions: what is written is read back, and nothing else is."""

from __future__ import annotations

import random

import pytest

from dermaflux.errors import RequestError
from dermaflux.prompt import DIAGNOSES, VOCABULARY, Lesion, caption, parse


def some_lesion(chance: random.Random) -> Lesion:
    """A lesion with any of the attributes, label and diagnosis agreeing."""

    def any_of(name: str) -> str | None:
        return chance.choice([None, *VOCABULARY[name]])

    def some_of(name: str) -> tuple[str, ...]:
        words = VOCABULARY[name]
        return tuple(chance.sample(words, chance.randint(0, len(words))))

    diagnosis = any_of("diagnosis")
    implied = DIAGNOSES.get(diagnosis) if diagnosis else None
    return Lesion(
        label=implied or chance.choice(VOCABULARY["label"]),
        diagnosis=diagnosis,
        asymmetry=any_of("asymmetry"),
        border=any_of("border"),
        colors=some_of("colors"),
        size=any_of("size"),
        structures=some_of("structures"),
    )


def test_every_caption_is_read_back():
    chance = random.Random(0)
    for _ in range(2000):
        text = caption(some_lesion(chance))
        lesion = parse(text)
        assert caption(lesion) == text
        assert parse(caption(lesion)) == lesion


def test_attributes_come_back():
    lesion = Lesion(
        "malignant",
        "melanoma",
        "asymmetric",
        "slightly irregular",
        ("light brown", "blue gray"),
        "edge",
        ("pigment network", "streaks"),
    )
    assert parse(caption(lesion)) == lesion


@pytest.mark.parametrize(
    "text",
    [
        "",
        "melanoma of Jane Doe",
        "dermoscopic image of a lesion",
        "dermoscopic image of a benign lesion.",
        "Dermoscopic image of a benign lesion",
        " dermoscopic image of a benign lesion",
        "dermoscopic image of a benign lesion, ",
        "dermoscopic image of a benign lesion, nevus, nevus",
        "dermoscopic image of a benign lesion, small in the field, nevus",
        "dermoscopic image of a benign lesion, black and dark brown",
        "dermoscopic image of a benign lesion, black and black",
        "dermoscopic image of a benign lesion, melanoma",
        "dermoscopic image of a benign lesion, benign lesion",
        "dermoscopic image of a benign lesion, with",
        "dermoscopic image of a benign lesion, Jane Doe",
        "dermoscopic image of a benign lesion,nevus",
        "dermoscopic image of a benign lesion\n",
    ],
)
def test_what_is_no_caption_is_refused_with_an_example(text):
    with pytest.raises(RequestError, match="write for example 'dermoscopic image of a") as told:
        parse(text)
    assert told.value.field == "prompt"
    assert "Jane" not in str(told.value)


def test_a_caption_with_any_letter_changed_is_another_or_none():
    text = caption(Lesion("malignant", "melanoma", colors=("black",), size="small"))
    for place in range(len(text)):
        changed = f"{text[:place]}#{text[place + 1 :]}"
        with pytest.raises(RequestError):
            parse(changed)
