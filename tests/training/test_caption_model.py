"""Captions from vision-language models: two architectures of random weights, tokenizers of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dermaflux import dataset
from dermaflux.dataset import Record
from dermaflux.errors import EngineError
from training import caption
from training.caption_run import Failed, Picture, run
from training.caption_text import BLIND_PROMPT, BLIND_TEMPLATE, PROMPT, TEMPLATE, Asking
from training.captioner import VisionCaptioner

MLLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|user|>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|image|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHADES = (40, 80, 120, 160, 200)


def tokenizer_of(special: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<bos>", "<eos>", *special]
    vocabulary = {token: number for number, token in enumerate([*letters, *names])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        additional_special_tokens=special,
    )  # fmt: skip


def write_mllama(folder: Path) -> Path:
    """Llama 3.2 Vision's architecture: cross-attention, tiles, a chat template."""
    from transformers import (
        MllamaConfig,
        MllamaForConditionalGeneration,
        MllamaImageProcessor,
        MllamaProcessor,
    )

    torch.manual_seed(1)
    tokenizer = tokenizer_of(["<|image|>", "<|python_tag|>", "<|user|>", "<|assistant|>"])
    size = len(tokenizer)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("bos", "eos", "pad")}
    config = MllamaConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_global_layers": 1, "attention_heads": 2, "image_size": 32, "patch_size": 8,
            "max_num_tiles": 2, "vision_output_dim": 32, "intermediate_layers_indices": [1],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config={
            "vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["pad"],
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )  # fmt: skip
    model = MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Random models are deaf: their gates are shut and their weights small.
            value.fill_(1.0) if "gate" in name else value.mul_(6)
    model.generation_config.eos_token_id = ids["eos"]
    # As the published one has it: its own defaults would draw tokens.
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    images = MllamaImageProcessor(size={"height": 32, "width": 32}, max_image_tiles=2)
    MllamaProcessor(images, tokenizer, chat_template=MLLAMA_CHAT).save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: llama3.2\n---\n# A model\n")
    return folder


