"""What is wrong with captions is found, and what is right is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dermaflux import dataset
from dermaflux.dataset import Record
from tests.tiny_bundle import write_tokenizer
from training import caption
from training.caption_check import loops, problems, repetition
from training.caption_claims import claims
from training.caption_text import PROMPT

BENIGN_TEXTS = (
    "A benign mole with no signs of malignancy.",
    "The mole shows no features suggestive of melanoma, and appears harmless.",
    "It does not appear malignant.",
    "There are no irregular edges, colors or shapes that would suggest a malignant lesion.",
    "The absence of asymmetry suggests a benign lesion.",
    "With no irregular border, the mole appears benign.",
    "The mole is unlikely to be cancerous.",
    "Melanoma is unlikely.",
    "It is non-malignant, a noncancerous nevus.",
    "The lesion looks benign rather than malignant.",
    "The risk is low; low suspicion of malignancy.",
    "A dermatologist should be seen to rule out melanoma.",
    "It is not possible to say whether it is malignant.",
    "Only a biopsy tells if a mole is benign or malignant.",
    "The ABCDE criteria for melanoma are not met.",
    "Seborrhoeic keratosis with a waxy surface.",
    "The mole's even color makes it less concerning for skin cancer.",
    "The symmetry argues against malignancy.",
    "The mole is brown.",
)
MALIGNANT_TEXTS = (
    "The combination of features suggests that this mole may be malignant.",
    "It is concerning for malignancy.",
    "The mole displays features that are often indicative of malignancy.",
    "It lacks the smooth edges of a benign mole.",
    "Unlike benign moles, it has several colors.",
    "This does not look like a benign mole.",
    "The mole is not symmetrical, which suggests melanoma.",
    "Basal cell carcinoma with a pearly edge.",
    "The colors are not even, and the mole is likely cancerous.",
    "A lentigo maligna of the cheek.",
    "It isn\u2019t benign.",
)


@pytest.mark.parametrize("text", BENIGN_TEXTS)
def test_texts_of_benign_lesions(text: str) -> None:
    assert "malignant" not in claims(text)
    assert not problems([Record("7.jpg", "benign", text=text)], {})


@pytest.mark.parametrize("text", MALIGNANT_TEXTS)
def test_texts_of_malignant_lesions(text: str) -> None:
    assert "benign" not in claims(text)
    assert not problems([Record("7.jpg", "malignant", text=text)], {})


@pytest.mark.parametrize("text", BENIGN_TEXTS[:3] + BENIGN_TEXTS[5:7] + BENIGN_TEXTS[8:11])
def test_of_a_malignant_lesion_they_are_contradictions(text: str) -> None:
    (problem,) = problems([Record("7.jpg", "malignant", text=text)], {})
    assert (problem.kind, problem.file_name) == ("contradiction", "7.jpg")


@pytest.mark.parametrize("text", MALIGNANT_TEXTS)
def test_of_a_benign_lesion_they_are_contradictions(text: str) -> None:
    assert [one.kind for one in problems([Record("7.jpg", "benign", text=text)], {})] == [
        "contradiction"
    ]


def test_what_is_compared_over_a_comma_claims_nothing() -> None:
    text = "The outline lacks the smooth, symmetrical edges typically seen in benign moles."
    assert claims(text) == {}


def test_a_clause_says_one_thing_and_the_next_another() -> None:
    text = "It is not symmetrical, but benign. However, melanoma cannot be seen here"
    assert claims(text) == {"benign": "benign"}
    both = "This photo depicts a benign lesion. The mole suggests a potential malignancy."
    assert claims(both) == {"benign": "benign", "malignant": "malignancy"}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("The mole is the the the mole.", "loop"),
        ("It is brown and round, brown and round, brown and round, and brown.", "loop"),
        ("It has an edge. It is brown. It has an edge. Yes. It has an edge.", "loop"),
        ("!!!!!!!!!!!!!!!!", "loop"),
        ("Give me a description of this mole regarding its asymmetry, border irregularity, and "
         "color. It is round.", "prompt"),
        ("This is an image containing a benign lesion. It is round.", "prompt"),
        ("<|eot_id|>The mole is round.", "markup"),
        ("The mole is \ufffd round.", "markup"),
        ("assistant\n\nThe mole is round.", "markup"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I\u2019m unable to give medical advice.", "refusal"),
        ("I cannot identify the lesion.", "refusal"),
        ("As an AI, I have no opinion.", "refusal"),
    ],
)  # fmt: skip
def test_a_bad_text_has_its_kind(text: str, kind: str) -> None:
    kinds = {problem.kind for problem in problems([Record("7.jpg", "benign", text=text)], {})}
    assert kinds == {kind}


def test_good_texts_have_no_problem() -> None:
    text = (
        "The mole has a very, very even border ... and its color is light brown, with light brown "
        "spots. The image is sharp. I see no hair. The assistant physician marked it."
    )
    assert not problems([Record("7.jpg", "benign", text=text)], {})
    assert loops(text) is None


def test_the_prompt_that_was_asked_counts() -> None:
    more = {"caption": {"prompt": "Say what the {label} spot looks like, please."}}
    record = Record("7.jpg", "benign", text="Say what the benign spot looks like, please. Round.")
    assert not problems([record], {})
    told = Record("7.jpg", "benign", text=record.text, more=more)
    assert [one.kind for one in problems([told], {})] == ["prompt"]
    assert "{label}" in PROMPT


def test_a_text_without_an_end_is_told() -> None:
    for cut in (True, False):
        more = {"caption": {"decoding": {"cut": cut}}}
        found = problems([Record("7.jpg", "benign", text="The mole is", more=more)], {})
        assert [one.kind for one in found] == ["cut"] * cut


def test_one_text_for_many_lesions_is_a_problem_and_for_one_lesion_is_none() -> None:
    same = [Record(f"{n}.jpg", "benign", text="A round mole.") for n in range(3)]
    others = [Record(f"o{n}.jpg", "benign", text=f"A mole of {n} mm.") for n in range(7)]
    (problem,) = problems([*same, *others], {}, identical=0.2)
    assert (problem.kind, problem.file_name) == ("identical", "0.jpg")
    assert "3 of 10" in problem.detail
    assert not problems([*same, *others], {}, identical=0.3)
    one = [Record(f"{n}.jpg", "benign", text="A round mole.", group="a") for n in range(3)]
    assert not problems([*one, *others], {})
    assert repetition([*same, *others])["most_common"] == {"text": "A round mole.", "groups": 3}
    assert repetition([*same, *others])["distinct"] == 8


def test_tokens_are_counted_before_they_are_cut(tmp_path: Path) -> None:
    from dermaflux.tokens import Tokens

    write_tokenizer(tmp_path / "tokenizer.json", 8)
    tokens = Tokens.open(tmp_path / "tokenizer.json", 8)
    text = "one two three four five six seven eight"
    assert tokens.count(text) == 8
    records = [Record("0.jpg", "benign", text=text), Record("1.jpg", "benign", text=f"{text} nine")]
    found = problems(records, {"tokenizer": tokens, "tokenizer_2": tokens})
    assert [(one.kind, one.file_name) for one in found] == [("clip", "1.jpg"), ("t5", "1.jpg")]
    assert f"{tokens.count(records[1].text)} tokens" in found[0].detail


def test_the_command_lists_and_ends_with_1(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Record("0.jpg", "benign", text="dermoscopic image of a benign lesion, nevus")
    long = " and ".join(f"brown spot number {number}" for number in range(60))
    bad = [
        Record("1.jpg", "benign", text="This is a melanoma."),
        Record("2.jpg", "malignant", text=f"A malignant lesion with {long}"),
        Record("3.jpg", "benign"),
    ]
    command = [str(tmp_path), "--check", "--checkpoint", str(checkpoint)]
    dataset.write(tmp_path, [good])
    assert caption.main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"] is True
    dataset.write(tmp_path, [good, *bad])
    report = tmp_path / "report.jsonl"
    assert caption.main([*command, "--report", str(report)]) == 1
    said = capsys.readouterr()
    summary = json.loads(said.out.splitlines()[-1])
    assert summary["problems"] == {"empty": 1, "contradiction": 1, "clip": 1, "t5": 1}
    assert summary["tokens"]["t5"]["over"] == 1
    assert "contradiction: 1.jpg" in said.err
    assert len(report.read_text().splitlines()) == 4
    assert caption.main([*command, "--allow", "clip,t5,empty,contradiction"]) == 0
    assert caption.main([*command, "--allow", "clp"]) == 2
    assert "'clp'" in capsys.readouterr().err
