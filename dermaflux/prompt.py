"""Lesion attributes -> caption: one wording for training captions and for requests.

A generator obeys best when it is asked in the words it was trained on, so the wording lives here
alone, in the core, and its version travels in `bundle.json`. The attributes are the paper's
A, B and C (asymmetry, border, colour) with size in the field and dermoscopic structures added
(ISIC 2017 task 2); "size" is relative to the field of view, since most public collections give
no millimetres.

    >>> caption(Lesion(label="malignant", diagnosis="melanoma", colors=("dark brown", "black")))
    'dermoscopic image of a malignant lesion, melanoma, dark brown and black'
    >>> parse("dermoscopic image of a benign lesion, nevus, small in the field").size
    'small'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

from dermaflux.errors import RequestError

WORDING: Final = "dermaflux-1"
"""Version of the wording; a bundle trained on another wording says so in `bundle.json`."""

LABELS: Final = ("benign", "malignant")

DIAGNOSES: Final[Mapping[str, str | None]] = {
    "nevus": "benign",
    "seborrheic keratosis": "benign",
    "benign lesion": "benign",
    "dermatofibroma": "benign",
    "solar lentigo": "benign",
    "vascular lesion": "benign",
    "melanoma": "malignant",
    "basal cell carcinoma": "malignant",
    "squamous cell carcinoma": "malignant",
    # Collections disagree on actinic keratosis, so it goes with either label.
    "actinic keratosis": None,
}
"""Diagnosis -> the label it implies, or None where collections disagree."""

ASYMMETRIES: Final = ("symmetric", "slightly asymmetric", "asymmetric")
BORDERS: Final = ("regular", "slightly irregular", "irregular")
COLORS: Final = ("skin-coloured", "light brown", "dark brown", "reddish", "blue gray", "black")
SIZES: Final[Mapping[str, str]] = {
    "small": "small in the field",
    "medium": "medium in the field",
    "large": "large in the field",
    "edge": "reaching the image edge",
}
"""Size word -> its phrase in the caption."""

STRUCTURES: Final = (
    "pigment network",
    "negative network",
    "streaks",
    "milia-like cysts",
    "globules",
)

VOCABULARY: Final[Mapping[str, tuple[str, ...]]] = {
    "label": LABELS,
    "diagnosis": tuple(DIAGNOSES),
    "asymmetry": ASYMMETRIES,
    "border": BORDERS,
    "colors": COLORS,
    "size": tuple(SIZES),
    "structures": STRUCTURES,
}
"""Every attribute and its words, in caption order."""


@dataclass(frozen=True)
class Lesion:
    """What to draw. Every field but `label` may be left out; words come from `VOCABULARY`.

    `label` may be left out where `diagnosis` implies it.

    Raises:
        RequestError: a word is not in the vocabulary, a list repeats itself, the label is
            missing, or label and diagnosis contradict each other. `field` is `lesion.<name>`.
    """

    label: str | None = None
    diagnosis: str | None = None
    asymmetry: str | None = None
    border: str | None = None
    colors: tuple[str, ...] = ()
    size: str | None = None
    structures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, words in VOCABULARY.items():
            value = getattr(self, name)
            for word in value if isinstance(value, tuple) else (value,):
                if word is not None and word not in words:
                    raise RequestError(
                        f"lesion.{name}", f"{word!r} is not known; use one of: {', '.join(words)}"
                    )
            if isinstance(value, tuple) and len(set(value)) != len(value):
                raise RequestError(f"lesion.{name}", f"{list(value)} names a word twice")
        implied = DIAGNOSES.get(self.diagnosis) if self.diagnosis else None
        if self.label is None:
            if implied is None:
                raise RequestError(
                    "lesion.label", "is missing; use 'benign' or 'malignant', or give a diagnosis"
                )
            object.__setattr__(self, "label", implied)
        elif implied is not None and implied != self.label:
            raise RequestError(
                "lesion.diagnosis",
                f"{self.diagnosis!r} is {implied}, but label is {self.label!r}; change one of them",
            )

    @classmethod
    def from_mapping(cls, attributes: Mapping[str, object]) -> Lesion:
        """Read a JSON object: strings, or lists of strings for `colors` and `structures`.

        Raises:
            RequestError: an unknown attribute, a value of another type, or what `Lesion` refuses.
        """
        known: dict[str, str | tuple[str, ...]] = {}
        plural = {field.name for field in fields(cls) if field.default == ()}
        for name, value in attributes.items():
            if name not in VOCABULARY:
                raise RequestError(
                    f"lesion.{name}", f"is not an attribute; use {', '.join(VOCABULARY)}"
                )
            if value is None:
                continue
            if name in plural:
                if (
                    isinstance(value, str)
                    or not isinstance(value, Sequence)
                    or not all(isinstance(word, str) for word in value)
                ):
                    raise RequestError(f"lesion.{name}", f"needs a list of words, not {value!r}")
                known[name] = tuple(value)
            elif isinstance(value, str):
                known[name] = value
            else:
                raise RequestError(f"lesion.{name}", f"needs a word, not {value!r}")
        return cls(**known)  # type: ignore[arg-type]


def caption(lesion: Lesion) -> str:
    """The caption of a lesion, in wording `WORDING`; at most 60 words, ASCII, no final stop.

    Words of `colors` and `structures` come in the vocabulary's order, whatever the order asked
    for, so that one lesion has one caption.
    """
    parts = [f"dermoscopic image of a {lesion.label} lesion"]
    if lesion.diagnosis and lesion.diagnosis != "benign lesion":
        parts.append(lesion.diagnosis)
    if lesion.asymmetry:
        parts.append(lesion.asymmetry)
    if lesion.border:
        parts.append(f"{lesion.border} border")
    if lesion.colors:
        parts.append(" and ".join(word for word in COLORS if word in lesion.colors))
    if lesion.size:
        parts.append(SIZES[lesion.size])
    if lesion.structures:
        parts.append(
            "with " + " and ".join(word for word in STRUCTURES if word in lesion.structures)
        )
    return ", ".join(parts)


def parse(text: str) -> Lesion:
    """The lesion that a caption describes: the inverse of `caption`, and as exact.

    `caption(parse(text)) == text` for every text that is taken, so nothing but words of the
    vocabulary can be in one: no name, no number, no sentence of a caller's own.

    Raises:
        RequestError: the text is not one that `caption` writes; the field is `prompt`, and the
            message shows the part that is not, where there is one, and an example.
    """
    first, *rest = text.split(", ")
    known: dict[str, str | tuple[str, ...]] = {}
    label = first.removeprefix("dermoscopic image of a ").removesuffix(" lesion")
    if label not in LABELS:
        raise _no_caption("it does not begin as one")
    known["label"] = label
    places = list(_READ)
    for number, part in enumerate(rest, start=2):
        while places:
            name, words = places.pop(0)
            if part in words:
                known[name] = words[part]
                break
        else:
            raise _no_caption(f"part {number} is none of its words, or not in its place")
    try:
        lesion = Lesion(**known)  # type: ignore[arg-type]
    except RequestError as error:
        raise _no_caption(str(error)) from None
    if caption(lesion) != text:
        raise _no_caption("it is written another way")
    return lesion


def _no_caption(why: str) -> RequestError:
    example = Lesion("malignant", "melanoma", border="irregular", colors=("dark brown", "black"))
    return RequestError(
        "prompt", f"is no caption of a lesion: {why}; write for example {caption(example)!r}"
    )


def _subsets(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Every non-empty choice of words, in their order, by how a caption joins them."""
    count = len(words)
    chosen = (
        tuple(word for place, word in enumerate(words) if mask >> place & 1)
        for mask in range(1, 1 << count)
    )
    return {" and ".join(some): some for some in chosen}


_READ: Final[Sequence[tuple[str, Mapping[str, str | tuple[str, ...]]]]] = (
    ("diagnosis", {word: word for word in DIAGNOSES if word != "benign lesion"}),
    ("asymmetry", {word: word for word in ASYMMETRIES}),
    ("border", {f"{word} border": word for word in BORDERS}),
    ("colors", _subsets(COLORS)),
    ("size", {phrase: word for word, phrase in SIZES.items()}),
    ("structures", {f"with {words}": some for words, some in _subsets(STRUCTURES).items()}),
)
"""Attribute and what its part of a caption can be, in caption order: 113 short texts in all."""
