"""Merging: base + adapter within rounding, one tensor at a time, whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dermaflux.errors import DermaFluxError
from training import adapter, merge, merge_files
from training.adapter import Adapter, Factors
from training.merge import Settings

ABOUT = {
    "data": json.dumps([{"source": "HAM10000", "licence": "CC-BY-NC-4.0"}]),
    "data_sha256": "ab" * 32,
    "settings": json.dumps({"rank": 2, "rate": 1e-4}),
}
Q = "transformer.transformer_blocks.0.attn.to_q"


def state(folder: Path) -> dict[str, Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.fixture
def base(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with its transformer in bf16 shards."""
    from diffusers import FluxTransformer2DModel

    folder = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, folder)
    shutil.rmtree(folder / "transformer")
    model = FluxTransformer2DModel.from_pretrained(tiny_checkpoint / "transformer")
    model.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="60KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    return folder


def drawn(base: Path, seed: int = 0, only: str = "", rank: int = 2) -> Adapter:
    """An adapter over all linears of the blocks and of CLIP."""
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        for name, tensor in state(base / part).items():
            layer = f"{part}.{name.removeprefix('text_model.').removesuffix('.weight')}"
            inside = any(one in name for one in ("blocks", "layers", "SelfAttention", "proj_out"))
            if name.endswith(".weight") and tensor.dim() == 2 and inside and only in layer:
                if "relative" in name:
                    continue
                down = torch.randn(rank, tensor.shape[1], generator=draw)
                up = torch.randn(tensor.shape[0], rank, generator=draw)
                layers[layer] = Factors(down, 0.03 * up, 3.0)
    return Adapter(layers, dict(ABOUT))


def saved(path: Path, given: Adapter, layout: str = "diffusers") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter.write(path, given, layout)
    return path


def merged(base: Path, out: Path, *adapters: tuple[Path, float], **more) -> dict:
    return merge.merge(Settings(base, adapters, out, **more))


def name_of(layer: str, names: dict[str, Tensor]) -> str:
    rest = layer.partition(".")[2] + ".weight"
    return rest if rest in names else f"text_model.{rest}"


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_every_weight_is_base_plus_delta_rounded_once(base, tmp_path, layout):
    given = drawn(base)
    assert len(given.layers) > 40
    file = saved(tmp_path / "a.safetensors", given, layout)
    merged(base, tmp_path / "out", (file, 0.5), scale=3.0)
    changed = 0
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae", "classifier"):
        before, after = state(base / part), state(tmp_path / "out" / part)
        expected = dict(before)
        for layer, one in given.layers.items():
            if layer.startswith(f"{part}."):
                name = name_of(layer, before)
                total = before[name].float().addmm(one.up, one.down, alpha=one.scale * 1.5)
                expected[name] = total.to(before[name].dtype)
                changed += not torch.equal(expected[name], before[name])
        assert after.keys() == before.keys()
        for name, tensor in expected.items():
            assert after[name].dtype == tensor.dtype, name
            if layout == "diffusers":
                assert torch.equal(after[name], tensor), name
            else:
                torch.testing.assert_close(after[name], tensor)
    assert changed == len(given.layers)


def test_the_merged_pipeline_moves_as_base_and_adapter_do(base, tmp_path):
    from diffusers import FluxPipeline

    def images(folder: Path, lora: Path | None = None) -> Tensor:
        pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if lora:
            pipeline.load_lora_weights(lora)
        made = pipeline(
            "malignant lesion, black", height=32, width=32, num_inference_steps=2,
            max_sequence_length=24, generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )  # fmt: skip
        return made.images

    # diffusers has no place for an adapter of T5.
    whole = drawn(base)
    layers = {n: f for n, f in whole.layers.items() if not n.startswith("text_encoder_2")}
    file = saved(tmp_path / "lora/pytorch_lora_weights.safetensors", Adapter(layers, whole.about))
    merged(base, tmp_path / "out", (file, 1.0), dtype="fp32")
    before = images(base)
    together, after = images(base, file.parent), images(tmp_path / "out")
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(after, together, rtol=1e-3, atol=1e-4)


