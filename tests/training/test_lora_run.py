"""Whole LoRA runs on a random checkpoint: what they write, and how they end and go on."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dermaflux.errors import BundleError, DatasetError, EngineError
from training import adapter
from training.lora import encode, objective
from training.lora.__main__ import main
from training.lora.base import Base
from training.lora.corpus import turned
from training.lora.journal import Journal
from training.lora.run import Diverged, run
from training.lora.settings import Settings, SettingsError
from training.lora.state import StateError
from training.lora.store import Store
from training.lora.trainee import Trainee

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., Settings]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents and texts are the same for all runs here."""
    return tmp_path_factory.mktemp("lora_cache")


@pytest.fixture
def make(tiny_checkpoint: Path, dataset: Path, cache: Path, tmp_path: Path) -> Make:
    def settings(out: str = "run", **changes: object) -> Settings:
        given = {
            "base": tiny_checkpoint, "data": (dataset,), "out": tmp_path / out, "cache": cache,
            "steps": 6, "batch": 4, "rank": 4, "alpha": 8.0, "sizes": (32,), "rate": 1e-2,
            "warmup": 2, "save_minutes": 1e3, "device": "cpu", **changes,
        }  # fmt: skip
        return Settings(**given)  # type: ignore[arg-type]

    return settings


def _curve(folder: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["norm"]) for row in rows]


def _at(monkeypatch: pytest.MonkeyPatch, step: int, what: Callable[[], None]) -> None:
    """Have something happen right after a step was told of, and before it is saved."""
    tell = Journal.tell

    def told(self: Journal, number: int, **values: float) -> None:
        tell(self, number, **values)
        if number == step:
            what()

    monkeypatch.setattr(Journal, "tell", told)


def test_a_run_learns_and_describes_its_adapter(make: Make) -> None:
    settings = make(steps=40, trigger="dmf", prompts=("a lesion",), preview_steps=40)
    result = run(settings)
    assert result.status == 0
    assert result.report["steps"] == 40
    assert result.report["samples_per_s"] > 0
    assert result.report["peak_bytes"] > 1e6
    losses = [loss for _, loss, _ in _curve(settings.out)]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    written = adapter.read(settings.out / "adapter.safetensors")
    assert len(written.layers) == 26
    assert {f.alpha for f in written.layers.values()} == {8.0}
    assert {tuple(f.down.shape)[0] for f in written.layers.values()} == {4}
    assert written.about["trigger"] == "dmf"
    assert json.loads(written.about["data"]) == [
        {"source": "drawn", "licence": "CC0-1.0", "attribution": ""}
    ]
    assert json.loads(written.about["strata"]) == {"benign": 4, "malignant": 4}
    assert len((settings.out / "seen.jsonl").read_text().splitlines()) == 8
    assert (settings.out / "previews" / "0000040.png").is_file()
    assert any((settings.out / "tensorboard").iterdir())


