"""Licences of every ingredient as data, and the policy that refuses what they forbid together.

Weights that saw data, or grew out of other weights, are taken to be bound by the licences of both.
Whether a model is an adaptation of its training data is not settled in law; this errs on the strict
side. It is a reading by engineers and no legal advice: the texts named in `source` decide.

    >>> base = Ingredient("FLUX.1-dev", "flux-1-dev-non-commercial-license", kind="weights")
    >>> data = Ingredient("HAM10000", "CC BY-NC 4.0", "ViDIR Group, Medical University of Vienna")
    >>> combined([base, data]).licence
    'LicenseRef-FLUX.1-dev-NC AND CC-BY-NC-4.0'
    >>> require([base, data], use="commercial")
    Traceback (most recent call last):
    LicenceError: FLUX.1-dev (LicenseRef-FLUX.1-dev-NC) forbids commercial use; ...

Three uses are told apart: `private` (non-commercial, and nothing is passed on), `research`
(non-commercial, and the weights may be passed on), and `commercial` (both, for money).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dermaflux.errors import DermaFluxError

USES: Final = ("private", "research", "commercial")


class LicenceError(DermaFluxError):
    """Licences forbid what was asked for; the message says which ingredient forbids what."""


@dataclass(frozen=True)
class Licence:
    """What a licence allows. `id` is SPDX's, or a LicenseRef of ours where SPDX has none.

    `adaptations`: changed copies may be passed on. `redistribution`: copies may. `share_alike`:
    adaptations stay under this licence. `duties` is what has to be done when the result is passed
    on, `name_begins` how its name has to begin. `eu`: granted to those who live or have their
    business in the European Union. `known` is False for a licence that nobody entered here.
    """

    id: str
    source: str
    commercial: bool = True
    adaptations: bool = True
    redistribution: bool = True
    share_alike: bool = False
    attribution: bool = True
    duties: tuple[str, ...] = ()
    name_begins: str = ""
    eu: bool = True
    known: bool = True

    @property
    def open(self) -> bool:
        """It leaves the licence of a result to its maker, attribution aside."""
        free = self.commercial and self.adaptations and self.redistribution
        return self.known and free and not self.share_alike and not self.duties


UNKNOWN: Final = Licence("unknown", "", False, False, False, known=False)

_SHORT: Final = {"apache": "Apache-2.0", "apache-license-2.0": "Apache-2.0"}
_NO_ATTRIBUTION: Final = ("CC0-1.0", "PDM", "Unlicense", "0BSD")
_PERMISSIVE: Final = ("MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "ISC", *_NO_ATTRIBUTION)

FLUX_DEV: Final = Licence(
    "LicenseRef-FLUX.1-dev-NC",
    "FLUX.1 [dev] Non-Commercial License, "
    "https://github.com/black-forest-labs/flux/blob/main/model_licenses/LICENSE-FLUX1-dev",
    commercial=False,  # 1c, 2b, 4a: nor in production
    share_alike=True,  # 2a: its restrictions hold for derivatives; 4d: no other terms on them
    duties=(
        "pass on a copy of the FLUX.1 [dev] Non-Commercial License (section 3)",
        "show its Attribution Notice, and say there that the model was modified (section 3)",
        "do not train a model that competes with FLUX.1 [dev] on its outputs (section 2d)",
        "plan for risk: it is not designed for high-risk use (section 6)",
    ),
)
LLAMA_3_2: Final = Licence(
    "LicenseRef-Llama-3.2",
    "Llama 3.2 Community License Agreement and Acceptable Use Policy, "
    "https://github.com/meta-llama/llama-models/tree/main/models/llama3_2",
    duties=(
        "pass on a copy of the Llama 3.2 Community License Agreement (1.b.i)",
        'show "Built with Llama" on a page or in the documentation (1.b.i)',
        'keep the notice "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright '
        '© Meta Platforms, Inc. All Rights Reserved." beside copies of Llama (1.b.iii)',
        "ask Meta for a licence above 700 million monthly users (section 2)",
    ),
    # 1.b.i: a model trained on its outputs, captions for one, if it is passed on.
    name_begins="Llama",
    # The policy's last paragraph but one: no rights to the multimodal models in the EU.
    eu=False,
)
DDI: Final = Licence(
    "LicenseRef-DDI",
    "Stanford's research use agreement for Diverse Dermatology Images, https://ddi-dataset.github.io"
    " (shown on registering; entered here as Stanford AIMI's other agreements are worded, which "
    "allow personal, non-commercial research, and no copies or derivative works for others)",
    commercial=False,
    adaptations=False,
    redistribution=False,
)
_OTHERS: Final[Mapping[str, Licence]] = {
    "flux-1-dev": FLUX_DEV,
    "flux.1-dev": FLUX_DEV,
    "licenseref-flux.1-dev-nc": FLUX_DEV,
    "llama3.2": LLAMA_3_2,
    "llama-3.2": LLAMA_3_2,
    "llama-3.2-community-license": LLAMA_3_2,
    "llama-3.2-community-license-agreement": LLAMA_3_2,
    "licenseref-llama-3.2": LLAMA_3_2,
    "ddi": DDI,
    "ddi-research-use-agreement": DDI,
    "licenseref-ddi": DDI,
    # Black Forest Labs' repository has it beside the other: FLUX.1 [schnell] is Apache-2.0.
    "flux.1-schnell": Licence("Apache-2.0", "https://spdx.org/licenses/Apache-2.0.html"),
    "public-domain": Licence("PDM", "https://creativecommons.org/publicdomain/mark/1.0/"),
}
_CC: Final = re.compile(r"cc-?by(-nc)?(-nd|-sa)?(?:-(\d\.\d))?(?:-(?:deed|international|intl))?")
_AND: Final = re.compile(r"\s+AND\s+", re.IGNORECASE)
_OR: Final = re.compile(r"\s+OR\s+", re.IGNORECASE)
_CC0: Final = re.compile(r"cc-?0(-1\.0)?(-universal)?")


def find(text: str) -> Licence:
    """The licence of a name as people write it: `CC BY-NC 4.0`, `apache-2.0`, `llama3.2`.

    A name that is not known gives a licence of that id that allows nothing; no name, `unknown`.
    """
    bare = text.strip()
    if not bare or bare.casefold().split(":")[0] in ("unknown", "other", "none"):
        return UNKNOWN
    slug = re.sub(r"[\s_]+", "-", bare.casefold()).replace("creative-commons-", "cc-")
    slug = slug.replace("[", "").replace("]", "").removesuffix("-licence").removesuffix("-license")
    slug = re.sub(r"^(flux.1-dev-non-commercial)\b.*", "flux.1-dev", slug)
    for known in (bare.casefold(), slug, f"{slug}-license"):
        if known in _OTHERS:
            return _OTHERS[known]
    if _CC0.fullmatch(slug):
        return _permissive("CC0-1.0")
    if match := _CC.fullmatch(slug):
        return _creative_commons(*match.groups())
    named = {name.casefold(): name for name in _PERMISSIVE} | _SHORT
    if slug in named:
        return _permissive(named[slug])
    return Licence(bare, "", False, False, False, known=False)


def _permissive(name: str) -> Licence:
    source = f"https://spdx.org/licenses/{name}.html"
    return Licence(name, source, attribution=name not in _NO_ATTRIBUTION)


def _creative_commons(nc: str | None, other: str | None, version: str | None) -> Licence:
    kind = f"by{nc or ''}{other or ''}"
    return Licence(
        f"CC-{kind.upper()}" + (f"-{version}" if version else ""),
        f"https://creativecommons.org/licenses/{kind}/{version or '4.0'}/legalcode",
        commercial=not nc,
        # 4.0, section 2(a)(1)(B): adapted material may be made, but not shared.
        adaptations=other != "-nd",
        share_alike=other == "-sa",
    )


@dataclass(frozen=True)
class Ingredient:
    """Something that a result is made of. `kind` is data, weights or captions (what wrote them);
    `sha256` is of its files, where that was told."""

    name: str
    licence: str
    attribution: str = ""
    kind: str = "data"
    sha256: str = ""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Ingredient:
        """An entry of `ingredients` in a `provenance.json`, or of a file's description."""
        name = entry.get("name") or entry.get("source") or entry.get("attribution") or "the data"
        return cls(
            str(name),
            str(entry.get("licence") or ""),
            str(entry.get("attribution") or entry.get("source") or ""),
            str(entry.get("kind") or "data"),
            str(entry.get("sha256") or ""),
        )

    @property
    def licences(self) -> tuple[Licence, ...]:
        """Usually one; several where it is bound by all of them (`A AND B`, as SPDX has it). Where
        one may choose (`A OR B`), the one that allows most."""
        text = self.licence.strip()
        if _OR.search(text) and _AND.search(text) and "(" not in text:
            return (find(text),)  # which of the two binds is for its owner to say
        return tuple(_chosen(one) for one in _AND.split(text))


