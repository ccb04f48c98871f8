"""A file of requests, a JSON object a line -> the pictures of a job, and the lines that are wrong.

    {"lesion": {"label": "malignant", "diagnosis": "melanoma", "size": "large"}}
    {"id": "case-7", "prompt": "close-up of a mole on a back", "label": "benign", "seed": 7}

A line has a `lesion`, or a `prompt` with the words of a lesion (`label` at least) beside it, or
both: then the prompt is drawn instead of the lesion's caption. `id`, `seed`, `steps`, `guidance`,
`width`, `height` and, for the dataset alone, `skin_type`, `sex`, `age`, `site` may stand beside
them. A wrong line costs no other line its picture, and mending it changes no other: names and
seeds come from a line's place among all that are not blank.

    >>> items, bad = read(Path("requests.jsonl"), Bundle.open("bundles/mini"), run=0)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from dermaflux.bundle import Bundle
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError, RequestError
from dermaflux.prompt import VOCABULARY, WORDING, Lesion, caption
from dermaflux.request import Request, validate
from serving.batch.documents import written
from serving.batch.items import Bad, Item, default_name, item_seed, named
from serving.batch.jsonlines import lines, parsed, plain

SETTINGS: Final = ("steps", "guidance", "width", "height")
"""Keys of a line that `dermaflux.request.validate` checks, beside `prompt` and `seed`."""
DETAILS: Final = ("skin_type", "sex", "age", "site")
"""Keys of a line that only the dataset repeats; by themselves they draw nothing."""
KEYS: Final = ("id", "lesion", "prompt", "seed", *SETTINGS, *VOCABULARY, *DETAILS)


def read(file: Path, bundle: Bundle, run: int) -> tuple[list[Item], list[Bad]]:
    """The pictures that a file asks for, and its bad lines, both in the file's order.

    `run` is the job's seed: a picture that was given no seed takes its own from it and from its
    name. `Item.index` counts the lines that are not blank, bad ones too, so it may have gaps.

    Raises:
        DatasetError: the file cannot be read, is not UTF-8, is empty, or all its lines are bad.
    """
    wanted = _Wanted(bundle, run)
    for number, text in lines(file):
        wanted.add(number, text)
    items, bad = wanted.settled()
    if items:
        return items, bad
    if not bad:
        example = '{"lesion": {"label": "benign"}}'
        raise DatasetError(f"{file} is empty; write a JSON object a line, such as {example}")
    reasons = "; ".join(f"line {one.line}: {one.reason}" for one in bad[:3])
    raise DatasetError(f"{file} asks for no picture, its {len(bad)} lines are bad: {reasons}")


def require_wording(bundle: Bundle) -> None:
    """Check that a bundle's generator was trained on the captions that are written here.

    Raises:
        RequestError: it was trained on others.
    """
    if bundle.wording != WORDING:
        raise RequestError(
            "lesion",
            f"cannot be put in words: the bundle {bundle.path} knows captions of wording "
            f"{bundle.wording!r}, this version writes {WORDING!r}; give a prompt",
        )


@dataclass
class _Wanted:
    """What has been read of a file: every line is settled alone, and names when all are known."""

    bundle: Bundle
    run: int
    items: list[tuple[int, Item]] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    places: int = 0
    # Ids in lower case -> their line: some disks do not tell A.png from a.png.
    ids: dict[str, int] = field(default_factory=dict)
    # Lines repeat each other: what was checked once is shared, for time and for memory.
    captions: dict[Lesion, tuple[Lesion, str]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, number: int, text: str | None) -> None:
        index = self.places
        self.places += 1
        try:
            self.items.append((number, self._item(number, index, text)))
        except (ValueError, DatasetError) as error:
            self.bad.append(Bad(number, plain(str(error))))
        except RecursionError:
            self.bad.append(Bad(number, "lists and objects lie in each other too deeply"))

    def settled(self) -> tuple[list[Item], list[Bad]]:
        """Ids hold: a line without one is bad where its place's name is the id of another line."""
        items, bad = [], list(self.bad)
        for number, item in self.items:
            owner = self.ids.get(item.name.lower(), number)
            if owner == number:
                items.append(item)
                continue
            reason = (
                f"has no id, and the name that its place gives it, {item.name}, is the id of line "
                f"{owner}; give it an id"
            )
            bad.append(Bad(number, reason))
        return items, sorted(bad, key=lambda one: one.line)

    def _item(self, number: int, index: int, text: str | None) -> Item:
        row = parsed(text)
        # First of all: a line keeps its id from others also while something else in it is wrong.
        name = self._name(number, index, row.pop("id", None))
        for key in row:
            if key not in KEYS:
                raise ValueError(f"{key!r} is not known; use {', '.join(KEYS)}")
        given = {key: value for key, value in row.items() if value is not None}
        lesion = self._lesion(given)
        seed = given.get("seed")
        request = self._validated(
            "-",
            seed=item_seed(self.run, name) if seed is None else seed,
            **{key: given.get(key) for key in SETTINGS},
        )
        request = replace(request, prompt=self._prompt(given, lesion))
        more = self._details({name: given[name] for name in DETAILS if name in given}, lesion)
        return Item(name, index, lesion, request, more, fixed=seed is not None)

    def _validated(self, prompt: Any, **values: Any) -> Request:
        bundle = self.bundle
        return validate(bundle.defaults, bundle.limits, bundle.model, prompt, **values)

    def _name(self, number: int, index: int, name: object) -> str:
        if name is None:
            return default_name(index)
        own = named(name)
        first = self.ids.setdefault(own.lower(), number)
        if first != number:
            raise ValueError(f"id {own!r} is that of line {first} (capitals aside); use another")
        return own

    def _lesion(self, given: Mapping[str, Any]) -> Lesion:
        words = {key: given[key] for key in VOCABULARY if key in given}
        if "lesion" in given:
            lesion = Lesion.from_mapping(_merged(given["lesion"], words))
        elif "prompt" not in given:
            raise ValueError("has neither lesion nor prompt; give one of them")
        elif not words.keys() & {"label", "diagnosis"}:
            raise ValueError(
                "has a prompt and no label, which a dataset needs; add label, benign or malignant"
            )
        else:
            try:
                lesion = Lesion.from_mapping(words)
            except RequestError as error:
                # The words stand in the line itself here.
                raise ValueError(str(error).removeprefix("lesion.")) from None
        if lesion not in self.captions:
            self.captions[lesion] = (lesion, caption(lesion))
        return self.captions[lesion][0]

    def _prompt(self, given: Mapping[str, Any], lesion: Lesion) -> str:
        if "prompt" not in given:
            require_wording(self.bundle)
            return self.captions[lesion][1]
        prompt = given["prompt"]
        if not isinstance(prompt, str) or prompt not in self.prompts:
            checked = self._validated(prompt, seed=0).prompt
            self.prompts[checked] = checked
        return self.prompts[prompt]

    def _details(self, given: Mapping[str, Any], lesion: Lesion) -> dict[str, Any]:
        # By their spelling: to Python 1, 1.0 and True are one key.
        spelt = repr(given)
        if spelt not in self.details:
            Record(file_name="-", label=str(lesion.label), **given)
            self.details[spelt] = dict(given)
        return self.details[spelt]


def _merged(lesion: object, words: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a lesion and those beside it, which may not contradict each other."""
    if not isinstance(lesion, Mapping):
        raise ValueError(f"lesion needs an object, not {written(lesion)}")
    for key, value in words.items():
        inner = lesion.get(key)
        if inner is not None and not _same(inner, value):
            raise ValueError(
                f"{key} is {written(value)}, but lesion.{key} is {written(inner)}; keep one"
            )
    return {**words, **{key: value for key, value in lesion.items() if value is not None}}


def _same(one: object, other: object) -> bool:
    """Do two values of an attribute name the same? Words come in any order."""
    if isinstance(one, list) and isinstance(other, list):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    return one == other
