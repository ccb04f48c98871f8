"""A plan's content -> its groups, checked: sizes, choices of attributes, prompts and settings.

Contradictions are found here, before anything is drawn: every combination that a group could come
to is one that `dermaflux.prompt.Lesion` takes.

    >>> groups(Path("plan.yaml"), documents.read(Path("plan.yaml")), bundle)[0].size
    2000
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from dermaflux import dataset
from dermaflux.bundle import Bundle
from dermaflux.dataset import SPLITS, Record
from dermaflux.errors import DatasetError, RequestError
from dermaflux.prompt import DIAGNOSES, VOCABULARY
from dermaflux.request import validate
from serving.batch.choices import Choice, choice, refuse
from serving.batch.documents import written
from serving.batch.requests import DETAILS, SETTINGS, require_wording
from serving.batch.sizes import sizes
from serving.batch.template import Template

ATTRIBUTES: Final = (*VOCABULARY, *DETAILS)
SHARED: Final = ("prompt", *SETTINGS)
"""Keys that a plan may say once, for all groups that do not say otherwise."""
PLAN: Final = ("total", "groups", *SHARED)
GROUP: Final = ("count", "share", "like", "split", *ATTRIBUTES, *SHARED)


@dataclass(frozen=True)
class Group:
    """Pictures asked for alike. `where` is its place, for messages.

    `choices` has what the plan says of attributes. `records` are those of a dataset that all other
    attributes are drawn from; empty where the group has no `like`.
    """

    where: str
    size: int
    choices: Mapping[str, Choice]
    records: tuple[Record, ...]
    template: Template
    settings: Mapping[str, Any]

    @property
    def silent(self) -> tuple[str, ...]:
        """Attributes that are asked for and that the prompt does not tell the generator."""
        told = set(self.template.fields)
        told |= set(VOCABULARY) if "caption" in told else {"label"}
        asked = {name for name, of in self.choices.items() if any(value for value, _ in of)}
        asked |= {name for name in ATTRIBUTES for record in self.records if has(record, name)}
        return tuple(n for n in ATTRIBUTES if n in asked - told and n != "skin_type")


def has(record: Record, name: str) -> bool:
    """Does a record say anything of an attribute? An age of 0 is one."""
    return getattr(record, name) not in (None, "", ())


def groups(file: Path, plan: object, bundle: Bundle) -> list[Group]:
    """The groups of a plan that was read from `file`, beside which `like` names datasets.

    Raises:
        DatasetError: a key or a value is wrong; it begins with the file and the key's path.
    """
    if not isinstance(plan, Mapping):
        refuse(str(file), f"needs a mapping with groups, not {written(plan)}")
    _check_keys(str(file), plan, PLAN)
    listed = plan.get("groups")
    if not isinstance(listed, list) or not listed:
        refuse(f"{file}: groups", "needs a list of groups, one at least")
    for number, one in enumerate(listed):
        where = f"{file}: groups[{number}]"
        if not isinstance(one, Mapping):
            example = "{count: 10, label: benign}"
            refuse(where, f"needs a mapping such as {example}, not {written(one)}")
        _check_keys(where, one, GROUP)
    numbers = sizes(file, plan.get("total"), listed)
    datasets: dict[Path, list[Record]] = {}
    return [
        _group(file, f"groups[{number}]", plan, one, size, bundle, datasets)
        for number, (one, size) in enumerate(zip(listed, numbers, strict=True))
    ]


def _check_keys(where: str, given: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            refuse(where, f"{written(key)} is not known; use {', '.join(known)}")


def _group(
    file: Path, place: str, plan: Mapping[str, Any], one: Mapping[str, Any], size: int,
    bundle: Bundle, datasets: dict[Path, list[Record]],
) -> Group:  # fmt: skip
    where = f"{file}: {place}"
    choices = {
        name: choice(f"{where}.{name}", name, one[name])
        for name in ATTRIBUTES
        if one.get(name) is not None
    }
    records = _records(file, where, one, choices, datasets)
    if not records:
        _check_labels(where, choices)

    def found(key: str) -> tuple[str, Any]:
        own = one.get(key) is not None
        return (f"{where}.{key}", one[key]) if own else (f"{file}: {key}", plan.get(key))

    template = _template(*found("prompt"), where, choices, records, bundle)
    settings = {}
    for key in SETTINGS:
        place, value = found(key)
        try:
            validate(bundle.defaults, bundle.limits, bundle.model, "-", 0, **{key: value})
        except RequestError as error:
            refuse(place, str(error).removeprefix(f"{error.field}: "))
        settings[key] = value
    return Group(where, size, choices, records, template, settings)


def _records(
    file: Path, where: str, one: Mapping[str, Any], choices: dict[str, Choice],
    datasets: dict[Path, list[Record]],
) -> tuple[Record, ...]:  # fmt: skip
    """What `like` names: of one split, and of one label where the group says which."""
    like, split = one.get("like"), one.get("split")
    if like is None:
        if split is not None:
            refuse(f"{where}.split", "says which records of like to take, and there is no like")
        return ()
    if not isinstance(like, str) or not like.strip() or not like.isprintable():
        refuse(f"{where}.like", f"needs the folder of a dataset, not {written(like)}")
    for name in VOCABULARY:
        if name in choices and name != "label":
            refuse(f"{where}.{name}", "is drawn from like; leave one of the two out")
    split = "train" if split is None else split
    if split not in SPLITS:
        refuse(f"{where}.split", f"{written(split)} is not known; use {', '.join(SPLITS)}")
    label = choices.pop("label", None)
    if label is not None and len(label) > 1:
        refuse(f"{where}.label", "needs one word beside like; make a group for each label")
    folder = file.parent / like
    if folder not in datasets:
        try:
            datasets[folder] = dataset.read(folder)
        except DatasetError as error:
            refuse(f"{where}.like", str(error))
    wanted = None if label is None else label[0][0]
    kept = [r for r in datasets[folder] if r.split == split and wanted in (None, r.lesion.label)]
    if not kept:
        what = f"{wanted} record" if wanted else "record"
        refuse(f"{where}.like", f"{folder} has no {what} in split {split}")
    return tuple(kept)


def _check_labels(where: str, choices: Mapping[str, Choice]) -> None:
    """Refuse what would give a picture no label, or one that its diagnosis contradicts."""
    labels = [value for value, _ in choices.get("label", ())]
    diagnoses = [value for value, _ in choices.get("diagnosis", ((None, Fraction(1)),))]
    if not labels:
        for word in diagnoses:
            if not isinstance(word, str) or DIAGNOSES[word] is None:
                why = f"{word!r} implies none" if word else "not every picture has a diagnosis"
                refuse(f"{where}.label", f"is missing, and {why}; use benign or malignant")
    if None in labels:
        refuse(f"{where}.label", "cannot be left out (null): a dataset needs it")
    for word in diagnoses:
        implied = DIAGNOSES[word] if isinstance(word, str) else None
        other = next((label for label in labels if implied not in (None, label)), None)
        if other:
            refuse(
                f"{where}.diagnosis",
                f"{word!r} is {implied}, but label may be {other!r}; make a group for each label, "
                "or leave label out",
            )


def _template(
    place: str, given: object, where: str, choices: Mapping[str, Choice],
    records: tuple[Record, ...], bundle: Bundle,
) -> Template:  # fmt: skip
    """The prompt's form; every word that it cannot do without is there for every picture."""
    if given is None:
        given = "{caption}"
    if not isinstance(given, str):
        refuse(place, f"needs a text, not {written(given)}")
    try:
        template = Template(given)
        if "caption" in template.fields:
            require_wording(bundle)
    except ValueError as error:
        refuse(place, str(error))
    asked = any(value for value, _ in choices.get("skin_type", ()))
    if asked and "skin_type" not in template.fields:
        refuse(
            f"{where}.skin_type",
            "changes no picture, for captions do not tell it and the prompt does not name it; "
            'write prompt: "{caption}, Fitzpatrick skin type {skin_type}"',
        )
    for name in ATTRIBUTES:
        if name not in template.required or name == "label":
            continue
        if name in choices:
            lacking = not all(value for value, _ in choices[name])
        else:
            lacking = not records or not all(has(record, name) for record in records)
        if lacking:
            refuse(
                place,
                f"names {{{name}}}, which some pictures of {where.rpartition(' ')[2]} do not have; "
                f'put it in square brackets, such as "[, {{{name}}}]", to leave it out there',
            )
    return template
