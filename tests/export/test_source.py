"""A checkpoint that is not whole is refused before anything is made, and says what it lacks."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dermaflux.bundle import PARTS
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import parts
from dermaflux.errors import BundleError, EngineError
from export.source import folder_of, require_complete, require_weights, write_settings


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def test_a_whole_one_passes(checkpoint):
    require_complete(checkpoint, PARTS)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "classifier/model.safetensors",
    ],
)
def test_what_is_missing_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(BundleError, match=f"not a complete checkpoint: {name} is missing"):
        require_complete(checkpoint, PARTS)


def test_everything_that_is_missing_is_named_at_once(checkpoint):
    (checkpoint / "model_index.json").unlink()
    (checkpoint / "text_encoder_2/config.json").unlink()
    (checkpoint / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"model_index.*tokenizer/ has none.*text_encoder_2/con"):
        require_complete(checkpoint, PARTS)


def test_parts_that_are_left_out_may_be_missing(checkpoint):
    shutil.rmtree(checkpoint / "classifier")
    require_complete(checkpoint, [part for part in PARTS if part != "classifier"])


def test_a_pickle_is_no_weights(checkpoint):
    file = checkpoint / "transformer/diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(BundleError, match=r"a pickle, diffusion_pytorch_model.bin, .*is refused"):
        require_complete(checkpoint, PARTS)


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae_decoder", "classifier"])
def test_a_pickle_is_not_opened_by_torch_either(checkpoint, part):
    """Whole and readable, and refused all the same."""
    stem = "diffusion_pytorch_model" if part in ("transformer", "vae_decoder") else "pytorch_model"
    folder = checkpoint / folder_of(part)
    (file,) = folder.glob("*.safetensors")
    torch.save(load_file(file), folder / f"{stem}.bin")
    parts.module(checkpoint, part)
    file.unlink()
    with pytest.raises(EngineError, match=rf"a pickle, {stem}.bin, is there and is refused"):
        parts.module(checkpoint, part)


def test_a_cut_file_is_named(checkpoint):
    file = checkpoint / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BundleError, match="vae/diffusion_pytorch_model.safetensors is damaged"):
        require_complete(checkpoint, PARTS)


def test_every_shard_is_asked_for(checkpoint):
    folder = checkpoint / "transformer"
    name = "diffusion_pytorch_model"
    (folder / f"{name}.safetensors").rename(folder / f"{name}-00001-of-00002.safetensors")
    shards = {"a": f"{name}-00001-of-00002.safetensors", "b": f"{name}-00002-of-00002.safetensors"}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(BundleError, match=r"transformer/.*00002-of-00002.safetensors is missing"):
        require_complete(checkpoint, PARTS)


def test_no_folder_no_checkpoint(tmp_path):
    with pytest.raises(BundleError, match=r"there is no checkpoint at .*nowhere"):
        require_complete(tmp_path / "nowhere", PARTS)


@pytest.mark.parametrize(
    ("part", "file", "tensor"),
    [
        ("transformer", "transformer/diffusion_pytorch_model.safetensors", "proj_out.weight"),
        ("vae_decoder", "vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
        ("text_encoder_2", "text_encoder_2/model.safetensors", "encoder.final_layer_norm.weight"),
    ],
)
def test_a_tensor_that_would_be_random_is_named(checkpoint, part, file, tensor):
    require_weights(part, parts.module(checkpoint, part), checkpoint)
    weights = load_file(checkpoint / file)
    del weights[tensor]
    save_file(weights, checkpoint / file, metadata={"format": "pt"})
    with pytest.raises(BundleError, match=f"lack {tensor}"):
        require_weights(part, parts.module(checkpoint, part), checkpoint)


def test_clip_of_older_transformers_has_its_weights(checkpoint):
    file = checkpoint / "text_encoder/model.safetensors"
    weights = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    require_weights("text_encoder", parts.module(checkpoint, "text_encoder"), checkpoint)


def test_a_tokenizer_that_is_none_is_refused(checkpoint, tmp_path):
    (checkpoint / "tokenizer/tokenizer.json").write_text("{}")
    (tmp_path / "bundle").mkdir()
    with pytest.raises(BundleError, match="is not a tokenizer that can be converted"):
        write_settings(Checkpoint.open(checkpoint), tmp_path / "bundle", PARTS)
