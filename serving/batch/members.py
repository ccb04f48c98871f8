"""A group of a plan -> its pictures: words are counted out, shuffled, put in a prompt.

>>> lesion, request, more = next(members(group, bundle, seed="0/0"))
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from dermaflux.bundle import Bundle
from dermaflux.errors import DatasetError, RequestError
from dermaflux.prompt import VOCABULARY, Lesion, caption
from dermaflux.request import Request, validate
from serving.batch import quotas
from serving.batch.choices import Choice
from serving.batch.groups import ATTRIBUTES, Group, has
from serving.batch.requests import DETAILS

Words = dict[str, Any]
"""The attributes of a picture, without those that it has not."""


def members(
    group: Group, bundle: Bundle, seed: str
) -> Iterator[tuple[Lesion, Request, dict[str, Any]]]:
    """A group's pictures in an order that `seed` decides: what to draw, and further keys.

    Seeds of the requests are 0: they belong to names, which a place in the job gives.

    Raises:
        DatasetError: a prompt is too long, or has a control character that a record brought.
    """
    columns = {
        name: _column(of, group.size, f"{seed}/{name}") for name, of in group.choices.items()
    }
    rows = _records(group, seed) if group.records else [{}] * group.size
    lesions: dict[tuple[Any, ...], Lesion] = {}
    requests: dict[str, Request] = {}
    for number, row in enumerate(rows):
        words: Words = row | {name: column[number] for name, column in columns.items()}
        asked = tuple(words.get(name) or None for name in VOCABULARY)
        if asked not in lesions:
            found = {n: v for n, v in zip(VOCABULARY, asked, strict=True) if v}
            lesions[asked] = Lesion(**found)
        lesion = lesions[asked]
        more = {name: words[name] for name in DETAILS if words.get(name) not in (None, "")}
        if group.records and "skin_type" not in group.template.fields:
            # Nobody asked for it, and it would be a label of skin that was not drawn.
            more.pop("skin_type", None)
        prompt = group.template.fill(_texts(lesion, more))
        if prompt not in requests:
            try:
                requests[prompt] = validate(
                    bundle.defaults, bundle.limits, bundle.model, prompt, 0, **group.settings
                )
            except RequestError as error:
                raise DatasetError(f"{group.where}: {error}: {prompt[:100]!r}") from error
        yield lesion, requests[prompt], more


def _column(of: Choice, size: int, seed: str) -> list[Any]:
    """An attribute's values over a group; the years of a range of ages evenly."""
    column: list[Any] = [None] * size
    places = quotas.laid([share for _, share in of], size, seed)
    for place, (value, _) in enumerate(of):
        members = (places == place).nonzero()[0]
        if isinstance(value, range):
            years = quotas.laid([Fraction(1)] * len(value), len(members), f"{seed}/{place}")
            for member, year in zip(members, years, strict=True):
                column[member] = value[int(year)]
        else:
            for member in members:
                column[member] = value
    return column


def _records(group: Group, seed: str) -> list[Words]:
    """What records say of a group's pictures: each record as often as any other, to within one.

    Sorted by label and diagnosis before, so that these have their shares to within one too.
    """
    ranks = quotas.order(len(group.records), f"{seed}/records").argsort()
    around = sorted(
        range(len(ranks)),
        key=lambda i: (group.records[i].label, group.records[i].diagnosis or "", ranks[i]),
    )
    taken = quotas.spread(len(around), group.size, f"{seed}/start")
    taken = taken[quotas.order(group.size, f"{seed}/like")]
    rows = [
        {name: getattr(record, name) for name in ATTRIBUTES if has(record, name)}
        for record in group.records
    ]
    return [rows[around[int(place)]] for place in taken]


def _texts(lesion: Lesion, more: Words) -> dict[str, str]:
    """The words of a picture as templates write them."""
    texts = {"caption": caption(lesion)}
    for name, words in VOCABULARY.items():
        value = getattr(lesion, name)
        if isinstance(value, tuple) and value:
            texts[name] = " and ".join(word for word in words if word in value)
        elif value:
            texts[name] = value
    return texts | {n: f"{v:g}" if n == "age" else str(v) for n, v in more.items()}
