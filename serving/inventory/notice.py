"""`NOTICE`: whom to name for weights, data and libraries, made from what they say of themselves.

    python -m serving.inventory.notice                     # writes NOTICE anew
    python -m serving.inventory.notice --check             # status 1 where it is not as it would be

Weights and data are those of a checkpoint's or a bundle's provenance, libraries those that run with
the service; citations are in `reviewed.toml`.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dermaflux import files
from dermaflux.command import ended, option, parsed
from dermaflux.licence import Ingredient, combined
from dermaflux.policy import Stated, stated
from dermaflux.rules import CLASSIFIER, GENERATOR
from serving.inventory.packages import InventoryError, Package, read_reviewed, shipped

WIDTH: Final = 100
_HEAD: Final = """DermaFlux
Copyright 2026 the DermaFlux developers

Licensed under the Apache License, Version 2.0 (see LICENSE), except the weights named below.

Research use only. DermaFlux is not a medical device; its images are synthetic.
"""
_METHOD: Final = (
    "The method follows DermaFlux (arXiv:2603.16392); this is an independent implementation and "
    "holds none of its code, weights or data. FLUX.1 is a family of models by Black Forest Labs; "
    "no weights of it are included. FLUX.1 [dev] is under a non-commercial licence, FLUX.1 "
    "[schnell] under Apache-2.0: whoever exports one of them carries its licence into the bundle."
)
_LIBRARIES: Final = (
    "A Bento, a container or a kit installs these beside DermaFlux, whose own package holds none "
    "of their code. Their licence texts and notices lie in their packages (*.dist-info)."
)
_ATTRIBUTES: Final = (
    "The few coefficients of its segmentation were fitted on a training split of the ISIC 2017 "
    "challenge."
)


@dataclass(frozen=True)
class Settings:
    """What the command takes."""

    checkpoint: Path = option("whose provenance.json names weights and data", Path("models/mini"))
    out: Path = option("the file", Path("NOTICE"))
    check: bool = option("compare only", False)


def notice(folder: str, provenance: Mapping[str, Any], packages: Sequence[Package]) -> str:
    """The text for weights in `folder`, the data that they saw, and libraries."""
    ingredients = stated(provenance)
    generator = [one for one in ingredients if one.component == GENERATOR]
    classifier = [one for one in ingredients if one.component == CLASSIFIER]
    lines = [_HEAD, *_title(f"Weights in {folder}")]
    told = read_reviewed()["weights"].get(str(provenance.get("name")), {})
    lines += _weights(f"{folder}, all but the classifier", generator, told.get(GENERATOR, ""))
    if classifier:
        lines += _weights(f"{folder}/classifier", classifier, told.get(CLASSIFIER, ""))
    lines += ["dermaflux/attributes.py", *_indented(_ATTRIBUTES), ""]
    lines += _title("Data that these weights saw")
    for one in _distinct(ingredients[1:]):
        lines += [*_cited(one), ""]
    lines += [*textwrap.wrap(_METHOD, WIDTH), ""]
    lines += [*_title("Libraries"), *textwrap.wrap(_LIBRARIES, WIDTH), ""]
    for package in packages:
        lines += _indented(f"{package.name}: {package.licence}")
    return "\n".join(lines) + "\n"


def _weights(name: str, made_of: Sequence[Stated], told: str) -> list[str]:
    own = next((one.ingredient for one in made_of if one.ingredient.kind == "weights"), None)
    terms = combined(one.ingredient for one in made_of)
    licence = own.licence if own and own.licence else terms.licence or "unknown"
    saw = "; ".join(_name(one.ingredient) for one in _distinct(made_of) if one.ingredient != own)
    words = f"{licence}." + f" Made of: {saw}." * bool(saw) + f" {told}" * bool(told)
    if "commercial" not in terms.uses:
        words += " Non-commercial use only." if "research" in terms.uses else " Ask before any use."
    return [name, *_indented(words), ""]


def _cited(one: Stated) -> list[str]:
    given = one.ingredient
    known = read_reviewed()["data"]
    # The longest beginning that fits, for one name may begin as another does.
    keys = [key for key in sorted(known, key=len) if given.name.startswith(key)]
    cite = known[keys[-1]]["cite"] if keys else given.attribution or given.name
    return [f"{_name(given)} ({given.licence or 'unknown'})", *_indented(cite)]


def _name(given: Ingredient) -> str:
    known = read_reviewed()["data"]
    keys = [key for key in sorted(known, key=len) if given.name.startswith(key)]
    return str(known[keys[-1]]["title"]) if keys else given.name


def _distinct(everything: Sequence[Stated]) -> list[Stated]:
    """Data, and weights that others made; each once."""
    found = {
        (one.ingredient.name, one.ingredient.licence): one
        for one in reversed(everything)
        if one.ingredient.name != "classifier weights"
    }
    return list(reversed(found.values()))


def _title(text: str) -> list[str]:
    return [text, "=" * len(text), ""]


def _indented(text: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), WIDTH, initial_indent="  ", subsequent_indent="  ",
        break_on_hyphens=False,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file, or say whether it is as it would be written."""
    settings = parsed(
        Settings, "python -m serving.inventory.notice", "Whom NOTICE has to name.", arguments
    )

    def work() -> int:
        file = settings.checkpoint / "provenance.json"
        try:
            provenance = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InventoryError(f"{file} cannot be read: {error}") from None
        text = notice(settings.checkpoint.as_posix(), provenance, shipped(Path()))
        same = settings.out.is_file() and settings.out.read_text("utf-8") == text
        if not settings.check:
            files.write(settings.out, text.encode())
        print(json.dumps({"file": str(settings.out), "changed": not same}))
        return int(settings.check and not same)

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