def test_the_exported_graph_is_base_and_adapter(tiny_checkpoint, tmp_path):
    from diffusers import FluxPipeline

    from dermaflux.checkpoint import Checkpoint
    from dermaflux.engines.ort import OrtEngine
    from export.shapes import Size, examples
    from export.trace import trace, write

    file = saved(
        tmp_path / "lora/pytorch_lora_weights.safetensors",
        drawn(tiny_checkpoint, only="transformer"),
    )
    merged(tiny_checkpoint, tmp_path / "out", (file, 1.0))
    given = examples(Checkpoint.open(tiny_checkpoint), "transformer", Size(2, 32, 32))
    graph = tmp_path / "model.onnx"
    write(trace(tmp_path / "out", "transformer", given), graph)
    (found,) = OrtEngine(graph, "fp32").run(given).values()
    pipeline = FluxPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32)

    def eager() -> Tensor:
        with torch.no_grad():
            return pipeline.transformer(**{k: torch.from_numpy(v) for k, v in given.items()}).sample

    before = eager()
    pipeline.load_lora_weights(file.parent)
    together = eager()
    assert (together - before).abs().max() > 0.1
    torch.testing.assert_close(torch.from_numpy(found), together, rtol=1e-4, atol=1e-5)


def test_scale_nought_and_weight_nought_are_the_base_bit_for_bit(base, tmp_path):
    file = saved(tmp_path / "a.safetensors", drawn(base))
    for out, weight, scale in (("one", 1.0, 0.0), ("two", 0.0, 1.0)):
        merged(base, tmp_path / out, (file, weight), scale=scale)
        for path in base.rglob("*.safetensors"):
            other = tmp_path / out / path.relative_to(base)
            assert other.read_bytes() == path.read_bytes()


