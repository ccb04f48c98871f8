"""FLUX.1's own tokenizer files become one form, token for token what FluxPipeline makes of them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from dermaflux import vocabulary
from dermaflux.bundle import GENERATOR_PARTS, PARTS
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import eager, parts
from dermaflux.errors import BundleError
from dermaflux.tokens import Tokens
from export import tokenizer
from export.source import require_complete
from tests.tiny_tokenizers import BEGIN, END, odd_prompts, write_clip, write_t5

LENGTHS = {"tokenizer": 20, "tokenizer_2": 24}


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **changes}), encoding="utf-8")


@pytest.fixture(scope="module")
def downloaded(tiny_checkpoint, tmp_path_factory) -> Path:
    """A checkpoint with the tokenizers' files, classes and rows of FLUX.1's; not to be changed."""
    folder = tmp_path_factory.mktemp("downloaded") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    for name in LENGTHS:
        shutil.rmtree(folder / name)
    rows = write_clip(folder / "tokenizer", 20)
    assert write_t5(folder / "tokenizer_2", 24) <= 400, "T5 has more rows than tokens"
    edit(
        folder / "model_index.json",
        tokenizer=["transformers", "CLIPTokenizer"],
        tokenizer_2=["transformers", "T5TokenizerFast"],
    )
    edit(folder / "text_encoder/config.json", vocab_size=rows)
    weights = load_file(folder / "text_encoder/model.safetensors")
    (name,) = [name for name in weights if name.endswith("token_embedding.weight")]
    weights[name] = weights[name].new_zeros(rows, weights[name].shape[1])
    save_file(weights, folder / "text_encoder/model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def checkpoint(downloaded, tmp_path) -> Path:
    return shutil.copytree(downloaded, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def bundle(downloaded, tmp_path_factory) -> Path:
    """What `write` makes of it."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizer.write(Checkpoint.open(downloaded), folder)
    return folder


@pytest.mark.parametrize("name", LENGTHS)
def test_ids_are_those_of_flux_pipeline(downloaded, bundle, name):
    """The call is that of `FluxPipeline.encode_prompt`, on the tokenizers that it opened."""
    without = dict.fromkeys((*GENERATOR_PARTS[:3], "vae"))
    theirs = getattr(diffusers.FluxPipeline.from_pretrained(downloaded, **without), name)
    ours = Tokens.open(bundle / name / "tokenizer.json", LENGTHS[name])
    prompts = odd_prompts()
    wanted = theirs(prompts, padding="max_length", max_length=LENGTHS[name], truncation=True)
    ids = ours.ids(prompts)
    wrong = [
        prompt
        for prompt, row, other in zip(prompts, ids, wanted["input_ids"], strict=True)
        if row.tolist() != other
    ]
    assert not wrong
    lengths = [len(row) for row in theirs(prompts)["input_ids"]]
    assert [ours.count(prompt) for prompt in prompts] == lengths
    # These vocabularies know the words, or agreement would be that of letters.
    assert ours.count("dermoscopic image of a benign lesion") < 12
    assert len({row.tobytes() for row in ids}) > 150


