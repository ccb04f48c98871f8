"""What a merged checkpoint is made of, and under which terms: its `provenance.json`.

An adapter says in its file's metadata what it saw: `data` (or `licences`), a JSON list of objects
with `source` (or `name`), `licence` and perhaps `attribution`, or of pairs; `captions`, a list of
such objects for what wrote the texts, whose licence may reach what is trained on them; `base` and
`base_licence`, since it is made of the base that it was trained on, whatever it is merged into; and
`licence` where it has one of its own. A base says it in `provenance.json`, or, as downloaded, in
its card's header (`README.md`). Who says nothing is taken at that: no licence, which allows
nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dermaflux import licence as licences
from dermaflux.checkpoint import UNKNOWN_LICENCE, Checkpoint
from dermaflux.errors import BundleError
from dermaflux.licence import Ingredient, LicenceError, Terms
from training.factors import AdapterError

_KEYS = ("data", "licences", "ingredients")


@dataclass(frozen=True)
class Source:
    """An adapter as its file describes it. `weight` is what its delta is multiplied by, without the
    scale of all; `about` the file's metadata."""

    path: Path
    sha256: str
    weight: float
    layers: int
    about: Mapping[str, str]
    label: str = ""

    @property
    def name(self) -> str:
        """Its own name, else the file's, or its folder's where trainers name all files alike;
        `label` where that is not enough to tell it from another."""
        if self.label:
            return self.label
        if self.about.get("name"):
            return self.about["name"]
        same = ("adapter", "pytorch_lora_weights")
        path = self.path.resolve()
        return path.parent.name if path.stem in same else path.stem

    @property
    def described(self) -> dict[str, Any]:
        """`about`, with JSON read where it is some."""
        return {key: _parsed(text) for key, text in sorted(self.about.items())}

    def ingredients(self, base: str) -> list[Ingredient]:
        """What it is made of, merged into the base of that name: its own base, itself where it has
        a licence of its own or tells of no data, and its data.

        Raises:
            AdapterError: its list of data or captions is none.
        """
        saw = [Ingredient.of(entry) for key in _KEYS for entry in self._listed(key)]
        # Stability AI's ModelSpec, which kohya's trainer fills in, spells it so.
        own = str(self.about.get("licence") or self.about.get("modelspec.license") or "")
        if own or not saw:
            saw.insert(0, Ingredient(self.name, own, str(self.about.get("author", "")), "weights"))
        for entry in self._listed("captions"):
            saw.append(Ingredient.of({"kind": "captions", "name": "captions", **entry}))
        if "base_licence" in self.about:
            name = self.about.get("base", "its base")
            one = Ingredient(name, self.about["base_licence"], name, "weights")
            # What is merged into says its own licence, perhaps better than its trainer knew it.
            if name != base or all(licence.known for licence in one.licences):
                saw.insert(0, one)
        return saw

    def _listed(self, key: str) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        listed = _parsed(self.about.get(key, "[]"))
        if not isinstance(listed, list):
            # Other trainers have texts of their own under such names, but none of captions.
            if key == "captions":
                raise AdapterError(
                    f"{self.path}: its metadata has captions {str(listed)[:60]!r}, and a JSON list "
                    "of objects with name and licence is needed"
                )
            return []
        for entry in listed:
            if isinstance(entry, list | tuple) and len(entry) == 2:
                entry = {"name": entry[0], "attribution": entry[0], "licence": entry[1]}
            if not isinstance(entry, dict) or "licence" not in entry:
                needed = "name" if key == "captions" else "source"
                raise AdapterError(
                    f"{self.path}: its metadata names an ingredient {entry!r}; needed are objects "
                    f"with {needed} and licence, or pairs of them"
                )
            found.append(entry)
        return found


def named(sources: Sequence[Source]) -> list[Source]:
    """The same adapters, with names that tell them apart: those of one run are all called alike."""
    labelled = []
    for one in sources:
        others = [
            other for other in sources if other.name == one.name and other.sha256 != one.sha256
        ]
        if others:
            files = [other.path.name for other in others]
            told = one.sha256[:8] if one.path.name in files else one.path.name
            one = replace(one, label=f"{one.name} ({told})")
        labelled.append(one)
    return labelled


def of_base(base: Checkpoint, classifier: bool = True) -> tuple[str, list[Ingredient]]:
    """A base's own licence, and the ingredients of what is copied of it, itself first.

    What only its classifier saw binds the classifier alone, but that is in the folder that is made;
    without `classifier`, or where the base has none, it is no ingredient.
    """
    stated = str(base.provenance.get("licence") or UNKNOWN_LICENCE)
    if stated == UNKNOWN_LICENCE:
        stated = _card(base.path / "README.md") or stated
    name = str(base.provenance["name"])
    own = Ingredient(name, stated, str(base.provenance.get("attribution") or name), "weights")
    return stated, [own, *(Ingredient.of(one) for one in _copied(base, classifier))]