def test_adapters_sum_in_any_order(base, tmp_path):
    first = saved(tmp_path / "a.safetensors", drawn(base, 1, "attn"))
    second = saved(tmp_path / "b.safetensors", drawn(base, 2), "kohya")
    merged(base, tmp_path / "ab", (first, 0.7), (second, -0.3), dtype="fp32")
    merged(base, tmp_path / "ba", (second, -0.3), (first, 0.7), dtype="fp32")
    merged(base, tmp_path / "a", (first, 0.7), dtype="fp32")
    merged(tmp_path / "a", tmp_path / "a-b", (second, -0.3), dtype="fp32")
    for part in ("transformer", "text_encoder"):
        once = state(tmp_path / "ab" / part)
        for other in ("ba", "a-b"):
            for name, tensor in state(tmp_path / other / part).items():
                torch.testing.assert_close(tensor, once[name])
    before = state(base / "transformer")
    one, two = (adapter.read(path).layers for path in (first, second))
    total = 0.7 * one[Q].delta() - 0.3 * two[Q].delta()
    name = name_of(Q, before)
    got = state(tmp_path / "ab" / "transformer")[name] - before[name].float()
    torch.testing.assert_close(got, total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_another_type(base, tmp_path, name, dtype):
    file = saved(tmp_path / "a.safetensors", drawn(base, only=Q))
    out = tmp_path / "out"
    merged(base, out, (file, 1.0), dtype=name)
    assert {tensor.dtype for tensor in state(out / "transformer").values()} == {dtype}
    assert {tensor.dtype for tensor in state(out / "text_encoder").values()} == {torch.float32}
    index = json.loads(next((out / "transformer").glob("*.index.json")).read_text())
    bytes_of = sum(t.numel() * t.element_size() for t in state(out / "transformer").values())
    assert index["metadata"]["total_size"] == bytes_of
    for key, shard in index["weight_map"].items():
        with safe_open(out / "transformer" / shard, "pt") as opened:
            assert key in opened.keys()  # noqa: SIM118
            assert opened.metadata() == {"format": "pt"}


def test_a_sum_that_does_not_fit_its_type(base, tmp_path):
    file = saved(tmp_path / "a.safetensors", drawn(base, only=Q))
    with pytest.raises(DermaFluxError, match=r"to_q.weight does not fit torch.float16 .* bf16"):
        merged(base, tmp_path / "out", (file, 1e7), dtype="fp16")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_what_is_copied_and_what_is_not(base, tmp_path):
    files = {
        "README.md": "card", "LICENSE.md": "terms", "report.json": "{}", ".git/config": "x",
        "flux1-dev.safetensors": "x", "transformer/diffusion_pytorch_model.bin": "x",
        "classifier/report.json": "{}",
    }  # fmt: skip
    for name, text in files.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    os.symlink(base, base / "vae" / "endless")
    (base / "scheduler").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", base / "scheduler")
    file = saved(tmp_path / "a.safetensors", drawn(base, only=Q))
    made = merged(base, tmp_path / "out", (file, 1.0))
    assert sorted(made["left_out"]) == [
        "flux1-dev.safetensors", "report.json", "transformer/diffusion_pytorch_model.bin",
    ]  # fmt: skip
    out = tmp_path / "out"
    for name in ("README.md", "LICENSE.md", "classifier/report.json", "classifier/config.json",
                 "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):  # fmt: skip
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not (out / "vae" / "endless").exists()
    assert not (out / ".git").exists()
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_provenance(base, tmp_path):
    run = saved(tmp_path / "runs" / "melanoma" / "adapter.safetensors", drawn(base, only=Q))
    made = merged(base, tmp_path / "out", (run.parent, 0.5), scale=2.0)
    stated = json.loads((tmp_path / "out" / "provenance.json").read_text())
    old = json.loads((base / "provenance.json").read_text())
    assert (stated["name"], stated["base"]) == ("out", "tiny")
    assert (stated["wording"], stated["defaults"]) == (old["wording"], old["defaults"])
    assert stated["licence"] == made["licence"] == "CC-BY-NC-4.0"
    (one,) = stated["adapters"]
    assert (one["name"], one["weight"], one["layers"]) == ("melanoma", 0.5, 1)
    assert one["sha256"] == hashlib.sha256(run.read_bytes()).hexdigest()
    assert one["about"]["data_sha256"] == "ab" * 32
    assert one["about"]["settings"] == {"rank": 2, "rate": 1e-4}
    assert {"name": "HAM10000", "licence": "CC-BY-NC-4.0"}.items() <= stated["ingredients"][
        -1
    ].items()
    assert stated["training"]["recipe"] == "training.merge"
    assert stated["training"]["scale"] == 2.0
    from dermaflux.checkpoint import Checkpoint

    assert Checkpoint.open(tmp_path / "out").defaults.steps == 3


def test_a_downloaded_base_says_its_licence_in_its_card(base, tmp_path):
    (base / "provenance.json").unlink()
    file = saved(tmp_path / "a.safetensors", drawn(base, only=Q))
    with pytest.raises(DermaFluxError, match=r"base \(unknown\) states no licence"):
        merged(base, tmp_path / "out", (file, 1.0))
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\n---\n# FLUX.1\n"
    )
    made = merged(base, tmp_path / "out", (file, 1.0))
    assert made["licence"] == "LicenseRef-FLUX.1-dev-NC AND CC-BY-NC-4.0"
    assert any("Attribution Notice" in duty for duty in made["duties"])
    assert made["uses"] == ["private", "research"]


def test_licences_that_forbid_it(base, tmp_path):
    given = drawn(base, only=Q)
    none = saved(tmp_path / "mystery.safetensors", Adapter(given.layers))
    with pytest.raises(
        DermaFluxError, match=r"mystery \(unknown\) states no licence.*by name: unk"
    ):
        merged(base, tmp_path / "out", (none, 1.0))
    assert not (tmp_path / "out").exists()
    assert (
        merged(base, tmp_path / "out", (none, 1.0), accepted=("unknown",))["licence"] == "unknown"
    )
    ham = saved(tmp_path / "ham.safetensors", given)
    with pytest.raises(DermaFluxError, match=r"HAM10000 \(CC-BY-NC-4.0\) forbids commercial use"):
        merged(base, tmp_path / "b", (ham, 1.0), use="commercial")
    merged(base, tmp_path / "b", (ham, 1.0), use="commercial", accepted=("CC BY-NC 4.0",))
    about = {"licences": json.dumps([{"name": "captions", "licence": "llama3.2"}])}
    llama = saved(tmp_path / "llama.safetensors", Adapter(given.layers, about))
    with pytest.raises(DermaFluxError, match="begins with 'Llama', not c"):
        merged(base, tmp_path / "c", (llama, 1.0))
    merged(base, tmp_path / "Llama-c", (llama, 1.0))


def test_an_adapter_is_made_of_the_base_that_it_was_trained_on(base, tmp_path, caplog):
    given = drawn(base, only=Q)

    def made(name: str, **about: str) -> dict:
        file = saved(tmp_path / f"{name}.safetensors", Adapter(given.layers, ABOUT | about))
        return merged(base, tmp_path / f"out-{name}", (file, 1.0))

    told = made("a", base="FLUX.1-dev", base_licence="flux-1-dev-non-commercial-license")
    assert told["licence"] == "LicenseRef-FLUX.1-dev-NC AND CC-BY-NC-4.0"
    assert "a was trained on FLUX.1-dev, and is merged into tiny" in caplog.text
    caplog.clear()
    with pytest.raises(DermaFluxError, match=r"other \(unknown\) states no licence"):
        made("b", base="other", base_licence="unknown: nobody knows")
    assert made("c", base="tiny", base_licence="unknown")["licence"] == "CC-BY-NC-4.0"
    assert made("d", base="tiny", base_licence="Apache-2.0", data="[]", licence="MIT")["uses"] == [
        "private", "research", "commercial",
    ]  # fmt: skip
    with pytest.raises(DermaFluxError, match=r"e \(unknown\) states no licence"):
        made("e", base="tiny", base_licence="Apache-2.0", data="[]")
    with pytest.raises(DermaFluxError, match="names an ingredient 'HAM'; needed are objects"):
        made("f", data='["HAM"]')


def test_layers_that_do_not_fit_are_listed(base, tmp_path):
    shape = (torch.ones(2, 7), torch.ones(32, 2))
    layers = {
        "transformer.transformer_blocks.9.attn.to_q": Factors(*shape, 1.0),
        Q: Factors(*shape, 1.0),
    }
    file = saved(tmp_path / "a.safetensors", Adapter(layers, dict(ABOUT)))
    with pytest.raises(DermaFluxError) as refused:
        merged(base, tmp_path / "out", (file, 1.0))
    assert "transformer.transformer_blocks.9.attn.to_q is not there" in str(refused.value)
    assert f"{Q} is 32x32 there, 32x7 here" in str(refused.value)
    many = {
        f"transformer.transformer_blocks.{i}.attn.to_q": Factors(*shape, 1.0) for i in range(1, 20)
    }
    file = saved(tmp_path / "b.safetensors", Adapter(many, dict(ABOUT)))
    with pytest.raises(DermaFluxError, match="and 14 more. Use the base"):
        merged(base, tmp_path / "out", (file, 1.0))


def test_bases_and_places_that_cannot_be(base, tmp_path):
    file = saved(tmp_path / "a.safetensors", drawn(base, only=Q))
    single = tmp_path / "flux1-dev.safetensors"
    save_file({"img_in.weight": torch.ones(1)}, single)
    with pytest.raises(DermaFluxError, match="from_single_file.*save_pretrained"):
        merged(single, tmp_path / "out", (file, 1.0))
    with pytest.raises(DermaFluxError, match="no model_index.json"):
        merged(tmp_path, tmp_path / "out", (file, 1.0))
    with pytest.raises(DermaFluxError, match="is there already"):
        merged(base, base, (file, 1.0))
    with pytest.raises(DermaFluxError, match="cannot be read: No such file"):
        merged(base, tmp_path / "out", (tmp_path / "none.safetensors", 1.0))
    shard = sorted((base / "transformer").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(DermaFluxError, match="the base cannot be used: .* was cut"):
        merged(base, tmp_path / "out", (file, 1.0))
    shard.unlink()
    with pytest.raises(DermaFluxError, match="lacks .*, which its index names"):
        merged(base, tmp_path / "out", (file, 1.0))
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_leaves_nothing(base, tmp_path, monkeypatch, capsys):
    file = saved(tmp_path / "a.safetensors", drawn(base))
    arguments = [str(base), str(file), "--out", str(tmp_path / "out")]
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(merge_files.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert merge.main(arguments) == 2
    assert "0.0 GB free, and 0.0 GB are needed" in capsys.readouterr().err
    written = []

    def full(*given):
        written.append(given)
        if len(written) > 2:
            raise OSError(28, "No space left on device", "shard")
        return real(*given)

    real = merge.tensors.write
    monkeypatch.setattr(merge.tensors, "write", full)
    assert merge.main(arguments) == 2
    assert "error: shard: No space left on device" in capsys.readouterr().err
    assert len(written) == 3
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.merging").exists()


STOPPED = """
import os, sys
from training import merge, tensors
real, count = tensors.write, []
def write(*given):
    count.append(given)
    if len(count) > 2:
        os.kill(os.getpid(), int(sys.argv[1]))
    return real(*given)
tensors.write = write
sys.exit(merge.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_merge_leaves_no_result_and_the_next_clears_away(base, tmp_path, number):
    file = saved(tmp_path / "a.safetensors", drawn(base))
    arguments = [str(base), f"{file}:0.5", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, str(int(number)), *arguments],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    left = tmp_path / ".out.merging"
    assert not (tmp_path / "out").exists()
    if number == signal.SIGKILL:
        assert done.returncode == -signal.SIGKILL
        assert list(left.rglob("*.safetensors"))
        # Another run that is still writing is told from one that died.
        handle = os.open(left, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert merge.main(arguments) == 2
        os.close(handle)
        assert list(left.rglob("*.safetensors"))
    else:
        assert (done.returncode, done.stdout) == (130, "")
        assert "stopped; nothing was written" in done.stderr
        assert not left.exists()
    assert merge.main(arguments) == 0
    assert not left.exists()
    assert len(state(tmp_path / "out" / "transformer")) == len(state(base / "transformer"))


def test_the_command(base, tmp_path, capsys):
    file = saved(tmp_path / "a.safetensors", drawn(base, only=Q))
    out = tmp_path / "made" / "here"
    status = merge.main([str(base), f"{file}:0.25", str(file), "--out", str(out), "--scale", "2"])
    said = capsys.readouterr()
    assert status == 0
    last = json.loads(said.out.splitlines()[-1])
    assert (last["out"], last["adapters"], last["layers"]) == (str(out), 2, 1)
    assert "merging" in said.err
    for wrong in (f"{file}:nan", "--scale=inf", "--dtype=int8"):
        with pytest.raises(SystemExit):
            merge.main([str(base), str(file), "--out", str(out), wrong])


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("runs/a:b.safetensors", "runs/a:b.safetensors", 1.0),
        ("a:-1e-1", "a", -0.1),
    ],
)
def test_weights_behind_a_colon(text, path, weight):
    assert merge.weighted(text) == (Path(path), weight)


LLAMA = {
    "name": "Llama-3.2-11B-Vision", "licence": "llama3.2", "sha256": "cd" * 32, "kind": "captions",
}  # fmt: skip
CC0 = {"data": json.dumps([{"source": "ISIC 2017", "licence": "CC0-1.0"}])}


def test_the_licence_of_captions_and_whom_data_are_to_be_attributed_to(base, tmp_path):
    data = [{"source": "ISIC 2019", "licence": "CC BY 4.0", "attribution": "Hospital Clinic"}]
    about = {"data": json.dumps(data), "captions": json.dumps([LLAMA])}
    file = saved(tmp_path / "a.safetensors", Adapter(drawn(base, only=Q).layers, about))
    with pytest.raises(DermaFluxError, match=r"11B-Vision .*begins with 'Llama', not out"):
        merged(base, tmp_path / "out", (file, 1.0))
    made = merged(base, tmp_path / "Llama-out", (file, 1.0))
    assert made["licence"] == "LicenseRef-Llama-3.2"
    assert any("Built with Llama" in duty for duty in made["duties"])
    stated = json.loads((tmp_path / "Llama-out" / "provenance.json").read_text())
    assert "Hospital Clinic" in stated["attributions"]
    found = {one["name"]: one for one in stated["ingredients"]}
    assert found["ISIC 2019"]["attribution"] == "Hospital Clinic"
    assert LLAMA.items() <= found["Llama-3.2-11B-Vision"].items()


def test_captions_stand_for_no_data_and_have_to_be_a_list(base, tmp_path):
    layers = drawn(base, only=Q).layers
    for name, captions, words in (
        ("a", json.dumps([LLAMA | {"licence": "MIT"}]), r"a \(unknown\) states no licence"),
        ("b", json.dumps(LLAMA), "has captions .* JSON list of objects with name and licence"),
        ("c", "[" * 100_000, "has captions .* JSON list of objects with name and licence"),
        ("d", '["Llama"]', "needed are objects with name and licence"),
    ):
        file = saved(tmp_path / f"{name}.safetensors", Adapter(layers, {"captions": captions}))
        with pytest.raises(DermaFluxError, match=words):
            merged(base, tmp_path / "out", (file, 1.0))


def test_the_terms_of_a_classifier_that_is_copied_count(base, tmp_path, capsys):
    stated = json.loads((base / "provenance.json").read_text())
    stated["ingredients"] = [
        {"name": "ISIC", "kind": "data", "licence": "CC0-1.0", "used_for": "generator"},
        {"name": "HAM", "kind": "data", "licence": "CC BY-NC 4.0", "used_for": "classifier"},
    ]
    (base / "provenance.json").write_text(json.dumps(stated))
    free = saved(tmp_path / "a.safetensors", Adapter(drawn(base, only=Q).layers, CC0))
    arguments = [str(base), str(free), "--use", "commercial", "--out"]
    assert merge.main([*arguments, str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "HAM (CC-BY-NC-4.0) forbids commercial use" in said
    assert "--without-classifier leaves classifier/ out" in said
    made = merged(base, tmp_path / "both", (free, 1.0))
    assert (made["licence"], made["uses"]) == ("CC-BY-NC-4.0", ["private", "research"])
    assert merge.main([*arguments, str(tmp_path / "out"), "--without-classifier"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["licence"], last["uses"][-1]) == ("Apache-2.0", "commercial")
    assert "classifier/config.json" in last["left_out"]
    assert not (tmp_path / "out" / "classifier").exists()
    written = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert [one["name"] for one in written["ingredients"]] == ["ISIC", "ISIC 2017"]
    # Where the adapter forbids it, leaving the classifier out is no way.
    ham = saved(tmp_path / "b.safetensors", drawn(base, only=Q))
    shutil.rmtree(base / "classifier")
    with pytest.raises(DermaFluxError) as refused:
        merged(base, tmp_path / "c", (ham, 1.0), use="commercial")
    assert "classifier" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{bad", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "holds a list"),
        ('{"weight_map": []}', "a weight_map that is a list"),
        ('{"weight_map": {"a": 1}}', "the file name 1"),
        ('{"metadata": 3}', "metadata that is a int"),
    ],
)
def test_an_index_that_is_none(base, tmp_path, text, words):
    file = saved(tmp_path / "a.safetensors", drawn(base, only=Q))
    index = next((base / "transformer").glob("*.index.json"))
    index.write_text(text)
    with pytest.raises(DermaFluxError, match=f"index.json .*{words}.*get the base again"):
        merged(base, tmp_path / "out", (file, 1.0))
    with pytest.raises(DermaFluxError, match=words):
        merge_files.count(index)


def test_adapters_of_one_name_are_told_apart(base, tmp_path):
    layers = drawn(base, only=Q).layers

    def named(path: str, wording: str) -> Path:
        about = CC0 | {"name": "a", "wording": wording}
        return saved(tmp_path / path, Adapter(layers, about))

    files = named("a/adapter.safetensors", "1"), named("a/step-9.safetensors", "2")
    merged(base, tmp_path / "out", *((file, 0.5) for file in files))
    stated = json.loads((tmp_path / "out" / "provenance.json").read_text())["adapters"]
    assert [one["name"] for one in stated] == ["a (adapter.safetensors)", "a (step-9.safetensors)"]
    assert [one["file"] for one in stated] == [file.name for file in files]
    other = named("b/adapter.safetensors", "3")
    merged(base, tmp_path / "two", (files[0], 0.5), (other, 0.5))
    stated = json.loads((tmp_path / "two" / "provenance.json").read_text())["adapters"]
    assert [one["name"] for one in stated] == [f"a ({one['sha256'][:8]})" for one in stated]
    assert len({one["name"] for one in stated}) == 2


def test_an_adapter_of_weight_nought_is_no_ingredient(base, tmp_path, caplog):
    layers = drawn(base, only=Q).layers
    none = saved(tmp_path / "mystery.safetensors", Adapter(layers))
    free = saved(tmp_path / "free.safetensors", Adapter(layers, CC0))
    made = merged(base, tmp_path / "out", (none, 0.0), (free, 1.0))
    assert "mystery has the weight 0 and the scale 1, so nothing of it is merged" in caplog.text
    assert "free" not in caplog.text
    assert made["adapters"] == 1
    assert "mystery" not in (tmp_path / "out" / "provenance.json").read_text()


def test_a_licence_without_a_name_is_not_accepted(base, tmp_path, capsys):
    none = saved(tmp_path / "a.safetensors", Adapter(drawn(base, only=Q).layers))
    arguments = [str(base), str(none), "--out", str(tmp_path / "out"), "--accept-licence"]
    assert merge.main([*arguments, ""]) == 2
    assert "error: '' names no licence" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert merge.main([*arguments, "unknown"]) == 0


@pytest.mark.parametrize("ingredients", ["x", {"a": 1}, ["x"]])
def test_ingredients_of_a_base_that_are_none(base, tmp_path, ingredients):
    stated = json.loads((base / "provenance.json").read_text()) | {"ingredients": ingredients}
    (base / "provenance.json").write_text(json.dumps(stated))
    file = saved(tmp_path / "a.safetensors", drawn(base, only=Q))
    with pytest.raises(DermaFluxError, match="provenance.json has ingredients .* get the base"):
        merged(base, tmp_path / "out", (file, 1.0))
