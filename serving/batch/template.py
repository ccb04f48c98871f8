"""How a plan puts a picture in words: a prompt with places for the words drawn.

    >>> prompt = Template("{caption}[, on the {site}], Fitzpatrick skin type {skin_type}")
    >>> prompt.fill({"caption": "dermoscopic image of a benign lesion", "skin_type": "V-VI"})
    'dermoscopic image of a benign lesion, Fitzpatrick skin type V-VI'

A part in square brackets is left out where a word that it names is. Doubled brackets of either
kind stand for one of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from dermaflux.prompt import VOCABULARY
from serving.batch.requests import DETAILS

FIELDS: Final = ("caption", *VOCABULARY, *DETAILS)
"""What a template may name."""
_TOKEN: Final = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{[^{}]*\}|[{}\[\]]|[^{}\[\]]+")


@dataclass(frozen=True)
class Template:
    """A template, taken apart: `required` are the fields outside of square brackets.

    Raises:
        ValueError: a field is not known, a bracket has no other half, or square ones name no field.
    """

    text: str
    required: frozenset[str] = field(init=False)
    optional: frozenset[str] = field(init=False)
    # (in brackets?, pieces); a piece is a literal text, or (a field,).
    _parts: tuple[tuple[bool, tuple[str | tuple[str], ...]], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts: list[tuple[bool, tuple[str | tuple[str], ...]]] = []
        pieces: list[str | tuple[str]] = []
        inside = False
        for token in _TOKEN.findall(self.text):
            if token in ("[", "]"):
                if inside == (token == "["):
                    raise ValueError(f"{self.text!r} has a {token} without its other half")
                if inside and all(isinstance(piece, str) for piece in pieces):
                    shown = "".join(map(str, pieces))
                    raise ValueError(
                        f"[{shown}] names no word that can be left out; for square brackets "
                        f"themselves write [[{shown}]]"
                    )
                parts.append((inside, tuple(pieces)))
                pieces, inside = [], not inside
            elif token in ("{", "}"):
                raise ValueError(f"{self.text!r} has a {token} without its other half")
            elif token in ("{{", "}}", "[[", "]]"):
                pieces.append(token[0])
            elif token[0] == "{":
                pieces.append((_known(token[1:-1]),))
            else:
                pieces.append(token)
        if inside:
            raise ValueError(f"{self.text!r} has a [ without its other half")
        parts.append((False, tuple(pieces)))
        object.__setattr__(self, "_parts", tuple(parts))
        object.__setattr__(self, "required", self._fields(False))
        object.__setattr__(self, "optional", self._fields(True) - self.required)

    @property
    def fields(self) -> frozenset[str]:
        """All that it names."""
        return self.required | self.optional

    def fill(self, values: Mapping[str, str]) -> str:
        """The prompt of a picture; `values` lacks what is left out, but nothing `required`."""
        text = []
        for optional, pieces in self._parts:
            if optional and any(isinstance(p, tuple) and p[0] not in values for p in pieces):
                continue
            text += [piece if isinstance(piece, str) else values[piece[0]] for piece in pieces]
        return "".join(text)

    def _fields(self, inside: bool) -> frozenset[str]:
        found = [pieces for optional, pieces in self._parts if optional == inside]
        return frozenset(
            piece[0] for pieces in found for piece in pieces if not isinstance(piece, str)
        )


def _known(name: str) -> str:
    if name not in FIELDS:
        raise ValueError(f"names {{{name}}}, which is not known; use one of {', '.join(FIELDS)}")
    return name