def _chosen(text: str) -> Licence:
    bare = text.strip()
    if bare.startswith("(") and bare.endswith(")"):
        bare = bare[1:-1]
    if "(" in bare or ")" in bare:
        return find(text)
    return max(map(find, _OR.split(bare)), key=_freedom)


def _freedom(one: Licence) -> tuple[bool, ...]:
    """The larger the more is allowed."""
    return (one.known, one.open, one.commercial, one.adaptations, one.redistribution)


@dataclass(frozen=True)
class Forbidden:
    """One thing that one ingredient forbids, for the uses named, in words."""

    ingredient: str
    licence: str
    uses: tuple[str, ...]
    words: str


@dataclass(frozen=True)
class Terms:
    """What holds for a result. `licence` is "" where its maker may choose one.

    `attributions` are whom to name, `duties` what else to do when the result is passed on,
    `name_begins` how its name has to begin, `forbidden` all that is forbidden, for any use.
    """

    licence: str
    attributions: tuple[str, ...]
    duties: tuple[str, ...]
    name_begins: str
    forbidden: tuple[Forbidden, ...]

    @property
    def uses(self) -> tuple[str, ...]:
        """The uses that nothing forbids."""
        return tuple(one for one in USES if not any(one in f.uses for f in self.forbidden))


def combined(ingredients: Iterable[Ingredient]) -> Terms:
    """What holds for a result of these ingredients; nothing is refused."""
    parts = [(one, licence) for one in ingredients for licence in one.licences]
    binding = {licence.id: None for _, licence in parts if not licence.open}
    return Terms(
        licence=" AND ".join(binding),
        attributions=_distinct(
            one.attribution or one.name for one, licence in parts if licence.attribution
        ),
        duties=_distinct(duty for _, licence in parts for duty in licence.duties),
        name_begins=next((one.name_begins for _, one in parts if one.name_begins), ""),
        forbidden=tuple(_forbidden(parts)),
    )


