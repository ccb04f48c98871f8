"""What the command line asks for, checked before any picture: items, thresholds, settings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from dermaflux.bundle import Bundle
from dermaflux.errors import BundleError, RequestError
from dermaflux.licence import LicenceError
from dermaflux.policy import Policy, judge_bundle
from dermaflux.tiers import tier
from dermaflux.tokens import Tokens
from serving.batch import plan, requests
from serving.batch.items import Bad, Item
from serving.batch.settings import Settings
from serving.batch.thresholds import Thresholds

log = logging.getLogger(__name__)


def check(settings: Settings) -> None:
    """Refuse settings that contradict each other or are out of range.

    Raises:
        RequestError: the option, the value found and the value needed.
        EngineError: the same, of a tier.
    """
    if (settings.requests is None) == (settings.plan is None):
        raise RequestError("requests", "name a file of requests, or a --plan, and not both")
    numbers = {"attempts": settings.attempts, "workers": settings.workers}
    given = {"batch": settings.batch, "threads": settings.threads,
             "webdataset": settings.webdataset}  # fmt: skip
    for name, value in (numbers | {k: v for k, v in given.items() if v is not None}).items():
        if value is not None and value < 1:
            raise RequestError(f"--{name}", f"{value} is out of range; use 1 or more")
    if settings.seed < 0:
        raise RequestError("--seed", f"{settings.seed} is out of range; use 0 or more")
    if settings.tier is not None:
        tier(settings.tier)
    if settings.embed and not settings.parquet:
        raise RequestError("--embed", "is for --parquet; name both")
    if settings.seen is not None and settings.gate == "off":
        raise RequestError("--seen", "is for the gate, which is off; leave one of them out")


def asked(settings: Settings, bundle: Bundle) -> tuple[list[Item], list[Bad]]:
    """All items of the job, whoever draws them, and the lines that ask for nothing."""
    if settings.plan is not None:
        return plan.read(settings.plan, bundle, settings.seed), []
    assert settings.requests is not None, "check wants one of them"
    return requests.read(settings.requests, bundle, settings.seed)


def thresholds(settings: Settings, bundle: Bundle) -> Thresholds | None:
    """The gate's, of `--gate`.

    Raises:
        DatasetError: no such file, or it is not of the form.
        BundleError: the classifier is to be asked, and the bundle has none.
    """
    if settings.gate == "off":
        return None
    gate = Thresholds() if settings.gate == "default" else Thresholds.open(Path(settings.gate))
    if gate.agreement != "none" and bundle.classifier is None:
        raise BundleError(
            f"the bundle {bundle.name} has no classifier for the gate to ask; use --gate off, or "
            "a --gate file with `agreement: none`"
        )
    return gate


def require_allowed(policy: str, bundle: Bundle, gate: Thresholds | None) -> None:
    """Nothing, where a policy lets what draws, and what judges, be used.

    Raises:
        LicenceError: by ingredient, with what can be done; or there is no such policy.
    """
    judges = gate is not None and gate.agreement != "none"
    verdict = judge_bundle(bundle, Policy.of(policy), classifier=judges)
    try:
        verdict.require()
    except LicenceError as error:
        if verdict.allowed_without_classifier:
            words = "the gate can do without it: --gate off, or a --gate file with agreement: none"
            raise LicenceError(f"{error}. Here {words}") from None
        raise


def tell_cut(items: Sequence[Item], bundle: Bundle) -> None:
    """Say so where prompts are longer than the model reads."""
    tokens = Tokens.open(bundle.file("tokenizer_2/tokenizer.json"), bundle.model.text_length)
    counts = {prompt: tokens.count(prompt) for prompt in {one.request.prompt for one in items}}
    cut = [one for one in items if counts[one.request.prompt] > bundle.model.text_length]
    if cut:
        log.warning(
            "%d prompts are cut: %s has %d tokens, and %d are read", len(cut), cut[0].name,
            counts[cut[0].request.prompt], bundle.model.text_length,
        )  # fmt: skip
