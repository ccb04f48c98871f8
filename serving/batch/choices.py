"""What a plan says of one attribute: a word, or words with weights -> values with weights.

One form for all attributes. Several words of `colors` and `structures` are joined as captions join
them, or are a list; ages are years or ranges of them; `null` leaves the attribute out.

    size: small                                       # all
    size: {small: 1, medium: 2, null: 1}              # a quarter, half, and a quarter without
    colors: {dark brown: 2, dark brown and black: 1}
    colors: [dark brown, black]                       # all: both words
    colors: [[dark brown], [dark brown, black]]       # either list, equally often
    age: {20-39: 1, 40-69: 2}                         # [20, 39] is 20-39 too

    >>> choice("groups[0].size", "size", {"small": 1, None: 3})
    (('small', Fraction(1, 1)), (None, Fraction(3, 1)))
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final, NoReturn, TypeAlias

from dermaflux.dataset import SEXES
from dermaflux.errors import DatasetError
from dermaflux.prompt import VOCABULARY
from serving.batch.documents import written

LISTS: Final = ("colors", "structures")
OLDEST: Final = 130
"""Years, as `dermaflux.dataset.Record` has it."""
MAX_WHY: Final = 400
"""Characters of a sentence: a value that is quoted may fill the whole file."""
_RANGE: Final = re.compile(r"([0-9]{1,3})\s*-\s*([0-9]{1,3})")

Value: TypeAlias = str | tuple[str, ...] | range | None
"""A word; words, in the vocabulary's order; years of age; or nothing (() of a list)."""
Choice: TypeAlias = tuple[tuple[Value, Fraction], ...]


def choice(where: str, name: str, given: object) -> Choice:
    """The values that an attribute may have, with weights above 0.

    Raises:
        DatasetError: what is given is not of the form above; it begins with `where`.
    """
    if isinstance(given, Mapping):
        if not given:
            refuse(where, "is empty; give a word, or words with weights")
        pairs = [
            (_value(where, name, key), weight(f"{where}.{'null' if key is None else key}", one))
            for key, one in given.items()
        ]
    elif name in LISTS and isinstance(given, list) and any(isinstance(one, list) for one in given):
        if not all(isinstance(one, list) for one in given):
            refuse(where, "mixes words and lists; write [[dark brown], [dark brown, black]]")
        pairs = [(_value(where, name, one), Fraction(1)) for one in given]
    else:
        pairs = [(_value(where, name, given), Fraction(1))]
    values = [value for value, _ in pairs]
    if len(set(values)) != len(values):
        twice = next(value for value in values if values.count(value) > 1)
        refuse(where, f"has {shown(twice)!r} twice; keep one")
    if not sum(share for _, share in pairs):
        refuse(where, "has weights that are all 0; one at least must be above 0")
    return tuple((value, share) for value, share in pairs if share)


def weight(where: str, given: object) -> Fraction:
    """A number from 0 on, exactly as it was written: 0.1 is a tenth.

    Raises:
        DatasetError: it is another value, or not finite.
    """
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or (isinstance(given, float) and not math.isfinite(given)) or given < 0:  # type: ignore[operator]
        refuse(where, f"{written(given)} is no weight; use a number from 0 on")
    return Fraction(str(given))


def shown(value: Value) -> str | None:
    """A value as a plan writes it; None where the attribute is left out."""
    if isinstance(value, tuple):
        return " and ".join(value) or None
    if isinstance(value, range):
        return f"{value[0]}-{value[-1]}" if len(value) > 1 else str(value[0])
    return value


def _value(where: str, name: str, given: Any) -> Value:
    if given is None:
        return () if name in LISTS else None
    if name == "age":
        return _years(where, given)
    if name in LISTS:
        words = given.split(" and ") if isinstance(given, str) else given
        if not isinstance(words, list):
            refuse(where, f"needs words, not {written(given)}")
        known = [_word(where, name, word) for word in words]
        if len(set(known)) != len(known):
            refuse(where, f"{written(given)} names a word twice")
        return tuple(word for word in VOCABULARY[name] if word in known)
    if isinstance(given, list):
        refuse(where, "needs one word, or words with weights: {word: 1, another: 1}")
    return _word(where, name, given)


def _word(where: str, name: str, given: object) -> str:
    if not isinstance(given, str):
        why = "put a word that YAML misreads in quotes"
        refuse(where, f"needs a word, not {written(given)}; {why}")
    known = SEXES if name == "sex" else VOCABULARY.get(name)
    if known is not None and given not in known:
        refuse(where, f"{written(given)} is not known; use {', '.join(known)}")
    if known is None and (not given.strip() or not given.isprintable()):
        refuse(where, f"{written(given)} is no plain text")
    return given


def _years(where: str, given: object) -> range:
    low: object = given
    high: object = given
    if isinstance(given, list) and len(given) == 2:
        low, high = given
    elif isinstance(given, str) and (match := _RANGE.fullmatch(given.strip())):
        low, high = int(match[1]), int(match[2])
    if type(low) is not int or type(high) is not int or not 0 <= low <= high <= OLDEST:
        why = f"is no age; use whole years such as 45, or 20-39, up to {OLDEST}"
        refuse(where, f"{written(given)} {why}")
    return range(low, high + 1)


def refuse(where: str, why: str) -> NoReturn:
    """Raise `DatasetError` of a key's path and a sentence, which may quote no end of text."""
    raise DatasetError(f"{where}: {why if len(why) <= MAX_WHY else why[: MAX_WHY - 3] + '...'}")