@pytest.mark.parametrize("name", LENGTHS)
def test_the_bundle_opens_in_transformers_with_the_same_ids(downloaded, bundle, name):
    """And holds one form only: a second one would be read by somebody."""
    index = json.loads((bundle / "model_index.json").read_text())
    assert index[name] == ["transformers", "PreTrainedTokenizerFast"]
    assert index["vae"] == json.loads((downloaded / "model_index.json").read_text())["vae"]
    names = {file.name for file in (bundle / name).iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json"}
    import transformers

    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(bundle / name)
    assert theirs.model_max_length == LENGTHS[name]
    prompts = odd_prompts()
    wanted = theirs(prompts, padding="max_length", max_length=LENGTHS[name], truncation=True)
    ours = Tokens.open(bundle / name / "tokenizer.json", LENGTHS[name]).ids(prompts)
    assert np.array_equal(ours, np.array(wanted["input_ids"]))


def test_special_tokens_keep_their_places(bundle):
    clip = Tokens.open(bundle / "tokenizer/tokenizer.json", 20)
    table = Tokenizer.from_file(str(bundle / "tokenizer/tokenizer.json"))
    begin, end = table.token_to_id(BEGIN), table.token_to_id(END)
    (empty, long) = clip.ids(["", "lesion " * 100])
    assert empty.tolist() == [begin] + [end] * 19
    assert (long[0], long[-1]) == (begin, end)
    assert end not in long[:-1]
    t5 = Tokens.open(bundle / "tokenizer_2/tokenizer.json", 24)
    (empty, long) = t5.ids(["", "lesion " * 100])
    assert empty.tolist() == [1] + [0] * 23
    assert long[-1] == 1
    assert 0 not in long
    config = json.loads((bundle / "tokenizer/tokenizer_config.json").read_text())
    assert (config["bos_token"], config["pad_token"]) == (BEGIN, END)


def test_sides_are_kept(checkpoint, tmp_path):
    edit(
        checkpoint / "tokenizer_2/tokenizer_config.json",
        padding_side="left",
        truncation_side="left",
    )
    tokenizer.write(Checkpoint.open(checkpoint), tmp_path)
    ours = Tokens.open(tmp_path / "tokenizer_2/tokenizer.json", 24)
    row = ours.ids(["lesion"])[0].tolist()
    assert row[0] == 0
    assert row[-1] == 1
    config = json.loads((tmp_path / "tokenizer_2/tokenizer_config.json").read_text())
    assert (config["padding_side"], config["truncation_side"]) == ("left", "left")
    assert (
        ours.ids(["black " + "lesion " * 40])[0].tolist() == ours.ids(["lesion " * 40])[0].tolist()
    )


@pytest.mark.parametrize("spaced", [True, False])
def test_the_space_before_the_first_word_is_said(tiny_checkpoint, tmp_path, spaced):
    """transformers 4 takes the tokenizer's own setting away where the config says nothing."""
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    file = checkpoint / "tokenizer/tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = spaced
    file.write_text(json.dumps(content))
    (tmp_path / "bundle").mkdir()
    tokenizer.write(Checkpoint.open(checkpoint), tmp_path / "bundle")
    config = json.loads((tmp_path / "bundle/tokenizer/tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is spaced


def break_merge(folder: Path) -> None:
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join([*lines[:9], "qq zz", *lines[10:]]))


def lengthen_merge(folder: Path) -> None:
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join([*lines[:9], "a b c", *lines[10:]]))


def cut_merges(folder: Path) -> None:
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[: len(lines) // 2]))


def cut_vocabulary(folder: Path) -> None:
    (folder / "vocab.json").write_bytes((folder / "vocab.json").read_bytes()[:2000])


def cut_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": [')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), r"merges.txt is missing: without it"),
        (lambda folder: (folder / "vocab.json").unlink(), r"tokenizer/ has none of tokenizer.json"),
        (break_merge, r"merges.txt is damaged in line 10 \('qq' is not in vocab.json\)"),
        (lengthen_merge, r"merges.txt is damaged in line 10 \("),
        (cut_merges, r"merges.txt joins \d+ tokens and lacks \d+ more of vocab.json"),
        (cut_vocabulary, r"tokenizer/ is damaged"),
        (cut_json, r"tokenizer/tokenizer.json is damaged"),
    ],
)
def test_a_damaged_clip_is_refused_at_once(checkpoint, damage, message):
    require_complete(checkpoint, PARTS)
    damage(checkpoint / "tokenizer")
    with pytest.raises(BundleError, match=message):
        require_complete(checkpoint, PARTS)
    with pytest.raises(BundleError, match=message):
        eager.tokenizers(Checkpoint.open(checkpoint))


