"""May this bundle be used here? The licences of all that it was made of, against a site's policy.

    python -m dermaflux.policy bundles/mini --policy research
    python -m dermaflux.policy bundles/mini --policy commercial --without-classifier
    python -m dermaflux.policy bundles/mini --policy hospital.yaml

A policy is one of the uses that `dermaflux.licence` tells apart (`private`, `research`,
`commercial`), or a YAML file (`dermaflux.rules`).

Generator and classifier are two works that lie beside each other: their licences are not mixed, and
a bundle whose classifier is refused may be served without it, where the site says so. The texts of
the licences decide; this reading of them is by engineers and no legal advice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dermaflux.bundle import Bundle
from dermaflux.command import ended
from dermaflux.licence import USES, Ingredient, Licence, LicenceError, combined
from dermaflux.manifest import Licence as Listed
from dermaflux.rules import CLASSIFIER, GENERATOR, Policy, Rule

__all__ = ["Policy", "Refusal", "Stated", "Verdict", "judge", "judge_bundle", "stated"]


@dataclass(frozen=True)
class Stated:
    """An ingredient of a component: `generator` or `classifier`."""

    ingredient: Ingredient
    component: str


@dataclass(frozen=True)
class Refusal:
    """One licence of one ingredient that the policy refuses, why, and what can be done."""

    ingredient: str
    component: str
    kind: str
    licence: str
    words: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.ingredient} ({self.licence}, {self.component}) {self.words}"


@dataclass(frozen=True)
class Verdict:
    """Whether a policy lets a bundle pass, and under which terms."""

    policy: str
    use: str
    stated: tuple[Stated, ...]
    refusals: tuple[Refusal, ...]
    terms: str
    attributions: tuple[str, ...]
    duties: tuple[str, ...]

    @property
    def allowed(self) -> bool:
        """Nothing is refused."""
        return not self.refusals

    @property
    def allowed_without_classifier(self) -> bool:
        """Nothing would be, if the classifier and what it is made of were left out."""
        return all(one.component == CLASSIFIER for one in self.refusals)

    def require(self) -> None:
        """Go on where nothing is refused.

        Raises:
            LicenceError: by ingredient, with what can be done.
        """
        if self.refusals:
            reasons = "; ".join(dict.fromkeys(map(str, self.refusals)))
            remedies = "; or ".join(dict.fromkeys(one.remedy for one in self.refusals))
            raise LicenceError(f"the policy {self.policy} refuses: {reasons}. To go on: {remedies}")

    def as_json(self) -> dict[str, Any]:
        """Plain values; `allowed` among them."""
        return {
            "policy": self.policy,
            "use": self.use,
            "allowed": self.allowed,
            "allowed_without_classifier": self.allowed_without_classifier,
            "refusals": [asdict(one) for one in self.refusals],
            "terms": self.terms,
            "attributions": list(self.attributions),
            "duties": list(self.duties),
        }


def stated(provenance: Mapping[str, Any], listed: Sequence[Listed] = ()) -> list[Stated]:
    """All that a `provenance.json` names, the model itself first, and what is only in `listed`.

    An ingredient that is `used_for` the classifier alone belongs to it, all others to the
    generator.

    Raises:
        LicenceError: `ingredients` is no list of objects: somebody edited the file.
    """
    ingredients = provenance.get("ingredients") or []
    if not (isinstance(ingredients, list) and all(isinstance(e, Mapping) for e in ingredients)):
        raise LicenceError(
            f"provenance.ingredients needs a list of objects, not {str(ingredients)[:80]!r}, so "
            "nobody can tell what is in it; take the file as it was exported"
        )
    own = Ingredient(
        str(provenance.get("name") or "the model"),
        str(provenance.get("licence") or ""),
        str(provenance.get("attribution") or provenance.get("base") or ""),
        "weights",
    )
    found = [Stated(own, GENERATOR)]
    for entry in ingredients:
        component = CLASSIFIER if entry.get("used_for") == CLASSIFIER else GENERATOR
        found.append(Stated(Ingredient.of(entry), component))
    named = {(one.ingredient.name, one.ingredient.licence) for one in found}
    if not provenance.get("licence") and any(one.name == own.name for one in listed):
        found = found[1:]  # the list tells it
    return [
        *found,
        *(
            Stated(Ingredient(one.name, one.licence, one.attribution, "weights"), GENERATOR)
            for one in listed
            if (one.name, one.licence) not in named
        ),
    ]


def judge(
    provenance: Mapping[str, Any],
    policy: Policy,
    *,
    listed: Sequence[Listed] = (),
    classifier: bool = True,
) -> Verdict:
    """What a policy says of a checkpoint's or a bundle's provenance.

    `listed` are the licences of a `bundle.json`. Without `classifier`, it and what it alone is made
    of are left out.
    """
    everything = stated(provenance, listed)
    used = [one for one in everything if classifier or one.component != CLASSIFIER]
    refusals: list[Refusal] = []
    for component in (GENERATOR, CLASSIFIER):
        refusals += _refusals([one for one in used if one.component == component], policy)
    whole = [
        combined(o.ingredient for o in used if o.component == c) for c in (GENERATOR, CLASSIFIER)
    ]
    return Verdict(
        policy=policy.name,
        use=policy.use,
        stated=tuple(used),
        refusals=tuple(dict.fromkeys(refusals)),
        terms="; ".join(dict.fromkeys(terms.licence for terms in whole if terms.licence)),
        attributions=_distinct(terms.attributions for terms in whole),
        duties=_distinct(terms.duties for terms in whole),
    )


def judge_bundle(bundle: Bundle, policy: Policy, *, classifier: bool = True) -> Verdict:
    """What a policy says of a bundle. A classifier that it has none of does not count."""
    there = classifier and bundle.classifier is not None
    return judge(bundle.provenance, policy, listed=bundle.licences, classifier=there)


def _refusals(parts: Sequence[Stated], policy: Policy) -> list[Refusal]:
    """What is refused of one component."""
    found: list[Refusal] = []
    forbidden = combined(one.ingredient for one in parts).forbidden
    for one in parts:
        for licence in one.ingredient.licences:
            rules = policy.rules(one.ingredient.kind, one.component)
            words = _by_rules(licence, rules)
            accepted = any(licence.id in rule.accept for rule in rules)
            if not accepted:
                words += [
                    bar.words
                    for bar in forbidden
                    if policy.use in bar.uses
                    and (bar.ingredient, bar.licence) == (one.ingredient.name, licence.id)
                ]
                if policy.eu and not licence.eu:
                    words.append("grants no rights in the European Union")
            found += [_refusal(one, licence, text) for text in words]
    return found


def _by_rules(licence: Licence, rules: Sequence[Rule]) -> list[str]:
    words = []
    if any(licence.id in rule.deny for rule in rules):
        words.append("is denied by the policy")
    if any(rule.allow is not None and licence.id not in rule.allow for rule in rules):
        words.append("is not among the licences that the policy allows")
    return words


def _refusal(one: Stated, licence: Licence, words: str) -> Refusal:
    if one.component == CLASSIFIER:
        remedy = (
            "leave the classifier out, or train one on data that may be used so "
            "(python -m training.vit)"
        )
    else:
        remedy = (
            f"use a bundle whose generator is made without {one.ingredient.name} (FLUX.1 [schnell] "
            "is a base under Apache-2.0)"
        )
    remedy += f"; or, having other terms with the owner, accept {licence.id} in the policy's file"
    given = one.ingredient
    return Refusal(given.name, one.component, given.kind, licence.id, words, remedy)


def _distinct(texts: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for group in texts for text in group))


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge a bundle; status 0 where it is allowed, 1 where it is refused, 2 for errors."""
    parser = argparse.ArgumentParser(
        prog="python -m dermaflux.policy",
        description="May this bundle be used here? Its licences against a policy.",
    )
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument(
        "--policy", default="research", help=f"{', '.join(USES)}, or a YAML file; default: research"
    )
    parser.add_argument(
        "--without-classifier", action="store_true", help="as it is where only pictures are drawn"
    )
    options = parser.parse_args(arguments)

    def work() -> int:
        verdict = judge_bundle(
            Bundle.open(options.bundle),
            Policy.of(options.policy),
            classifier=not options.without_classifier,
        )
        for one in verdict.stated:
            given = one.ingredient
            print(
                f"{one.component:<11}{given.kind:<10}{given.licence or 'unknown':<28}{given.name}"
            )
        for refusal in verdict.refusals:
            print(f"refused: {refusal}. To go on: {refusal.remedy}.")
        print(json.dumps(verdict.as_json()))
        return 0 if verdict.allowed else 1

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
