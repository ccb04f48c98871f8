"""Tokens: a length that no prompt changes, and the ids that transformers gives."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dermaflux.errors import BundleError
from dermaflux.tokens import Tokens
from tests.tiny_bundle import write_tokenizer

PROMPTS = ["benign lesion", "", "lesion " * 100, "lésion 皮膚 🩺"]


@pytest.fixture
def path(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json", 12)
    return tmp_path / "tokenizer.json"


def test_every_prompt_has_the_same_length(path):
    tokens = Tokens.open(path, 12)
    ids = tokens.ids(PROMPTS)
    assert ids.shape == (4, 12)
    assert ids.dtype == np.int64
    for row, prompt in zip(ids, PROMPTS, strict=True):
        assert np.array_equal(tokens.ids([prompt])[0], row)
    assert tokens.ids([]).shape == (0, 12)
    assert [tokens.count(prompt) for prompt in PROMPTS[:3]] == [2, 0, 100]


def test_another_length_is_refused(path):
    with pytest.raises(BundleError, match="truncation to 12 tokens; the model needs 16"):
        Tokens.open(path, 16)
    content = json.loads(path.read_text())
    content["padding"] = None
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="padding to None"):
        Tokens.open(path, 12)


@pytest.mark.parametrize("text", ["", "{}", "not json"])
def test_a_damaged_tokenizer_is_refused(path, text):
    path.write_text(text)
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Tokens.open(path, 12)


@pytest.mark.parametrize(("name", "length"), [("tokenizer", 20), ("tokenizer_2", 24)])
def test_ids_are_those_of_transformers(tiny_checkpoint, name, length):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_checkpoint / name)
    expected = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True)
    ours = Tokens.open(tiny_checkpoint / name / "tokenizer.json", length).ids(PROMPTS)
    assert np.array_equal(ours, np.array(expected.input_ids))
