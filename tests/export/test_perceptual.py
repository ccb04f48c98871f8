"""LPIPS with weights given as a file: the authors' own numbers, and clear words without them."""

from __future__ import annotations

import json

import lpips
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import alexnet

from dermaflux.errors import EngineError
from export.__main__ import main
from export.perceptual import Perceptual


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("alexnet") / "alexnet.safetensors"
    save_file(alexnet().state_dict(), file)
    return file


def test_numbers_are_those_of_the_authors(weights, monkeypatch):
    torch.manual_seed(0)
    trunk = alexnet()
    monkeypatch.setattr("lpips.pretrained_networks.tv.alexnet", lambda pretrained: trunk)
    theirs = lpips.LPIPS(net="alex", verbose=False)
    monkeypatch.undo()
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (64, 48, 3), dtype=np.uint8)
    other = random.integers(0, 256, (64, 48, 3), dtype=np.uint8)
    pair = [torch.tensor(x).permute(2, 0, 1)[None] / 127.5 - 1 for x in (image, other)]
    found = Perceptual.open(weights)([image, image], [other, image])
    assert found[0] == pytest.approx(float(theirs(*pair).detach()), rel=1e-5)
    assert found[0] > 1e-3
    assert found[1] == pytest.approx(0, abs=1e-7)


def test_what_is_not_alexnet_is_refused(weights, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    save_file({"features.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("cut", "other", "nowhere"):
        with pytest.raises(EngineError, match=f"{name}.safetensors does not hold torchvision's"):
            Perceptual.open(tmp_path / f"{name}.safetensors")
    with pytest.raises(EngineError, match="needs 31 pixels a side"):
        Perceptual.open(weights)([np.zeros((30, 64, 3), np.uint8)], [np.zeros((30, 64, 3))])


def test_the_bundle_holds_it(weights, tiny_checkpoint, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    parts = "text_encoder,text_encoder_2,transformer,vae_decoder"
    arguments = [str(tiny_checkpoint), "--out", str(bundle), "--prompts", "2", "--parts", parts]
    assert main([*arguments, "--precision", "fp32", "--lpips", str(weights)]) == 0
    (found,) = json.loads(capsys.readouterr().out)["parity"]["images"].values()
    for parity in found.values():
        assert 0 <= parity["lpips_median"] <= parity["lpips_worst"] < 1e-3
