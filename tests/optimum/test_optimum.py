"""Optimum opens a bundle's folder as it is and makes our images: `make test-optimum`.

It runs in an environment of its own, since optimum-onnx needs transformers 4, and says what others
who read the folder with that version get. `DERMAFLUX_TEST_BUNDLE` names another bundle.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from optimum.onnxruntime import ORTFluxPipeline, ORTModelForImageClassification

from dermaflux import Pipeline, flow
from dermaflux.bundle import TOKENIZERS, Bundle
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import ORT
from dermaflux.tokens import Tokens
from export import tokenizer
from tests.tiny_tokenizers import odd_prompts, write_clip, write_t5

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "dermoscopic image of a benign lesion, nevus, symmetric, light brown"


@pytest.fixture(scope="module", autouse=True)
def old_transformers():
    """With another version these tests would say nothing of Optimum."""
    assert transformers.__version__.startswith("4."), transformers.__version__


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(os.environ.get("DERMAFLUX_TEST_BUNDLE", ROOT / "bundles/mini"))


@pytest.fixture(scope="module")
def opened(folder) -> Bundle:
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def theirs(folder) -> ORTFluxPipeline:
    pipeline = ORTFluxPipeline.from_pretrained(folder, provider="CPUExecutionProvider")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("batch", [1, 2])
def test_optimum_makes_our_images(opened, theirs, batch):
    """Same latents, same text length; the difference is that ours are rounded to bytes."""
    ours = Pipeline.open(opened, engine=ORT, precision="fp32")
    limits, model = opened.limits, opened.model
    height, width = opened.defaults.height, limits.min_size
    guidance = None if opened.defaults.guidance is None else 2.0
    prompts = [f"{PROMPT}, {number} mm" for number in range(batch)]
    requests = [
        ours.request(prompt, number, 4, guidance, height, width)
        for number, prompt in enumerate(prompts)
    ]
    shape = flow.latent_shape(height, width, model.latent_channels, model.scale)
    noise = np.stack([flow.noise(request.seed, shape) for request in requests])
    expected = theirs(
        prompts,
        height=height,
        width=width,
        num_inference_steps=4,
        guidance_scale=2.0,
        latents=torch.from_numpy(flow.pack(noise)),
        max_sequence_length=model.text_length,
        output_type="np",
    ).images
    images = np.stack(ours.generate(requests))
    assert images.shape == expected.shape
    assert images.std() > 5, "an empty image would equal another too easily"
    assert np.abs(images / 255 - expected).max() < 1 / 255


@pytest.mark.parametrize("name", TOKENIZERS)
def test_its_tokens_are_ours(opened, theirs, folder, name):
    model = opened.model
    length = model.clip_length if name == "tokenizer" else model.text_length
    ours = Tokens.open(folder / name / "tokenizer.json", length)
    assert_same(getattr(theirs, name), ours)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_flux_are_read_alike(tmp_path, name):
    """The form that FLUX.1's own files become: transformers 4 adds and takes away nothing."""
    checkpoint = tmp_path / "checkpoint"
    left_out = shutil.ignore_patterns("*.safetensors", "classifier")
    shutil.copytree(ROOT / "models/mini", checkpoint, ignore=left_out)
    for kept in TOKENIZERS:
        shutil.rmtree(checkpoint / kept)
    rows = (write_clip(checkpoint / "tokenizer", 20), write_t5(checkpoint / "tokenizer_2", 24))
    for part, count in zip(("text_encoder", "text_encoder_2"), rows, strict=True):
        edit(checkpoint / part / "config.json", vocab_size=count)
    # The slow CLIPTokenizer of transformers 4 has no form that `tokenizer.json` could hold.
    classes = {"tokenizer": "CLIPTokenizerFast", "tokenizer_2": "T5TokenizerFast"}
    for kept, kind in classes.items():
        edit(checkpoint / "model_index.json", **{kept: ["transformers", kind]})
    opened = Checkpoint.open(checkpoint)
    (tmp_path / "bundle").mkdir()
    tokenizer.write(opened, tmp_path / "bundle")
    length = opened.model.clip_length if name == "tokenizer" else opened.model.text_length
    ours = Tokens.open(tmp_path / "bundle" / name / "tokenizer.json", length)
    kind = transformers.PreTrainedTokenizerFast
    assert_same(kind.from_pretrained(tmp_path / "bundle" / name), ours)
    assert_same(getattr(transformers, classes[name]).from_pretrained(checkpoint / name), ours)


def test_the_classifier_opens(opened, folder):
    """Its own config, of timm, is enough; class names are in `label_names`, not in `id2label`."""
    assert opened.classifier is not None
    theirs = ORTModelForImageClassification.from_pretrained(folder / "classifier")
    assert theirs.config.label_names == list(opened.classifier.classes)
    from dermaflux.engines.ort import OrtEngine

    pixels = np.random.default_rng(0).standard_normal((2, *opened.classifier.input_size))
    pixels = pixels.astype(np.float32)
    graph = folder / opened.parts["classifier"].files["fp32"].path
    ours = OrtEngine(graph, "fp32").run({"pixel_values": pixels})["logits"]
    logits = theirs(pixel_values=torch.from_numpy(pixels)).logits.numpy()
    assert np.ptp(ours) > 0
    np.testing.assert_allclose(logits, ours, atol=1e-5)


def assert_same(theirs: transformers.PreTrainedTokenizerFast, ours: Tokens) -> None:
    prompts = odd_prompts()
    wanted = theirs(prompts, padding="max_length", max_length=ours.length, truncation=True)
    rows = zip(prompts, ours.ids(prompts).tolist(), wanted["input_ids"], strict=True)
    assert not [prompt for prompt, row, other in rows if row != other]


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **changes}), encoding="utf-8")