def test_a_cut_t5_is_refused_wherever_it_was_cut(checkpoint):
    """protobuf takes a file that ends between two pieces for a whole one."""
    from sentencepiece import sentencepiece_model_pb2

    file = checkpoint / "tokenizer_2/spiece.model"
    whole = file.read_bytes()
    model = sentencepiece_model_pb2.ModelProto.FromString(whole)
    pieces = len(whole) - len(model.trainer_spec.SerializeToString())
    pieces -= len(model.normalizer_spec.SerializeToString())
    said = set()
    for size in (0, *range(pieces - 200, pieces), pieces + 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        (found,) = vocabulary.problems(file.parent)
        said.add(found.split(" (")[0].split(":")[0])
    assert said == {"tokenizer_2/spiece.model is damaged", "tokenizer_2/spiece.model is cut"}
    with pytest.raises(BundleError, match=r"tokenizer_2/spiece.model is damaged"):
        require_complete(checkpoint, PARTS)


def test_a_t5_that_is_no_unigram_is_refused(checkpoint):
    from sentencepiece import sentencepiece_model_pb2

    file = checkpoint / "tokenizer_2/spiece.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    model.trainer_spec.model_type = model.trainer_spec.BPE
    file.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"spiece.model is no unigram model"):
        require_complete(checkpoint, PARTS)


def test_what_a_sentencepiece_file_needs_is_said(checkpoint, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else found(name)
    )
    with pytest.raises(BundleError, match=r"is not installed; install it with: pip install"):
        require_complete(checkpoint, PARTS)


def test_ids_beyond_the_embedding_are_refused(checkpoint):
    rows = json.loads((checkpoint / "text_encoder/config.json").read_text())["vocab_size"]
    edit(checkpoint / "text_encoder/config.json", vocab_size=rows - 1)
    with pytest.raises(BundleError, match=rf"ids up to {rows - 1}, text_encoder .* to {rows - 2}"):
        eager.tokenizers(Checkpoint.open(checkpoint))


def test_swapped_tokenizers_are_refused(checkpoint):
    for name, other in (
        ("tokenizer", "swap"),
        ("tokenizer_2", "tokenizer"),
        ("swap", "tokenizer_2"),
    ):
        (checkpoint / name).rename(checkpoint / other)
    index = json.loads((checkpoint / "model_index.json").read_text())
    edit(
        checkpoint / "model_index.json",
        tokenizer=index["tokenizer_2"],
        tokenizer_2=index["tokenizer"],
    )
    with pytest.raises(BundleError, match=r"tokenizer_2 gives ids up to .* or the two are swapped"):
        eager.tokenizers(Checkpoint.open(checkpoint))


def test_an_embedding_of_other_rows_than_its_config_is_refused(checkpoint):
    edit(checkpoint / "text_encoder/config.json", vocab_size=5000)
    with pytest.raises(Exception, match=r"text_encoder of .* cannot be opened"):
        parts.module(checkpoint, "text_encoder")


@pytest.mark.parametrize("entry", [["transformers", "NoSuchTokenizer"], ["os", "system"], None])
def test_a_class_that_is_none_is_refused(checkpoint, entry):
    edit(checkpoint / "model_index.json", tokenizer=entry)
    with pytest.raises(BundleError, match=r"which is no tokenizer of transformers"):
        eager.tokenizers(Checkpoint.open(checkpoint))


def test_a_tokenizer_without_padding_is_refused(tiny_checkpoint, tmp_path):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    file = checkpoint / "tokenizer/tokenizer_config.json"
    content = json.loads(file.read_text())
    del content["pad_token"]
    file.write_text(json.dumps(content))
    unpadded = Tokenizer.from_file(str(checkpoint / "tokenizer/tokenizer.json"))
    unpadded.no_padding()
    unpadded.save(str(checkpoint / "tokenizer/tokenizer.json"))
    with pytest.raises(BundleError, match="has no pad token"):
        eager.tokenizers(Checkpoint.open(checkpoint))
