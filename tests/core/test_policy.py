"""The licence gate: what a policy refuses, by ingredient, and what it lets pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dermaflux.bundle import Bundle
from dermaflux.licence import LicenceError
from dermaflux.manifest import Licence
from dermaflux.policy import Policy, judge, judge_bundle, main, stated
from tests.tiny_bundle import write_bundle

ROOT = Path(__file__).resolve().parents[2]
MINI = json.loads((ROOT / "models/mini/provenance.json").read_text())


def made(licence="Apache-2.0", *ingredients):
    keys = ("name", "kind", "licence", "used_for")
    entries = [dict(zip(keys, one, strict=True)) for one in ingredients]
    return {"name": "model", "licence": licence, "ingredients": entries}


def data(licence, used_for="generator", kind="data"):
    return (f"the {kind} for {used_for}", kind, licence, used_for)


def policy(tmp_path: Path, text: str) -> Policy:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    return Policy.of(str(file))


def refused(verdict):
    return [(one.component, one.licence) for one in verdict.refusals]


def test_the_embedded_default_is_for_research_and_its_generator_for_anybody():
    assert judge(MINI, Policy.of("research")).allowed
    assert judge(MINI, Policy.of("private")).allowed
    sold = judge(MINI, Policy.of("commercial"))
    assert {one.component for one in sold.refusals} == {"classifier"}
    assert sold.allowed_without_classifier
    assert any("HAM10000" in one.ingredient for one in sold.refusals)
    with pytest.raises(LicenceError, match="forbids commercial use.*leave the classifier out"):
        sold.require()
    without = judge(MINI, Policy.of("commercial"), classifier=False)
    assert without.allowed
    assert without.terms == ""
    without.require()


def test_a_base_that_is_not_for_sale_is_not_saved_by_leaving_out_the_classifier():
    verdict = judge(made("FLUX.1 [dev] Non-Commercial License"), Policy.of("commercial"))
    assert refused(verdict) == [("generator", "LicenseRef-FLUX.1-dev-NC")]
    assert not verdict.allowed_without_classifier
    assert "schnell" in verdict.refusals[0].remedy
    assert judge(made("FLUX.1 [schnell]"), Policy.of("commercial")).allowed


@pytest.mark.parametrize("use", ["private", "research", "commercial"])
def test_what_is_not_stated_allows_nothing(use):
    for licence in ("", "unknown: see the checkpoint's own licence", "Some Terms 7"):
        assert not judge(made(licence), Policy.of(use)).allowed
        assert not judge(made("MIT", data(licence)), Policy.of(use)).allowed
    assert not judge({}, Policy.of(use)).allowed


def test_generator_and_classifier_are_two_works():
    """Two share-alike licences exclude each other in one work, not in two that lie together."""
    sa, nc_sa = "CC-BY-SA-4.0", "CC-BY-NC-SA-4.0"
    together = made("MIT", data(sa), data(nc_sa))
    beside = made("MIT", data(sa), data(nc_sa, "classifier"))
    assert not judge(together, Policy.of("research")).allowed
    assert judge(beside, Policy.of("research")).allowed


def test_every_kind_is_looked_at():
    for kind in ("data", "weights", "captions"):
        for used_for in ("generator", "classifier", "generator, autoencoder"):
            verdict = judge(
                made("MIT", data("CC-BY-NC-4.0", used_for, kind)), Policy.of("research")
            )
            assert verdict.allowed
            verdict = judge(
                made("MIT", data("CC-BY-NC-4.0", used_for, kind)), Policy.of("commercial")
            )
            assert len(verdict.refusals) == 1
            assert verdict.refusals[0].kind == kind


def test_lists_of_a_file(tmp_path):
    mine = made("Apache-2.0", data("CC0-1.0"), data("CC BY-NC 4.0", "classifier"))
    assert judge(mine, policy(tmp_path, "use: research\n")).allowed
    only = judge(mine, policy(tmp_path, "allow: [apache-2.0, CC0]\n"))
    assert refused(only) == [("classifier", "CC-BY-NC-4.0")]
    assert "not among the licences" in only.refusals[0].words
    denied = judge(mine, policy(tmp_path, "deny: [cc0]\n"))
    assert refused(denied) == [("generator", "CC0-1.0")]
    accepted = policy(tmp_path, "use: commercial\naccept: [CC-BY-NC-4.0]\n")
    assert judge(mine, accepted).allowed
    both = policy(tmp_path, "use: commercial\naccept: [cc0, CC-BY-NC-4.0]\ndeny: [cc0]\n")
    assert refused(judge(mine, both)) == [("generator", "CC0-1.0")]


def test_rules_of_a_kind_and_of_a_component(tmp_path):
    mine = made("MIT", data("CC0-1.0"), data("CC0-1.0", "classifier"))
    assert len(judge(mine, policy(tmp_path, "kinds: {data: {deny: [CC0-1.0]}}")).refusals) == 2
    found = judge(mine, policy(tmp_path, "kinds: {classifier: {deny: [CC0-1.0]}}"))
    assert refused(found) == [("classifier", "CC0-1.0")]
    assert judge(mine, policy(tmp_path, "kinds: {captions: {deny: [CC0-1.0]}}")).allowed
    found = judge(mine, policy(tmp_path, "kinds: {weights: {allow: [Apache-2.0]}}"))
    assert refused(found) == [("generator", "MIT")]


def test_who_lives_in_the_union(tmp_path):
    mine = made("MIT", data("llama3.2", kind="captions"))
    assert judge(mine, policy(tmp_path, "use: commercial")).allowed
    assert refused(judge(mine, policy(tmp_path, "eu: true"))) == [
        ("generator", "LicenseRef-Llama-3.2")
    ]
    assert judge(mine, policy(tmp_path, "eu: true\naccept: [llama3.2]")).allowed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "is no policy"),
        ("use: sale", "it needs private, research, commercial"),
        ("eu: maybe", "true or false"),
        ("denies: [MIT]", "'denies'; it takes use, eu, kinds, accept, allow, deny"),
        ("deny: MIT", "needs a list"),
        ("deny: [1]", "needs a list"),
        ("deny: [MIT]\ndeny: [CC0]", "twice"),
        ("kinds: {picture: {}}", "kinds needs weights"),
        ("kinds: {data: [MIT]}", "needs lists"),
        ("kinds: {data: {use: private}}", "it takes accept, allow, deny"),
        ("a: &a [x]\nb: *a", "alias"),
        ("{", "is not YAML"),
        ("x" * 70_000, "more than 65,536 bytes"),
    ],
)
def test_a_file_that_is_no_policy_is_refused(tmp_path, text, words):
    with pytest.raises(LicenceError, match=words):
        policy(tmp_path, text)


def test_a_name_that_is_neither_use_nor_file():
    with pytest.raises(LicenceError, match="use private, research, commercial, or name a file"):
        Policy.of("comercial")


def test_licences_that_only_the_manifest_lists_count(tmp_path):
    bundle = Bundle.open(write_bundle(tmp_path / "bundle"))
    assert judge_bundle(bundle, Policy.of("commercial")).allowed
    listed = (*bundle.licences, Licence("another base", "CC-BY-NC-4.0", ""))
    verdict = judge_bundle(replace(bundle, licences=listed), Policy.of("commercial"))
    assert [one.ingredient for one in verdict.refusals] == ["another base"]
    assert len(stated(MINI)) == 1 + len(MINI["ingredients"])


def test_a_classifier_that_is_not_in_the_bundle_does_not_count(tmp_path):
    bundle = Bundle.open(write_bundle(tmp_path / "bundle"))
    bundle = replace(bundle, provenance=made("MIT", data("CC-BY-NC-4.0", "classifier")))
    assert not judge_bundle(bundle, Policy.of("commercial")).allowed
    assert judge_bundle(replace(bundle, classifier=None), Policy.of("commercial")).allowed
    assert judge_bundle(bundle, Policy.of("commercial"), classifier=False).allowed


def test_the_command(tmp_path, capsys):
    folder = write_bundle(tmp_path / "bundle")
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["provenance"] = made("MIT", data("CC-BY-NC-4.0", "classifier"))
    (folder / "bundle.json").write_text(json.dumps(manifest))
    assert main([str(folder)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["allowed"] is True
    assert main([str(folder), "--policy", "commercial"]) == 1
    out = capsys.readouterr().out
    assert "refused: the data for classifier (CC-BY-NC-4.0, classifier) forbids commercial" in out
    assert json.loads(out.splitlines()[-1])["allowed_without_classifier"] is True
    assert main([str(folder), "--policy", "commercial", "--without-classifier"]) == 0
    assert main([str(folder), "--policy", "comercial"]) == 2
    assert main([str(tmp_path / "absent")]) == 2


@pytest.mark.parametrize("ingredients", [["HAM10000"], {"name": "HAM10000"}, 5, "HAM10000"])
def test_ingredients_that_somebody_edited_are_refused_in_words(ingredients):
    with pytest.raises(LicenceError, match="needs a list of objects"):
        stated({"name": "x", "licence": "MIT", "ingredients": ingredients})


@pytest.mark.parametrize("text", ["other", "none", "''"])
def test_what_nobody_stated_is_accepted_by_its_own_name_alone(tmp_path, text):
    file = tmp_path / "policy.yaml"
    file.write_text(f"accept: [{text}]")
    with pytest.raises(LicenceError):
        Policy.of(str(file))
    file.write_text("accept: [unknown]")
    assert Policy.of(str(file)).rule.accept == {"unknown"}
