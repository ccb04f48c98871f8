"""What a merged checkpoint is made of, and under which terms: its `provenance.json`.

An adapter says in its file's metadata what it saw: `ingredients` (or `licences`), a JSON list of
objects with `name` and `licence` or of pairs (source, licence), and `licence` where it has one of
its own. A base says it in `provenance.json`, or, as downloaded, in its card's header (`README.md`).
Who says nothing is taken at that: no licence, which allows nothing.
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

_KEYS = ("ingredients", "licences")


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
        """The file's name, or its folder's where the trainer gives all files the same one."""
        same = ("adapter", "pytorch_lora_weights")
        path = self.path.resolve()
        return path.parent.name if path.stem in same else path.stem

    @property
    def described(self) -> dict[str, Any]:
        """`about`, with JSON read where it is some."""
        return {key: _parsed(text) for key, text in sorted(self.about.items())}

    @property
    def ingredients(self) -> list[Ingredient]:
        """What it saw, and itself where it says no more, or has a licence of its own.

        Raises:
            AdapterError: its list of ingredients is none.
        """
        saw = [Ingredient.of(entry) for entry in self._saw()]
        own = str(self.about.get("licence", ""))
        if saw and not own:
            return saw
        return [Ingredient(self.name, own, str(self.about.get("author", "")), "weights"), *saw]

    def _saw(self) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        for entry in next((_parsed(self.about[k]) for k in _KEYS if k in self.about), []):
            if isinstance(entry, list | tuple) and len(entry) == 2:
                entry = {"name": entry[0], "attribution": entry[0], "licence": entry[1]}
            if not isinstance(entry, dict) or "licence" not in entry:
                raise AdapterError(
                    f"{self.path}: its metadata names an ingredient {entry!r}; needed are objects "
                    "with name and licence, or pairs of source and licence"
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
    for source in sources:
        ingredients += [_entry(one) for one in source.ingredients]
    told = [str(one.about["wording"]) for one in sources if one.about.get("wording")]
    content: dict[str, Any] = {
        "name": name,
        "base": str(base.provenance["name"]),
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