def test_the_adapter_is_what_was_trained(make: Make) -> None:
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders import FluxLoraLoaderMixin

    settings = make(ema=0.0)
    run(settings)
    state = torch.load(settings.out / "state.pt", weights_only=True)
    trainee = Trainee.make(Base.open(settings), settings, torch.device("cpu"))
    with torch.no_grad():
        for name, layer in trainee.layers.items():
            layer.down.copy_(state["weights"][f"{name}.down"])
            layer.up.copy_(state["weights"][f"{name}.up"])
    theirs = FluxTransformer2DModel.from_pretrained(settings.base / "transformer")
    loaded, alphas, metadata = FluxLoraLoaderMixin.lora_state_dict(
        settings.out / "adapter.safetensors", return_alphas=True, return_lora_metadata=True
    )
    FluxLoraLoaderMixin.load_lora_into_transformer(loaded, alphas, theirs, metadata=metadata)
    torch.manual_seed(0)
    noisy, hidden, pooled = torch.randn(2, 4, 16), torch.randn(2, 24, 48), torch.randn(2, 32)
    share = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        ours = trainee(noisy, share, grid=(4, 4), hidden=hidden, pooled=pooled)
        (wanted,) = theirs(
            hidden_states=noisy,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            timestep=share,
            img_ids=torch.tensor([[0.0, r, c] for r in range(2) for c in range(2)]),
            txt_ids=torch.zeros(24, 3),
            guidance=torch.ones(2),
            return_dict=False,
        )
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_to_the_bit(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    run(make("whole"))
    with monkeypatch.context() as patched:
        _at(patched, 3, lambda: os.kill(os.getpid(), number))
        stopped = run(make("parts"))
    # Told of at its end, a step has one more before it.
    assert stopped.status == status
    assert stopped.report["steps"] == 4
    assert not (make("parts").out / "adapter.safetensors").exists()
    assert run(make("parts")).status == 0
    assert _curve(make("parts").out) == _curve(make("whole").out)
    one, two = (load_file(make(name).out / "adapter.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_signal_while_encoding_keeps_what_was_encoded(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = make(cache=tmp_path / "cache", steps=1)
    with monkeypatch.context() as patched:
        # A picture at a time, and the signal comes with the first.
        patched.setattr(encode, "_PIXELS", {"cpu": 1})
        calls = iter(range(100))

        def slow(*given: object) -> object:
            if next(calls) == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return turned(*given)  # type: ignore[arg-type]

        patched.setattr(encode, "turned", slow)
        assert run(settings).status == 143
    (folder,) = (tmp_path / "cache").glob("latents-*")
    assert len(Store(folder)) == 1
    assert run(settings).status == 0
    seen = (settings.out / "seen.jsonl").read_text().splitlines()
    # Equal files share their latents.
    assert len(Store(folder)) == len({json.loads(line)["sha256"] for line in seen})


def test_a_killed_run_goes_on_from_its_last_state(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    run(make("whole"))
    with monkeypatch.context() as patched:
        _at(patched, 4, killed)
        with pytest.raises(KeyboardInterrupt):
            run(make("parts", save_minutes=0))
    # The step that was told of and not saved is told of again.
    assert len(_curve(make("parts").out)) == 4
    assert torch.load(make("parts").out / "state.pt", weights_only=True)["step"] == 3
    run(make("parts"))
    assert _curve(make("parts").out) == _curve(make("whole").out)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_state(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make(save_minutes=0)
    losses, steps = objective.losses, iter(range(10))
    monkeypatch.setattr(
        objective, "losses", lambda *a: losses(*a) * (float("nan") if next(steps) == 2 else 1)
    )
    with pytest.raises(Diverged, match=r"step 3: the loss is nan .*has step 2"):
        run(settings)
    state = torch.load(settings.out / "state.pt", weights_only=True)
    assert state["step"] == 2
    assert all(torch.isfinite(value).all() for value in state["weights"].values())


def test_a_full_disk_stops_with_a_sentence(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.lora.state.torch.save", full)
    with pytest.raises(StateError, match="No space left on device"):
        run(make())


def test_a_disk_that_fills_between_saves_stops_with_a_sentence(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    said: list[object] = []
    monkeypatch.setattr(threading, "excepthook", said.append)
    end = r"/%s \(No space left on device; .*there is no state yet.*run the same command again"
    with monkeypatch.context() as patched:
        patched.setattr(RecordWriter, "write", full)
        with pytest.raises(StateError, match=end % "tensorboard"):
            run(make())
    # The writer's thread prints nothing of its own, and afterwards threads are what they were.
    assert not said
    assert threading.excepthook == said.append

    class Full:
        write = flush = close = full

    def opened(self: Journal) -> None:
        self._lines = Full()

    monkeypatch.setattr(Journal, "_open", opened)
    with pytest.raises(StateError, match="step 1 .*" + end % "log.jsonl"):
        run(make())


def test_a_finished_run_stays_as_it_is(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(make(steps=3)).report
    file = make().out / "adapter.safetensors"
    before, curve = (file.stat().st_ino, file.read_bytes()), _curve(make().out)
    with caplog.at_level("INFO"):
        again = run(make(steps=3)).report
    assert "all 3 steps are done already" in caplog.text
    assert (file.stat().st_ino, file.read_bytes()) == before
    assert (again["loss"], again["steps"]) == (first["loss"], 3)
    assert again["loss"] is not None
    with pytest.raises(StateError, match=r"has step 3 already, and --steps is 2; give --steps 3"):
        run(make(steps=2))
    # An adapter that is gone, or is of another step, is written.
    file.unlink()
    run(make(steps=3))
    assert adapter.read(file).about["loss"] == str(first["loss"])
    _at(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(make(steps=8))
    assert run(make(steps=5)).report["steps"] == 5
    assert adapter.read(file).about["steps"] == "5"
    assert _curve(make().out)[:3] == curve


def test_what_the_data_asks_for_reaches_the_adapter(
    make: Make, dataset: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(dataset, tmp_path / "secret" / "captioned")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    llama = {"name": "Llama-3.2-11B-Vision", "sha256": "ab", "licence": "llama3.2"}
    for number, row in enumerate(rows):
        row["attribution"] = "Clinic A" if number % 4 else "Clinic B"
        model = llama if number % 2 else {"name": "org/hub", "revision": "1"}
        row |= {"text": "a lesion", "caption": {"captioner": "model", "model": model}}
    rows[4]["caption"] = {"captioner": "attributes"}
    # What was captioned and is not trained on binds nobody.
    rows[19]["caption"] = {"model": {"name": "other", "licence": "MIT"}}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(make(steps=1, data=(folder,), prompts=()))
    about = adapter.read(make().out / "adapter.safetensors").about
    assert json.loads(about["data"]) == [
        {"source": "drawn", "licence": "CC0-1.0", "attribution": f"Clinic {name}"} for name in "AB"
    ]
    assert json.loads(about["captions"]) == [
        {**llama, "kind": "captions"},
        {"name": "org/hub", "licence": "unknown", "sha256": "", "kind": "captions"},
    ]
    # Where things lie on a disk is nobody's business.
    assert not [name for name, text in about.items() if str(tmp_path) in text]
    settings = json.loads(about["settings"])
    assert (settings["data"], settings["out"]) == (["captioned"], "run")
    assert str(folder) in (make().out / "settings.json").read_text()


def test_what_cannot_work_is_refused_before_any_work(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in ("foo", "cuda:99"):
        with pytest.raises(EngineError, match=f"torch cannot use the device '{device}'"):
            run(make(device=device))
        assert not make().out.exists()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name: None if name in ("bitsandbytes", "torchao") else found(name),
    )
    with pytest.raises(SettingsError, match="--base-dtype 4bit needs bitsandbytes"):
        run(make(base_dtype="4bit"))
    with pytest.raises(SettingsError, match="--optimizer adamw8bit needs torchao"):
        run(make(optimizer="adamw8bit"))
    with pytest.raises(SettingsError, match="--sizes 7 is smaller than a token of the model, 8 px"):
        run(make(sizes=(32, 7)))
    assert [file.name for file in make().out.iterdir()] == [".lock"]


def test_another_runs_state_is_refused(make: Make, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run(make(steps=2))
    with pytest.raises(StateError, match=r"rank was 4 and is 8.*give another --out"):
        run(make(steps=2, rank=8))
    assert run(make(steps=3)).report["steps"] == 3
    (make().out / "state.pt").write_bytes(b"no state")
    with pytest.raises(DatasetError, match="cannot be used as a state"):
        run(make(steps=3))


def test_accumulating_and_recomputing_change_nothing(make: Make) -> None:
    run(make("plain"))
    run(make("micro", micro=1))
    run(make("recomputed", checkpointing=True))
    plain = torch.tensor(_curve(make("plain").out))
    torch.testing.assert_close(torch.tensor(_curve(make("micro").out)), plain, rtol=1e-4, atol=0)
    again = torch.tensor(_curve(make("recomputed").out))
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=0)
    with pytest.raises(SettingsError, match="--batch 4 is not a multiple"):
        run(make("odd", micro=3))


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp16"])
def test_a_base_of_few_bits_gives_nearly_the_same_losses(make: Make, kind: str) -> None:
    run(make("plain"))
    run(make(kind, base_dtype=kind))
    plain, other = (torch.tensor(_curve(make(name).out))[:, 1] for name in ("plain", kind))
    torch.testing.assert_close(other, plain, rtol=0.03, atol=0)


def test_text_encoders_are_adapted_too(make: Make) -> None:
    settings = make(text_encoders=("text_encoder", "text_encoder_2"), steps=3,
                    prompts=("a lesion",), preview_steps=3)  # fmt: skip
    run(settings)
    layers = adapter.read(settings.out / "adapter.safetensors").layers
    for part in ("text_encoder.", "text_encoder_2."):
        own = [factors for name, factors in layers.items() if name.startswith(part)]
        assert own
        assert any(factors.up.abs().max() > 0 for factors in own), part
    kept = make("kept", keep_encoders=True, steps=3)
    run(kept)
    run(make("cached", steps=3))
    first, second = (torch.tensor(_curve(make(name).out)) for name in ("kept", "cached"))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=0)


def test_encoders_stay_on_disk_where_all_is_cached(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make("first", steps=1))

    def opened(self: Base, name: str, dtype: torch.dtype) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(Base, "part", opened)
    second = make("second", steps=1)
    run(second)
    assert len(_curve(second.out)) == 1


def _strange_chunk(png: bytes) -> bytes:
    """A PNG with a chunk of no name amid its pixels, which Pillow calls a SyntaxError."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = zlib.crc32(name + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + name + body + check

    at = png.index(b"IDAT") - 4
    end = at + 8 + int.from_bytes(png[at : at + 4], "big")
    half = (at + 8 + end) // 2
    first, second = chunk(b"IDAT", png[at + 8 : half]), chunk(b"IDAT", png[half:end])
    return png[:at] + first + chunk(b"\0\1\2\3", b"") + second + png[end + 4 :]


def test_broken_pictures_are_left_out(make: Make, dataset: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dataset, tmp_path / "copied")
    (folder / "000.png").write_bytes(b"no picture")
    (folder / "001.png").unlink()
    half = (folder / "002.png").read_bytes()
    (folder / "002.png").write_bytes(half[: len(half) // 2])
    (folder / "003.png").write_bytes(_strange_chunk((folder / "003.png").read_bytes()))
    settings = make(data=(folder,), steps=2, cache=tmp_path / "cache")
    report = run(settings).report
    assert (report["pictures"], report["left_out"]) == (4, 4)
    listed = json.loads((settings.out / "broken.json").read_text())
    assert sorted(Path(name).name for name in listed) == [f"00{n}.png" for n in range(4)]


def _as_bfl(config: dict[str, int], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' names and tensors -> BFL's: the inverse of `training.lora.bfl`, from its table."""
    from training.lora import bfl

    found: dict[str, torch.Tensor] = {}
    names = {
        **{f"{new}.": f"{old}." for old, new in bfl._TOP.items()},
    }
    for number in range(config["num_layers"]):
        at, to = f"transformer_blocks.{number}.", f"double_blocks.{number}."
        names |= {f"{at}{new}.": f"{to}{old}." for old, new in bfl._DOUBLE.items()}
        for old, three in bfl._QKV.items():
            for kind in ("weight", "bias"):
                found[f"{to}{old}.{kind}"] = torch.cat([state[f"{at}{p}.{kind}"] for p in three])
    for number in range(config["num_single_layers"]):
        at, to = f"single_transformer_blocks.{number}.", f"single_blocks.{number}."
        names |= {f"{at}{new}.": f"{to}{old}." for old, new in bfl._SINGLE.items()}
        for kind in ("weight", "bias"):
            parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            found[f"{to}linear1.{kind}"] = torch.cat([state[f"{at}{p}.{kind}"] for p in parts])
    for key, value in state.items():
        path, _, kind = key.rpartition(".")
        if f"{path}." in names:
            old = names[f"{path}."][:-1]
            found[f"{old}.{'scale' if 'norm.' in old else kind}"] = value
    for kind in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{kind}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    return {name: value.contiguous() for name, value in found.items()}


def test_bfls_single_file_trains_as_the_folder(
    make: Make, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tiny_checkpoint / "transformer"
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "flux.safetensors"
    tensors = _as_bfl(config, state)
    save_file(tensors, file)
    run(make("folder"))
    run(make("single", base=file, encoders=tiny_checkpoint))
    assert _curve(make("single").out) == _curve(make("folder").out)
    with pytest.raises(SettingsError, match="--encoders"):
        run(make("none", base=file))
    tensors.pop("img_in.weight")
    save_file(tensors, file)
    with pytest.raises(BundleError, match=r"1 tensors differ, such as x_embedder.weight"):
        run(make("less", base=file, encoders=tiny_checkpoint))


def test_two_runs_do_not_share_a_folder(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def second() -> None:
        with pytest.raises(StateError, match="another run is writing"):
            run(make())

    _at(monkeypatch, 1, second)
    assert run(make(steps=1)).status == 0


def test_a_pickle_is_refused(make: Make, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises((BundleError, EngineError), match="pickle"):
        run(make(base=folder))


def test_the_command_says_what_is_wrong(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make()
    line = [str(settings.base), "--out", str(settings.out)]
    assert main([*line, "--data", str(tmp_path)]) == 2
    assert "is no dataset" in capsys.readouterr().err
    assert main([*line, "--data", str(settings.data[0]), "--split", "nowhere"]) == 2
    assert "split 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_two_processes_are_one(make: Make, shard: list[str]) -> None:
    one = replace(make("one", steps=3, batch=4), save_minutes=1e3)
    run(one)
    two = make("two").out
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "-m", "training.lora", str(one.base), "--data", str(one.data[0]), "--out", str(two),
               "--cache", str(one.cache), "--sizes", "32", "--steps", "3", "--batch", "4", "--rank",
               "4", "--alpha", "8", "--rate", "1e-2", "--warmup", "2", "--micro", "1"]  # fmt: skip
    command += shard
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["steps"] == 3
    found, wanted = torch.tensor(_curve(two)), torch.tensor(_curve(one.out))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    first, second = (load_file(folder / "adapter.safetensors") for folder in (one.out, two))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4)
