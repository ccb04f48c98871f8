"""Bills of materials, the SOUP list and NOTICE: valid, reproducible, complete, and up to date."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement

from dermaflux.bundle import Bundle
from serving.inventory import packages as listing
from serving.inventory.__main__ import main
from serving.inventory.bom import moment, software, written
from serving.inventory.models import models
from serving.inventory.notice import main as notice_main
from serving.inventory.notice import notice
from serving.inventory.packages import InventoryError, read_reviewed, shipped, version_of
from serving.inventory.soup import soup
from tests.tiny_bundle import write_bundle

ROOT = Path(__file__).resolve().parents[2]
REMEDY = "run: python -m serving.inventory && python -m serving.inventory.notice"


@pytest.fixture(scope="module")
def packages():
    return shipped(ROOT)


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return Bundle.open(write_bundle(tmp_path / "bundle"))


def assert_valid(document) -> None:
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(written(document))
    assert error is None, error
    assert_linked(document)


def assert_linked(document) -> None:
    """Every reference is told once, and every one that is followed is told."""
    references = []

    def collect(components) -> None:
        for one in components:
            references.append(one["bom-ref"])
            collect(one.get("components", ()))

    collect([document["metadata"]["component"], *document["components"]])
    assert len(references) == len(set(references))
    for one in document["dependencies"]:
        assert {one["ref"], *one["dependsOn"]} <= set(references)


def test_the_software_bill_is_valid_whole_and_reproducible(packages):
    document = software(packages, "1.2.3")
    assert_linked(document)
    # Of each form one: the validator takes a tenth of a second for every component.
    forms = {(o.licence, bool(o.home), bool(o.issues), bool(o.maker)): o for o in packages}
    assert_valid(software([replace(one, needs=()) for one in forms.values()], "1.2.3"))
    assert written(document) == written(software(shipped(ROOT), "1.2.3"))
    assert "timestamp" not in document["metadata"]
    few = [replace(packages[0], needs=())]
    dated = software(few, "1.2.3", moment("2026-01-31T10:00:00+01:00"))
    assert dated["metadata"]["timestamp"] == "2026-01-31T09:00:00Z"
    assert_valid(dated)
    assert dated["serialNumber"] == software(few, "1.2.3")["serialNumber"]
    assert dated["serialNumber"] != document["serialNumber"]


def test_all_that_a_bento_packs_is_listed(packages):
    names = {one.name for one in packages}
    asked = yaml.safe_load((ROOT / "bentofile.yaml").read_text())["python"]["packages"]
    wanted = {listing.canonicalize_name(Requirement(text).name) for text in asked}
    assert wanted <= names
    assert wanted == {one.name for one in packages if one.asked}
    assert {"numpy", "anyio", "h11"} <= names
    assert "torch" not in names
    assert "pytest" not in names
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    told = {line.split("==")[0].casefold().replace("_", "-").replace(".", "-") for line in pinned}
    assert names <= told
    for one in packages:
        assert set(one.needs) <= names
        assert one.licence


def test_reviewed_licences_are_still_needed(packages):
    assert set(read_reviewed()["licences"]) <= {one.name for one in packages}


def test_wheels_are_told_by_their_hash(tmp_path, packages):
    one = next(one for one in packages if one.name == "typing-extensions")
    wheel = tmp_path / f"typing_extensions-{one.version}-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    (tmp_path / "typing_extensions-0.1-py3-none-any.whl").write_bytes(b"another")
    found = {one.name: one.sha256 for one in shipped(ROOT, wheels=tmp_path)}
    assert found.pop("typing-extensions") == hashlib.sha256(b"a wheel").hexdigest()
    assert set(found.values()) == {""}
    (tmp_path / "nonsense.whl").write_bytes(b"")
    with pytest.raises(InventoryError, match="is no wheel"):
        shipped(ROOT, wheels=tmp_path)


def test_what_cannot_be_told_is_an_error(tmp_path, monkeypatch):
    project = '[project]\nname = "x"\nversion = "1"\ndependencies = ["numpy", "h11"]\n'
    (tmp_path / "pyproject.toml").write_text(project)
    numpy = listing.importlib.metadata.version("numpy")
    (tmp_path / "constraints.txt").write_text(f"numpy=={numpy}\n")
    with pytest.raises(InventoryError, match=r"constraints.txt has no h11; add h11=="):
        shipped(tmp_path, ())
    (tmp_path / "constraints.txt").write_text(f"numpy=={numpy}\nh11==0.1\n")
    with pytest.raises(InventoryError, match="constraints.txt has 0.1; install with: make setup"):
        shipped(tmp_path, ())
    (tmp_path / "pyproject.toml").write_text(project.replace("h11", "h11-of-nobody"))
    with pytest.raises(InventoryError, match="h11-of-nobody is not installed"):
        shipped(tmp_path, ())
    with pytest.raises(InventoryError, match="has no extra 'serving'"):
        shipped(tmp_path, ("serving",))
    with pytest.raises(InventoryError, match="run in a checkout"):
        shipped(tmp_path / "absent")
    empty = {"licences": {}, "uses": {}, "data": {}, "weights": {}}
    monkeypatch.setattr(listing, "read_reviewed", lambda: empty)
    with pytest.raises(InventoryError, match="does not say its licence precisely"):
        shipped(ROOT)


PROVENANCE = {
    "name": "hospital",
    "licence": "FLUX.1 [dev] Non-Commercial License",
    "base": "FLUX.1-dev",
    "ingredients": [
        {"name": "HAM", "kind": "data", "licence": "CC BY-NC 4.0", "used_for": "generator"},
        {"name": "Ham!", "kind": "data", "licence": "", "used_for": "generator"},
        {"name": "HAM", "kind": "data", "licence": "CC BY-NC 4.0", "used_for": "classifier"},
        {"name": "Llama 3.2", "kind": "captions", "licence": "llama3.2", "sha256": "a" * 64},
        {"name": "own", "kind": "weights", "licence": "MIT AND CC0", "used_for": "classifier"},
    ],
}


def test_the_bill_of_models_is_valid_and_names_every_ingredient(bundle):
    assert_valid(models(bundle))
    document = models(replace(bundle, provenance=PROVENANCE, licences=()), "2026-01-31T09:00:00Z")
    assert_valid(document)
    parts = {one["name"]: one for one in document["components"]}
    assert len(document["components"]) == 2 + 3  # HAM is one, whoever learnt from it
    generator, classifier = parts["tiny generator"], parts["tiny classifier"]
    assert generator["licenses"] == [{"license": {"name": "LicenseRef-FLUX.1-dev-NC"}}]
    assert classifier["licenses"] == [{"expression": "MIT AND CC0-1.0"}]
    assert parts["HAM"]["licenses"] == [{"license": {"id": "CC-BY-NC-4.0"}}]
    assert parts["Ham!"]["licenses"] == [{"license": {"name": "unknown"}}]
    assert parts["Llama 3.2"]["hashes"][0]["content"] == "a" * 64
    datasets = [one["ref"] for one in classifier["modelCard"]["modelParameters"]["datasets"]]
    assert datasets == [parts["HAM"]["bom-ref"]]
    listed = {one["name"]: one["hashes"][0]["content"] for one in generator["components"]}
    listed |= {one["name"]: one["hashes"][0]["content"] for one in classifier["components"]}
    on_disk = {
        file.relative_to(bundle.path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in bundle.path.rglob("*")
        if file.is_file() and file.name != "bundle.json"
    }
    assert listed == on_disk
    figures = generator["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {"PSNR, median, dB"} <= {one["type"] for one in figures}


def test_a_bundle_without_a_classifier_has_one_model(bundle):
    document = models(replace(bundle, classifier=None))
    assert_valid(document)
    assert sum(one["type"] == "machine-learning-model" for one in document["components"]) == 1


def test_the_soup_list_has_every_package_once(packages):
    text = soup(packages, "1.2.3")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    named = [row.split("|")[1].strip().removeprefix("[").split("]")[0] for row in rows]
    assert sorted(name for name in named if name not in ("library", "---")) == sorted(
        one.name for one in packages
    )
    assert all(row.count("|") in (7, 8) for row in rows)
    unknown = [replace(packages[0], asked=True, name="unheard-of")]
    with pytest.raises(InventoryError, match="does not say what unheard-of is for"):
        soup(unknown, "1.2.3")


def test_what_is_committed_is_what_would_be_made(packages):
    provenance = json.loads((ROOT / "models/mini/provenance.json").read_text())
    made = {
        "NOTICE": notice("models/mini", provenance, packages),
        "docs/hospital/soup.md": soup(packages, version_of(ROOT)),
        "docs/hospital/sbom.cdx.json": written(software(packages, version_of(ROOT))),
    }
    for name, text in made.items():
        assert (ROOT / name).read_text() == text, f"{name} is not up to date; {REMEDY}"


def test_notice_names_whom_it_has_to(packages):
    text = notice("models/x", PROVENANCE, packages)
    assert "FLUX.1 [dev] Non-Commercial License. Made of: HAM; Ham!; Llama 3.2." in " ".join(
        text.split()
    )
    assert "Ham! (unknown)" in text
    assert text.count("HAM (CC BY-NC 4.0)") == 1
    assert max(map(len, text.splitlines())) <= 100
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version_of(ROOT) == version


def test_the_commands(tmp_path, bundle, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    asked = [str(bundle.path), "--out", str(tmp_path / "out")]
    assert main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == ["mlbom.cdx.json", "sbom.cdx.json", "soup.md"]
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert main(asked) == 0
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert main([*asked, "--time", "yesterday"]) == 2
    assert "is no time" in capsys.readouterr().err
    out = tmp_path / "NOTICE"
    assert notice_main(["--out", str(out), "--check"]) == 1
    assert notice_main(["--out", str(out)]) == 0
    assert notice_main(["--out", str(out), "--check"]) == 0
    assert notice_main(["--checkpoint", str(tmp_path)]) == 2
