"""The benchmark of LoRA training: its clocks, its floor, and both sides as processes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import diffusers_script, lora_training
from benchmarks.lora_flops import linears, step_flops
from benchmarks.lora_sides import Plan, link_pictures
from benchmarks.lora_training import Trained, one_round, summary
from benchmarks.watched import watch
from dermaflux.dataset import Record, write
from dermaflux.errors import DatasetError, EngineError

FLUX_DEV = {
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "in_channels": 64,
    "joint_attention_dim": 4096,
}

# A stand-in for diffusers' script: its options that matter, its progress bar, its file.
SCRIPT = """
import argparse, os, sys
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

parser = argparse.ArgumentParser()
for name in ("instance_data_dir", "output_dir", "lora_layers", "max_train_steps"):
    parser.add_argument("--" + name, required=True)
options, _ = parser.parse_known_args()
assert len(os.listdir(options.instance_data_dir)) == 8
for _ in tqdm(range(int(options.max_train_steps)), desc="Steps"):
    np.sort(np.random.default_rng(0).random(1_000_000))  # long enough for two clock readings
os.makedirs(options.output_dir)
layers = options.lora_layers.split(",")[: {layers}]
save_file(
    {{f"transformer.{{name}}.lora_A.weight": np.zeros(({rank}, 4), np.float32) for name in layers}},
    options.output_dir + "/pytorch_lora_weights.safetensors",
)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures to train on, and two others."""
    folder = tmp_path_factory.mktemp("dataset")
    shades = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    for number, pixels in enumerate(shades):
        Image.fromarray(pixels).resize((48, 48)).save(folder / f"{number:03}.png")
    write(
        folder,
        [
            Record(f"{n:03}.png", ("benign", "malignant")[n % 2], split="train" if n < 8 else "val")
            for n in range(10)
        ],
    )
    return folder


def _script(folder: Path, layers: int = 1000, rank: int = 4) -> Path:
    file = folder / "script.py"
    file.write_text(SCRIPT.format(layers=layers, rank=rank))
    return file


def _row(step_s: float, apart_s: float = 1.0, own: float | None = None) -> Trained:
    return Trained(step_s, apart_s, step_s, 5.0, 10**9, 100, own)


def test_all_linears_of_flux_are_counted_as_many_times_as_they_are() -> None:
    found = linears(FLUX_DEV)
    assert len(found) == len({one.name for one in found}) == 494
    d = 3072
    # Per token a block's linears are 12 d^2; modulation is 12 d^2 of a double block, 3 d^2 else.
    weights = {
        rows: sum(one.width * one.out for one in found if one.rows == rows) / d**2
        for rows in ("item", "image", "text", "all")
    }
    assert weights["item"] == 19 * 12 + 38 * 3
    assert weights["text"] == 19 * 12
    # The last block's text needs 2 d^2 of keys and values, and no query, MLP or result.
    assert weights["image"] == 19 * 12 + 10
    assert weights["all"] == 37 * 12 + 2


def test_operations_of_a_step_are_those_that_torch_counts(checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from training.lora.base import Base
    from training.lora.settings import Settings
    from training.lora.trainee import Trainee

    settings = Settings(base=checkpoint, data=(tmp_path,), out=tmp_path / "run", rank=16)
    trainee = Trainee.make(Base.open(settings), settings, torch.device("cpu"))
    config = json.loads((checkpoint / "transformer/config.json").read_text())
    batch, image, text = 3, 96, 40
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        velocity = trainee(
            torch.rand(batch, image, 64), torch.rand(batch), grid=(16, 24),
            hidden=torch.rand(batch, text, config["joint_attention_dim"]),
            pooled=torch.rand(batch, config["pooled_projection_dim"]),
        )  # fmt: skip
        velocity.sum().backward()
    assert sorted(trainee.layers) == sorted(f"transformer.{one.name}" for one in linears(config))
    ours = step_flops(config, image_tokens=image, text_tokens=text, batch=batch, rank=16)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_step_costs_more_than_two_forwards_and_a_little_for_lora() -> None:
    from benchmarks.latency import transformer_flops

    def times(rank: int) -> float:
        flops = step_flops(FLUX_DEV, image_tokens=1024, text_tokens=512, batch=4, rank=rank)
        return flops / (4 * transformer_flops(FLUX_DEV, 1024, 512))

    assert 2.0 < times(1) < times(64) < 2.2


def test_steps_are_timed_by_the_bar_and_the_first_ones_left_out() -> None:
    code = """
import sys
from tqdm import tqdm
x = bytearray(200_000_000)
print('a line')
for n in tqdm(range(6), desc='Steps'):
    sum(range(3_000_000 if n < 2 else 300_000))
