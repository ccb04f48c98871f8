"""The licences of ingredients, and what they forbid together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dermaflux.licence import USES, Ingredient, LicenceError, combined, find, require

DEV = Ingredient("FLUX.1-dev", "flux-1-dev-non-commercial-license", kind="weights")
SCHNELL = Ingredient("FLUX.1-schnell", "apache-2.0", kind="weights")
LLAMA = Ingredient("captions of Llama 3.2", "llama3.2", kind="captions")
HAM = Ingredient("HAM10000", "CC BY-NC 4.0", "ViDIR Group, Medical University of Vienna")
ISIC = Ingredient("ISIC 2017", "CC-0")
DDI = Ingredient("Diverse Dermatology Images", "DDI")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("CC0-1.0", "CC0-1.0"),
        ("CC-0", "CC0-1.0"),
        ("cc0", "CC0-1.0"),
        ("CC BY 4.0", "CC-BY-4.0"),
        ("cc-by-nc-4.0", "CC-BY-NC-4.0"),
        ("CC BY-NC-ND", "CC-BY-NC-ND"),
        ("Creative Commons BY-NC-SA 4.0 International", "CC-BY-NC-SA-4.0"),
        ("apache-2.0", "Apache-2.0"),
        ("MIT License", "MIT"),
        ("FLUX.1 [schnell]", "Apache-2.0"),
        ("FLUX.1 [dev] Non-Commercial License", "LicenseRef-FLUX.1-dev-NC"),
        ("flux-1-dev-non-commercial-license", "LicenseRef-FLUX.1-dev-NC"),
        ("FLUX.1 [dev] Non-Commercial License v1.1.1", "LicenseRef-FLUX.1-dev-NC"),
        ("Llama 3.2 Community License", "LicenseRef-Llama-3.2"),
        ("LicenseRef-DDI", "LicenseRef-DDI"),
        ("", "unknown"),
        ("unknown: see the checkpoint's own licence", "unknown"),
        ("Some Terms 7", "Some Terms 7"),
    ],
)
def test_names_as_people_write_them(text, name):
    found = find(text)
    assert found.id == name
    assert find(found.id) == found
    assert found.known == (name not in ("unknown", "Some Terms 7"))


@pytest.mark.parametrize(
    ("text", "commercial", "adaptations", "share_alike", "is_open"),
    [
        ("CC0-1.0", True, True, False, True),
        ("CC-BY-4.0", True, True, False, True),
        ("CC-BY-SA-4.0", True, True, True, False),
        ("CC-BY-NC-4.0", False, True, False, False),
        ("CC-BY-NC-SA-4.0", False, True, True, False),
        ("CC-BY-NC-ND-4.0", False, False, False, False),
        ("flux.1-dev", False, True, True, False),
        ("llama3.2", True, True, False, False),
        ("DDI", False, False, False, False),
        ("", False, False, False, False),
    ],
)
def test_what_they_allow(text, commercial, adaptations, share_alike, is_open):
    found = find(text)
    assert (found.commercial, found.adaptations) == (commercial, adaptations)
    assert (found.share_alike, found.open) == (share_alike, is_open)


@pytest.mark.parametrize(
    ("ingredients", "uses", "licence"),
    [
        ([SCHNELL, ISIC], USES, ""),
        ([SCHNELL, HAM], USES[:2], "CC-BY-NC-4.0"),
        ([DEV, ISIC], USES[:2], "LicenseRef-FLUX.1-dev-NC"),
        ([DEV, HAM], USES[:2], "LicenseRef-FLUX.1-dev-NC AND CC-BY-NC-4.0"),
        ([SCHNELL, DDI], USES[:1], "LicenseRef-DDI"),
        ([SCHNELL, LLAMA], USES, "LicenseRef-Llama-3.2"),
        ([SCHNELL, Ingredient("PanDerm", "CC-BY-NC-ND-4.0")], USES[:1], "CC-BY-NC-ND-4.0"),
        ([DEV, Ingredient("MONET", "CC-BY-NC-SA-4.0")], USES[:1], None),
        ([HAM, Ingredient("MONET", "CC-BY-NC-SA-4.0")], USES[:2], None),
        ([HAM, Ingredient("other", "CC-BY-SA-4.0")], USES[:1], None),
        ([SCHNELL, Ingredient("other", "CC-BY-SA-4.0")], USES, "CC-BY-SA-4.0"),
        ([SCHNELL, Ingredient("a folder", "")], (), "unknown"),
        ([SCHNELL, Ingredient("a merge", "Apache-2.0 AND CC-BY-NC-4.0")], USES[:2], "CC-BY-NC-4.0"),
    ],
)
def test_which_uses_remain(ingredients, uses, licence):
    terms = combined(ingredients)
    assert terms.uses == uses
    assert licence is None or terms.licence == licence
    assert combined(reversed(ingredients)).uses == uses
    for use in USES:
        if use in uses:
            assert require(ingredients, use) == terms
        else:
            with pytest.raises(LicenceError):
                require(ingredients, use)


def test_a_refusal_says_who_forbids_what_and_acceptance_names_a_licence():
    with pytest.raises(LicenceError) as refused:
        require([DEV, HAM, ISIC, DDI], "commercial")
    words = str(refused.value)
    assert "FLUX.1-dev (LicenseRef-FLUX.1-dev-NC) forbids commercial use" in words
    assert "HAM10000 (CC-BY-NC-4.0) forbids commercial use" in words
    assert "Diverse Dermatology Images (LicenseRef-DDI) forbids passing on" in words
    assert "ISIC 2017" not in words
    assert words.endswith("by name: LicenseRef-FLUX.1-dev-NC, CC-BY-NC-4.0, LicenseRef-DDI")
    with pytest.raises(LicenceError, match="HAM10000"):
        require([DEV, HAM], "commercial", ["FLUX.1 [dev]"])
    accepted = require([DEV, HAM], "commercial", ["FLUX.1 [dev]", "cc-by-nc-4.0"])
    assert accepted.uses == USES[:2]  # acceptance lifts the refusal, not the licence


def test_no_licence_and_one_that_nobody_entered_are_accepted_by_their_own_names():
    nothing, terms = Ingredient("a folder", " "), Ingredient("b", "Some Terms 7")
    with pytest.raises(LicenceError, match=r"a folder \(unknown\) states no licence"):
        require([nothing], "private")
    with pytest.raises(LicenceError, match=r"b \(Some Terms 7\) is a licence that is not known"):
        require([nothing, terms], "private", ["unknown"])
    assert require([nothing, terms], "commercial", ["unknown", "Some Terms 7"])


def test_llama_asks_for_a_name_and_reaches_no_multimodal_user_in_the_union():
    terms = require([SCHNELL, LLAMA], name="Llama-derma")
    assert terms.name_begins == "Llama"
    assert any("Built with Llama" in duty for duty in terms.duties)
    with pytest.raises(LicenceError, match="begins with 'Llama', not derma"):
        require([SCHNELL, LLAMA], name="derma")
    assert require([SCHNELL, LLAMA], "private", name="derma")
    with pytest.raises(LicenceError, match="in the European Union"):
        require([LLAMA], "private", eu=True)
    assert require([SCHNELL], eu=True)


def test_whom_to_name():
    terms = combined([DEV, HAM, ISIC, SCHNELL])
    assert terms.attributions == ("FLUX.1-dev", HAM.attribution, "FLUX.1-schnell")
    assert any("Attribution Notice" in duty for duty in terms.duties)


def test_entries_of_a_checkpoint(checkpoint: Path):
    stated = json.loads((checkpoint / "provenance.json").read_text())
    found = [Ingredient.of(one) for one in stated["ingredients"]]
    assert [one.name for one in found] == [one["name"] for one in stated["ingredients"]]
    assert all(licence.known for one in found for licence in one.licences)
    generator = [
        Ingredient.of(one) for one in stated["ingredients"] if one["used_for"] != "classifier"
    ]
    assert combined(generator).uses == USES
    assert Ingredient.of({"source": "x", "licence": None}) == Ingredient("x", "", "x")


def test_an_unknown_use():
    with pytest.raises(LicenceError, match="use 'fun' is not known; use private, research"):
        require([], "fun")


def test_it_is_python_alone():
    code = "import sys, dermaflux.licence; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"


@pytest.mark.parametrize("text", ["", " ", "none", "other", "unknown: see elsewhere"])
def test_what_nobody_stated_is_accepted_by_its_name_alone(text):
    with pytest.raises(LicenceError, match=f"{text!r} names no licence.* or unknown for those"):
        require([Ingredient("a folder", "")], "private", [text])


def test_a_captioner_keeps_its_sha256():
    found = Ingredient.of(
        {"name": "Llama", "licence": "llama3.2", "kind": "captions", "sha256": "ab"}
    )
    assert (found.kind, found.sha256) == ("captions", "ab")
    assert combined([found]).name_begins == "Llama"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Apache-2.0 OR MIT", ["Apache-2.0"]),
        ("(CC-BY-NC-4.0 or cc by 4.0)", ["CC-BY-4.0"]),
        ("GPL-3.0-only OR MIT", ["MIT"]),
        ("MIT and Apache-2.0", ["MIT", "Apache-2.0"]),
        ("Apache-2.0 AND (MIT OR CC-BY-NC-4.0)", ["Apache-2.0", "MIT"]),
        ("Apache License 2.0", ["Apache-2.0"]),
        # Which binds first is not guessed.
        ("MIT OR CC-BY-4.0 AND CC-BY-NC-4.0", ["MIT OR CC-BY-4.0 AND CC-BY-NC-4.0"]),
        ("((MIT OR ISC))", ["((MIT OR ISC))"]),
    ],
)
def test_expressions_of_spdx(text, ids):
    found = Ingredient("x", text).licences
    assert [one.id for one in found] == ids
    assert all(one.known for one in found) == ("OR" not in ids[0])
