"""What a merged checkpoint is made of, and under which terms: its `provenance.json`.

An adapter says in its file's metadata what it saw: `data` (or `licences`), a JSON list of objects
with `source` (or `name`) and `licence`, or of pairs; `base` and `base_licence`, since it is made of
the base that it was trained on, whatever it is merged into; and `licence` where it has one of its
own. A base says it in `provenance.json`, or, as downloaded, in its card's header (`README.md`). Who
says nothing is taken at that: no licence, which allows nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dermaflux import licence as licences
from dermaflux.checkpoint import UNKNOWN_LICENCE, Checkpoint
from dermaflux.licence import Ingredient, Terms
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

    @property
    def name(self) -> str:
        """Its own name, else the file's, or its folder's where trainers name all files alike."""
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
            AdapterError: its list of data is none.
        """
        saw = [Ingredient.of(entry) for entry in self._saw()]
        # Stability AI's ModelSpec, which kohya's trainer fills in, spells it so.
        own = str(self.about.get("licence") or self.about.get("modelspec.license") or "")
        if own or not saw:
            saw.insert(0, Ingredient(self.name, own, str(self.about.get("author", "")), "weights"))
        if "base_licence" in self.about:
            name = self.about.get("base", "its base")
            one = Ingredient(name, self.about["base_licence"], name, "weights")
            # What is merged into says its own licence, perhaps better than its trainer knew it.
            if name != base or all(licence.known for licence in one.licences):
                saw.insert(0, one)
        return saw

    def _saw(self) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        lists = [_parsed(self.about.get(key, "")) for key in _KEYS]
        for entry in (entry for one in lists if isinstance(one, list) for entry in one):
            if isinstance(entry, list | tuple) and len(entry) == 2:
                entry = {"name": entry[0], "attribution": entry[0], "licence": entry[1]}
            if not isinstance(entry, dict) or "licence" not in entry:
                raise AdapterError(
                    f"{self.path}: its metadata names an ingredient {entry!r}; needed are objects "
                    "with source and licence, or pairs of them"
                )
            found.append(entry)
        return found


def of_base(base: Checkpoint) -> tuple[str, list[Ingredient]]:
    """A base's own licence, and the ingredients of its generator, itself first.

    What only its classifier saw binds the classifier, which stands beside the generator unchanged.
    """
    stated = str(base.provenance.get("licence") or UNKNOWN_LICENCE)
    if stated == UNKNOWN_LICENCE:
        stated = _card(base.path / "README.md") or stated
    name = str(base.provenance["name"])
    own = Ingredient(name, stated, str(base.provenance.get("attribution") or name), "weights")
    others = [
        Ingredient.of(one)
        for one in base.provenance.get("ingredients", ())
        if one.get("used_for") != "classifier"
    ]
    return stated, [own, *others]


def provenance(
    name: str,
    base: Checkpoint,
    sources: Sequence[Source],
    terms: Terms,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """`provenance.json` of the merged checkpoint; `settings` are those of the command."""
    licence, own = of_base(base)
    ingredients = list(base.provenance.get("ingredients", ()))
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
    return {
        "name": one.name,
        "kind": one.kind,
        "licence": one.licence or "unknown",
        "attribution": one.attribution,
        "used_for": "generator",
    }


def _distinct(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list({json.dumps(one, sort_keys=True): one for one in entries}.values())


def _parsed(text: str) -> Any:
    """JSON objects and lists as such; anything else is the text that it is."""
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except ValueError:
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