print('{"last": 1}')
"""
    seen = watch([sys.executable, "-c", code], "Steps")
    assert sorted(seen.steps) == [1, 2, 3, 4, 5, 6]
    assert list(seen.steps.values()) == sorted(seen.steps.values())
    assert seen.step_s(after=2) < 0.5 * (seen.steps[2] - seen.steps[1])
    assert seen.steps[6] < seen.seconds
    assert seen.peak_bytes > 200e6
    assert 0 < seen.cpu_s < seen.seconds * os.cpu_count()
    assert json.loads(seen.output.splitlines()[-1]) == {"last": 1}
    with pytest.raises(EngineError, match="told of 6 steps, the last 6; to leave out 6"):
        seen.step_s(after=6)


def test_a_process_that_fails_is_told_by_its_last_words() -> None:
    with pytest.raises(EngineError, match=r"-c .*failed: oh no$"):
        watch([sys.executable, "-c", f"import sys; sys.exit('oh no')  # {'x' * 5000}"], "Steps")


def test_ratios_are_of_runs_of_one_round() -> None:
    # The machine is three times slower in the last round; the ratio does not see it.
    rounds = [
        {"dermaflux": _row(t, own=4 / t), "diffusers": _row(2 * t, -0.1)} for t in (0.1, 0.1, 0.3)
    ]
    table = summary(rounds, batch=4, floor_s=0.05)
    assert table["dermaflux"]["times_diffusers"] == 2
    assert table["diffusers"]["times_dermaflux"] == 0.5
    assert table["dermaflux"]["samples_per_s"] == 40
    assert table["dermaflux"]["samples_per_s_by_itself"] == 40
    assert table["dermaflux"]["floor_reached"] == 0.5
    assert table["dermaflux"]["samples_per_s_by_difference"] == 4
    assert table["diffusers"]["samples_per_s_by_difference"] is None


def test_only_whole_batches_of_the_training_split_are_linked(dataset: Path, tmp_path: Path) -> None:
    prompt = link_pictures(dataset, tmp_path / "pictures", batch=3)
    links = sorted((tmp_path / "pictures").iterdir())
    assert [link.resolve().name for link in links] == [f"00{n}.png" for n in range(6)]
    assert "benign" in prompt
    with pytest.raises(DatasetError, match="has 8 pictures in its training split"):
        link_pictures(dataset, tmp_path / "more", batch=9)


def test_tokenizers_of_one_file_are_opened_by_a_script_that_asks_for_others(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from peft import LoraConfig\n"
        "from transformers import CLIPTokenizer, T5TokenizerFast\n"
        "for kind, part in ((CLIPTokenizer, 'tokenizer'), (T5TokenizerFast, 'tokenizer_2')):\n"
        "    tokens = kind.from_pretrained(sys.argv[2], subfolder=part, revision=None)\n"
        "    ids = tokens('a lesion', max_length=77, padding='max_length', truncation=True,\n"
        "                 return_tensors='pt').input_ids\n"
        "    print(*ids.shape)\n"
    )
    base = ["--pretrained_model_name_or_path", str(tiny_checkpoint)]
    before = sys.argv
    assert diffusers_script.main([str(script), *base]) == 0
    assert capsys.readouterr().out.splitlines() == ["1 20", "1 24"]
    assert sys.argv is before
    from transformers import CLIPTokenizer

    assert "from_pretrained" not in vars(CLIPTokenizer)


def test_the_command_measures_both_sides(
    tiny_checkpoint: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # The stand-in trains nothing, so it cannot hold as many weights as ours.
    monkeypatch.setattr(lora_training, "weights_of", lambda file: file.stat().st_size and 7)
    out = tmp_path / "result.json"
    status = lora_training.main([
        "--script", str(_script(tmp_path)), "--base", str(tiny_checkpoint), "--data", str(dataset),
        "--steps", "3", "--warm", "1", "--rounds", "1", "--batch", "4", "--resolution", "32",
        "--rank", "4", "--threads", "1", "--work", str(tmp_path), "--out", str(out),
    ])  # fmt: skip
    assert status == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["layers"] == 26
    ours = result["sides"]["dermaflux"]
    assert ours["samples_per_s"] > 0
    assert ours["peak_bytes"] > 100e6
    # Two clocks of the same steps; so few that the last one's writing weighs.
    assert ours["samples_per_s_by_itself"] == pytest.approx(ours["samples_per_s"], rel=1)
    assert result["sides"]["diffusers"]["times_dermaflux"] > 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["result.json", "script.py"]


def test_sides_that_train_different_weights_do_not_compare(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = tmp_path / "pictures"
    link_pictures(dataset, pictures, batch=4)
    plan = Plan(
        script=_script(tmp_path), base=tmp_path, data=dataset, pictures=pictures, prompt="",
        text_length=24, layers=("a", "b", "c"), batch=4, resolution=32, rank=4, device="cpu",
        threads=1, checkpointing=False,
    )  # fmt: skip
    few = tmp_path / "few.py"
    few.write_text(SCRIPT.format(layers=2, rank=4).replace('"Steps"', '"lora"')
                   + "os.rename(options.output_dir + '/pytorch_lora_weights.safetensors',"
                   "          options.output_dir + '/adapter.safetensors')\n"
                   "print('{\"samples_per_s\": 1.0}')\n")  # fmt: skip

    def command(self: Plan, side: str, out: Path, steps: int) -> list[str]:
        script = few if side == "dermaflux" else self.script
        return [sys.executable, str(script), *map(str, self._theirs(out, steps)[2:])]

    monkeypatch.setattr(Plan, "command", command)
    with pytest.raises(EngineError, match=r"'dermaflux': 32, 'diffusers': 48"):
        one_round(plan, tmp_path, warm=1, steps=2)
    assert not (tmp_path / "run").exists()
    shutil.copy(plan.script, few)
    with pytest.raises(EngineError, match=r"ended without adapter\.safetensors"):
        one_round(plan, tmp_path, warm=1, steps=2)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--script", "nowhere.py"], "nowhere.py is not there; give examples/dreambooth/"),
        (["--resolution", "30"], "--resolution 30 is not a multiple of 8"),
        (["--data", "nowhere"], "nowhere is no dataset"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    changed: list[str], words: str, tiny_checkpoint: Path, dataset: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ["--script", str(_script(tmp_path)), "--base", str(tiny_checkpoint),
             "--data", str(dataset), "--resolution", "32"]  # fmt: skip
    assert lora_training.main([*given, *changed]) == 2
    assert words in capsys.readouterr().err
