"""The map of publishers' classes: benign, malignant, or left out and why (`training/labels.toml`).

One reviewable file says for every class of every collection what it means here. A class that it
does not have is an error, never a guess; its version goes into every record.

    >>> labels = read()
    >>> labels.of("isic2019", "mel")
    Meaning(label='malignant', diagnosis='melanoma', reason='')
    >>> labels.of("isic2019", "ak").reason
    'actinic keratosis alone: ...'
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dermaflux.errors import DatasetError, RequestError
from dermaflux.prompt import DIAGNOSES, Lesion

FILE: Final = Path(__file__).with_name("labels.toml")


@dataclass(frozen=True)
class Meaning:
    """What a class means: a label and perhaps a diagnosis, or why it is left out."""

    label: str | None
    diagnosis: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Labels:
    """The map. `collections` holds name, licence, attribution and classes of each collection."""

    file: Path
    version: str
    diagnoses: Mapping[str, str]
    left_out: Mapping[str, str]
    collections: Mapping[str, Mapping[str, Any]]

    def about(self, collection: str) -> Mapping[str, Any]:
        """A collection's section: its name, licence, attribution and classes.

        Raises:
            DatasetError: the map does not have it.
        """
        if collection not in self.collections:
            raise DatasetError(
                f"{self.file} has no section [{collection}] "
                f"(it has {', '.join(self.collections) or 'none'}); copy it from {FILE}"
            )
        return self.collections[collection]

    def of(self, collection: str, kind: str, term: str = "", said: str = "") -> Meaning:
        """What a publisher's class means, narrowed by its diagnosis in words (`term`).

        `said` is the benign or malignant of another column of the publisher's; where it contradicts
        the map the picture is left out, and so it is where the diagnosis contradicts the label.

        Raises:
            DatasetError: the map does not have the collection or the class.
        """
        classes = self.about(collection)["classes"]
        if kind not in classes:
            raise DatasetError(
                f"{collection} has a class {kind!r} that {self.file} does not know "
                f"(it knows {', '.join(repr(name) for name in classes)}); enter it there under "
                f"[{collection}], as benign, malignant or excluded, and change the version"
            )
        entry = classes[kind]
        if "exclude" in entry:
            return Meaning(None, reason=entry["exclude"])
        label, diagnosis = entry["label"], entry.get("diagnosis")
        for name in (term.lower(), term.lower().split(",")[0].strip()):
            if name in self.left_out:
                return Meaning(None, reason=f"{name}: {self.left_out[name]}")
            if diagnosis is None and name in self.diagnoses:
                diagnosis = self.diagnoses[name]
        if said and said != label:
            return Meaning(None, reason=f"the map says {label}, another column {said}")
        implied = DIAGNOSES.get(diagnosis) if diagnosis else None
        if implied is not None and implied != label:
            return Meaning(None, reason=f"{label}, but {term or diagnosis}")
        return Meaning(label, diagnosis)


def read(file: Path = FILE) -> Labels:
    """The map in a TOML file, checked.

    Raises:
        DatasetError: it cannot be read, or an entry is neither a known label with a known diagnosis
            nor an exclusion with its reason.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DatasetError(f"{file} is no map of labels: {error}") from error
    except RecursionError:
        raise DatasetError(f"{file} is no map of labels: it is nested too deeply") from None
    version = content.pop("version", None)
    diagnoses, left_out = content.pop("diagnoses", {}), content.pop("left_out", {})
    if not isinstance(version, str) or not version:
        raise DatasetError(f'{file} has no version; give it one, such as version = "labels-2"')
    for term, word in _section(diagnoses, f"{file}, diagnoses").items():
        if not isinstance(word, str) or word not in DIAGNOSES:
            raise DatasetError(f"{file}, diagnoses, {term!r}: {word!r} is no diagnosis we know")
    for term, reason in _section(left_out, f"{file}, left_out").items():
        if not isinstance(reason, str):
            raise DatasetError(f"{file}, left_out, {term!r} needs its reason, not {reason!r}")
    for name, collection in content.items():
        _section(collection, f"{file}, {name}")
        if missing := {"name", "licence", "attribution", "classes"} - set(collection):
            raise DatasetError(f"{file}, [{name}] has no {min(missing)}")
        for key in ("name", "licence", "attribution"):
            if not isinstance(collection[key], str):
                raise DatasetError(f"{file}, [{name}], {key} needs a text: {collection[key]!r}")
        for kind, entry in _section(collection["classes"], f"{file}, [{name}], classes").items():
            where = f"{file}, [{name}], class {kind!r}"
            _check(_section(entry, where), where)
    return Labels(file, version, diagnoses, left_out, content)


def _section(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DatasetError(f"{where} needs a table of names and values, not {value!r}")
    return value


def _check(entry: Mapping[str, Any], where: str) -> None:
    if "exclude" in entry:
        if set(entry) != {"exclude"} or not isinstance(entry["exclude"], str):
            raise DatasetError(f"{where}: an exclusion has a reason and nothing else")
        return
    if set(entry) - {"label", "diagnosis"} or "label" not in entry:
        raise DatasetError(f"{where} needs a label (and perhaps a diagnosis), or exclude")
    for name, word in entry.items():
        if not isinstance(word, str):
            raise DatasetError(f"{where}: {name} needs a word, not {word!r}")
    try:
        Lesion(entry["label"], entry.get("diagnosis"))
    except RequestError as error:
        raise DatasetError(f"{where}: {error}") from error