def _copied(base: Checkpoint, classifier: bool) -> list[Mapping[str, Any]]:
    """The base's ingredients that stand for something which is copied.

    Raises:
        BundleError: they are no list of objects.
    """
    there = classifier and (base.path / "classifier").is_dir()
    stated = base.provenance.get("ingredients") or []
    if not isinstance(stated, list) or not all(isinstance(one, dict) for one in stated):
        raise BundleError(
            f"{base.path / 'provenance.json'} has ingredients {str(stated)[:60]!r}, and a list of "
            "objects with name and licence is needed; get the base again"
        )
    return [one for one in stated if there or one.get("used_for") != "classifier"]


def required(
    base: Checkpoint, sources: Sequence[Source], use: str, accepted: Sequence[str], *, name: str,
    classifier: bool = True,
) -> Terms:  # fmt: skip
    """The terms of what is made, of all that is copied of the base and of the adapters.

    Raises:
        LicenceError: licences forbid it; where only the classifier's do, that is said.
        AdapterError: an adapter's list of data or captions is none.
    """
    trained_on = str(base.provenance["name"])
    merged = [one for source in sources for one in source.ingredients(trained_on)]
    ingredients = [*of_base(base, classifier)[1], *merged]
    generator = [*of_base(base, False)[1], *merged]
    try:
        return licences.require(ingredients, use, accepted, name=name)
    except LicenceError as error:
        if len(generator) == len(ingredients):
            raise
        try:
            licences.require(generator, use, accepted, name=name)
        except LicenceError as other:
            if str(other) == str(error):
                raise error from None
        raise LicenceError(
            f"{error}. Part of that is asked for the classifier of {trained_on}, which is copied: "
            "--without-classifier leaves classifier/ out"
        ) from None


def provenance(
    name: str,
    base: Checkpoint,
    sources: Sequence[Source],
    terms: Terms,
    settings: Mapping[str, Any],
    classifier: bool = True,
) -> dict[str, Any]:
    """`provenance.json` of the merged checkpoint; `settings` are those of the command."""
    licence, own = of_base(base, classifier)
    ingredients = _copied(base, classifier)
    if not base.provenance.get("ingredients"):
        ingredients.append(_entry(own[0]))
    base_name = str(base.provenance["name"])
    for source in sources:
        ingredients += [_entry(one) for one in source.ingredients(base_name)]
    told = [str(one.about["wording"]) for one in sources if one.about.get("wording")]
    content: dict[str, Any] = {
        "name": name,
        "base": base_name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        # Who gives a base without wording an adapter that has one is asked in that.
        "wording": base.provenance.get("wording") or (told[0] if len(set(told)) == 1 else None),
        "licence": terms.licence or licences.find(licence).id,
        "duties": list(terms.duties),
        "attributions": list(terms.attributions),
        "adapters": [
            {
                "name": one.name,
                "file": one.path.name,
                "sha256": one.sha256,
                "weight": one.weight,
                "layers": one.layers,
                "about": one.described,
            }
            for one in sources
        ],
        "ingredients": _distinct(ingredients),
        "training": {
            "recipe": "training.merge",
            **settings,
            "base": base.provenance.get("training") or {},
        },
    }
    if "defaults" in base.provenance:
        content["defaults"] = base.provenance["defaults"]
    return content


def _entry(one: Ingredient) -> dict[str, str]:
    entry = {
        "name": one.name,
        "kind": one.kind,
        "licence": one.licence or "unknown",
        "attribution": one.attribution,
        "used_for": "generator",
    }
    return entry | ({"sha256": one.sha256} if one.sha256 else {})


def _distinct(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list({json.dumps(one, sort_keys=True): one for one in entries}.values())


def _parsed(text: str) -> Any:
    """JSON objects and lists as such; anything else is the text that it is."""
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _card(file: Path) -> str:
    """The licence that a model card's header names: `license_name` where `license` is `other`."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    if header is None:
        return ""
    found: dict[str, str] = {}
    for key, value in re.findall(r"^(license(?:_name)?):\s*(.+?)\s*$", header[1], re.MULTILINE):
        found[key] = value.strip("\"'")
    name = found.get("license", "")
    return found.get("license_name", "") if name in ("", "other") else name