def require(
    ingredients: Iterable[Ingredient],
    use: str = "research",
    accepted: Iterable[str] = (),
    *,
    name: str | None = None,
    eu: bool = False,
) -> Terms:
    """The terms of a result, when no licence forbids the use.

    `accepted` are names of licences that the user answers for, having terms of their own with the
    owner, say: what those forbid is let pass. `name` is the result's; `eu` tells that the user
    lives or has their business in the European Union.

    Raises:
        LicenceError: everything that is forbidden, by ingredient and licence, and what to do; or
            `accepted` has a text that names no licence.
    """
    if use not in USES:
        raise LicenceError(f"use {use!r} is not known; use {', '.join(USES)}")
    everything = list(ingredients)
    terms = combined(everything)
    found = [one for one in terms.forbidden if use in one.uses]
    for one in everything:
        for licence in one.licences:
            named = use == "private" or name is None or name.startswith(licence.name_begins)
            if not named:
                words = f"asks for a name that begins with {licence.name_begins!r}, not {name}"
                found.append(Forbidden(one.name, licence.id, USES[1:], words))
            if eu and not licence.eu:
                words = "grants no rights to its multimodal models in the European Union"
                found.append(Forbidden(one.name, licence.id, USES, words))
    pardoned = {acceptable(text).id for text in accepted}
    found = [one for one in found if one.licence not in pardoned]
    if found:
        reasons = _distinct(f"{one.ingredient} ({one.licence}) {one.words}" for one in found)
        raise LicenceError(
            f"{'; '.join(reasons)}. Leave these ingredients out, choose another use than {use} "
            f"({', '.join(USES)}), or, where you have the right all the same, accept the licence "
            f"by name: {', '.join(_distinct(one.licence for one in found))}"
        )
    return terms


def acceptable(text: str) -> Licence:
    """The licence that a user accepts: one that nobody stated only by its own name.

    Raises:
        LicenceError: the text names none.
    """
    found = find(text)
    if found is UNKNOWN and text.strip().casefold() != UNKNOWN.id:
        raise LicenceError(
            f"{text!r} names no licence that could be accepted; give its name, or {UNKNOWN.id} for "
            "those that are not stated"
        )
    return found


def _forbidden(parts: list[tuple[Ingredient, Licence]]) -> Iterable[Forbidden]:
    for one, licence in parts:
        if not licence.known:
            words = "is a licence that is not known here" if licence.id != "unknown" else (
                "states no licence, which allows nothing"
            )  # fmt: skip
            yield Forbidden(one.name, licence.id, USES, words)
            continue
        if not licence.commercial:
            yield Forbidden(one.name, licence.id, ("commercial",), "forbids commercial use")
        if not licence.adaptations or not licence.redistribution:
            words = "forbids passing on what was made of it"
            yield Forbidden(one.name, licence.id, ("research", "commercial"), words)
    for one, licence in parts:
        for other, asked in parts:
            if licence.share_alike and asked.known and not _fits(asked, licence):
                words = (
                    f"asks that the result be under this licence alone, which {other.name} "
                    f"({asked.id}) does not allow"
                )
                yield Forbidden(one.name, licence.id, ("research", "commercial"), words)


def _fits(part: Licence, whole: Licence) -> bool:
    """Whether material under `part` may go into a work under the share-alike licence `whole`.

    As Creative Commons' table of what can be remixed: never NC into a licence that is not, never
    two different share-alikes. Material that may not be adapted at all is reported elsewhere.
    """
    if part.id == whole.id or not part.adaptations:
        return True
    return not part.share_alike and (part.commercial or not whole.commercial)


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