def write_llava(folder: Path) -> Path:
    """Picture tokens among the words, and no chat template."""
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(2)
    tokenizer = tokenizer_of(["<image>"])
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
            "projection_dim": 16,
        },
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32,
            "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(6)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["mllama", "llava"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = {"mllama": write_mllama, "llava": write_llava}[request.param]
    return write(tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def mllama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mllama(tmp_path_factory.mktemp("models") / "Tiny-Vision")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures, one of which is none."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    records = []
    for number, shade in enumerate(SHADES):
        picture = Image.new("RGB", (40 + 20 * number, 40), (230, 190, 170))
        picture.paste((shade, shade // 2, 30), (8, 8, 32, 32))
        picture.save(folder / f"{number}.png")
        label = "malignant" if number % 2 else "benign"
        records.append(Record(f"{number}.png", label, text="before", sex="female", age=80))
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    dataset.write(folder, records)
    return folder


def caption_with(folder: Path, model: Path, *options: str) -> int:
    command = [str(folder), "--model", str(model), "--device", "cpu", "--max-tokens", "6"]
    return caption.main([*command, "--batch", "2", *options])


def test_every_picture_but_the_broken_one_gets_the_papers_text(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert caption_with(folder, model) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["captioned"], summary["failed"]) == (4, 1)
    assert "2.png" in summary["failures"]
    records = dataset.read(folder)
    assert records[2].text == "before"
    for record in (records[0], records[1], records[3], records[4]):
        start = (
            f"This photo depicts a {record.label} lesion. This photo is taken from a female "
            "patient, who is 80.0 years old. Here's a description of the mole: \n\n"
        )
        assert record.text.startswith(start)
        assert len(record.text) > len(start)
        # The question is not part of the answer.
        assert "Give me a description" not in record.text
        told = record.more["caption"]
        assert told["model"]["name"] == model.name
        assert len(told["model"]["sha256"]) == 64
        assert (told["prompt"], told["template"]) == (PROMPT, TEMPLATE)
        assert told["label_blind"] is False
        assert told["decoding"]["strategy"] == "greedy"
        assert told["decoding"]["max_tokens"] == 6
        assert str(folder.parent) not in json.dumps(told)


def test_a_batch_says_what_its_pictures_say_alone(folder: Path, model: Path) -> None:
    (folder / "2.png").unlink()
    shutil.copy(folder / "1.png", folder / "2.png")
    pictures = [Picture(record, record.file_name) for record in dataset.read(folder)]
    for temperature in (0.0, 1.0):
        asking = Asking(str(model), device="cpu", max_tokens=5, temperature=temperature, top_p=0.9)
        captioner = VisionCaptioner(folder, asking)
        together = captioner.answer(pictures)
        assert together == [captioner.answer([picture])[0] for picture in pictures]
        assert not any(isinstance(one, Failed) for one in together)
    texts = [one["text"] for one in together if not isinstance(one, Failed)]
    assert len(set(texts)) > 1


def test_the_prompt_and_the_picture_reach_the_model(folder: Path, model: Path) -> None:
    """What it says first depends on both: logits of another picture or label are others."""
    captioner = VisionCaptioner(folder, Asking(str(model), device="cpu", max_tokens=1))
    seen: list[torch.Tensor] = []
    captioner.answer([Picture(dataset.read(folder)[0], "a")])
    assert captioner._opened is not None
    network = captioner._opened[0]
    network.register_forward_hook(lambda *given: seen.append(given[2].logits[:, -1]))
    benign, malignant = dataset.read(folder)[:2]
    other_label = Record(benign.file_name, "malignant")
    for record in (benign, benign, other_label, malignant):
        captioner.answer([Picture(record, "a")])
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2])
    assert not torch.allclose(seen[2], seen[3])


def test_label_blind_names_the_label_nowhere(
    folder: Path, mllama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    whole = VisionCaptioner._prompt

    def prompt(self: VisionCaptioner, record: Record) -> str:
        asked.append(whole(self, record))
        return asked[-1]

    monkeypatch.setattr(VisionCaptioner, "_prompt", prompt)
    assert caption_with(folder, mllama, "--label-blind", "--no-patient") == 0
    assert set(asked) == {BLIND_PROMPT}
    record = dataset.read(folder)[1]
    assert record.text.startswith("This photo depicts a lesion. Here's a description of the mole:")
    assert "malignant" not in record.text
    told = record.more["caption"]
    assert told["label_blind"] is True
    assert (told["prompt"], told["template"]) == (BLIND_PROMPT, BLIND_TEMPLATE)


def test_what_was_answered_is_not_asked_again(folder: Path, mllama: Path) -> None:
    asking = Asking(str(mllama), device="cpu", max_tokens=3, batch=2)
    assert run(folder, VisionCaptioner(folder, asking))["new"] == 4
    texts = [record.text for record in dataset.read(folder)]
    again = VisionCaptioner(folder, asking)
    shutil.copy(folder / "1.png", folder / "2.png")
    assert run(folder, again)["new"] == 1
    assert [one.text for one in dataset.read(folder)][3:] == texts[3:]
    finished = VisionCaptioner(folder, asking)
    assert run(folder, finished)["new"] == 0
    # Nothing to ask: a model of many gigabytes is not opened.
    assert finished._opened is None
    # Another text around the same answers asks nothing; another prompt asks all again.
    template = Asking(str(mllama), device="cpu", max_tokens=3, batch=2, template="{text}")
    assert run(folder, VisionCaptioner(folder, template))["new"] == 0
    blind = Asking(str(mllama), device="cpu", max_tokens=3, batch=2, prompt=BLIND_PROMPT)
    # 2.png is 1.png, and nobody tells the model their labels: one question.
    assert run(folder, VisionCaptioner(folder, blind))["new"] == 4


def test_the_licence_of_the_model_card_and_its_decoding_are_told(
    folder: Path, mllama: Path
) -> None:
    caption_with(folder, mllama, "--temperature", "0.8", "--seed", "3")
    told = dataset.read(folder)[0].more["caption"]
    assert told["model"]["licence"] == "llama3.2"
    assert told["decoding"] == {
        "strategy": "sampling", "max_tokens": 6, "temperature": 0.8, "top_p": 1.0, "seed": 3,
        "dtype": "float32", "cut": told["decoding"]["cut"],
    }  # fmt: skip


def test_a_picture_that_the_model_refuses_fails_alone(
    folder: Path, mllama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = VisionCaptioner._generate

    def generate(self: VisionCaptioner, pictures: Any) -> Any:
        if any(picture.record.file_name == "3.png" for picture, _ in pictures):
            raise ValueError("unable to infer the number of channels")
        return whole(self, pictures)

    monkeypatch.setattr(VisionCaptioner, "_generate", generate)
    captioner = VisionCaptioner(folder, Asking(str(mllama), device="cpu", max_tokens=3))
    summary = run(folder, captioner)
    assert summary["captioned"] == 3
    assert "channels" in summary["failures"]["3.png"]


def test_a_pickle_is_refused(folder: Path, mllama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    other = shutil.copytree(mllama, tmp_path / "other")
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    captioner = VisionCaptioner(folder, Asking(str(other), device="cpu"))
    with pytest.raises(EngineError, match="pickle"):
        captioner.answer([Picture(dataset.read(folder)[0], "a")])


def test_a_model_that_is_not_there_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert caption_with(folder, tmp_path) == 2
    assert "config.json" in capsys.readouterr().err
    assert caption_with(folder, Path("no-such-model")) == 2
    error = capsys.readouterr().err
    assert "no-such-model" in error
    assert "--download" in error


def test_a_model_without_a_processor_is_refused(folder: Path, mllama: Path, tmp_path: Path) -> None:
    other = shutil.copytree(mllama, tmp_path / "other")
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        (other / name).unlink(missing_ok=True)
    captioner = VisionCaptioner(folder, Asking(str(other), device="cpu"))
    with pytest.raises(EngineError, match="other"):
        captioner.answer([Picture(dataset.read(folder)[0], "a")])
