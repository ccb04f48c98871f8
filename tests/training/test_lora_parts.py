"""The parts of a LoRA run: layers, draws, objective, buckets, caches, optimizers."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import nn

from dermaflux import flow
from dermaflux.dataset import Record
from dermaflux.errors import DermaFluxError
from dermaflux.flow import Schedule
from training.lora import encode, layers, objective, optimizers
from training.lora.corpus import Item, buckets, pixels, place
from training.lora.draws import Draws, noise
from training.lora.float8 import Float8Linear
from training.lora.layers import LoraLinear, inject, targets
from training.lora.settings import Settings, SettingsError, parsed
from training.lora.state import StateError, cut_log, load_optimizer, whole, write
from training.lora.store import Store


def _settings(**changes: object) -> Settings:
    given = {"base": Path("base"), "data": (Path("data"),), "out": Path("out"), **changes}
    return Settings(**given)  # type: ignore[arg-type]


def _items(counts: dict[str, int], size: tuple[int, int] = (32, 32)) -> list[Item]:
    return [
        Item(Path(f"{label}{n}"), Record(f"{label}{n}", "benign"), label, size, (label,), f"{n}")
        for label, count in counts.items()
        for n in range(count)
    ]


@pytest.mark.parametrize("rows", [2, 400])
@pytest.mark.parametrize("alpha", [8.0, 4.0])
def test_layer_computes_what_peft_computes(rows: int, alpha: float) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16))
    theirs = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16))
    theirs.load_state_dict(plain.state_dict())
    own = inject(plain, ["0", "2"], rank=8, alpha=alpha, seed=0)
    theirs = inject_adapter_in_model(
        LoraConfig(r=8, lora_alpha=alpha, target_modules=["0", "2"]), theirs
    )
    for name, layer in own.items():
        nn.init.normal_(layer.up)
        twin = theirs.get_submodule(name)
        twin.lora_A["default"].weight.data.copy_(layer.down.data)
        twin.lora_B["default"].weight.data.copy_(layer.up.data)
    x = torch.randn(3, rows, 24)
    ours = x.clone().requires_grad_(True)
    other = x.clone().requires_grad_(True)
    one, two = plain(ours), theirs(other)
    torch.testing.assert_close(one, two)
    one.square().sum().backward()
    two.square().sum().backward()
    torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-4)
    for name, layer in own.items():
        twin = theirs.get_submodule(name)
        for mine, yours in ((layer.down, "lora_A"), (layer.up, "lora_B")):
            wanted = getattr(twin, yours)["default"].weight.grad
            torch.testing.assert_close(mine.grad, wanted, rtol=1e-4, atol=1e-2)
        assert layer.base.weight.grad is None


def test_both_ways_to_compute_are_used_and_begin_as_the_base() -> None:
    assert layers._merging_pays(400, torch.Size([40, 24]), 8)
    assert not layers._merging_pays(2, torch.Size([40, 24]), 8)
    base = nn.Linear(24, 40)
    x = torch.randn(4, 24)
    assert torch.equal(LoraLinear(base, 8, 8.0, seed=1)(x), base(x))


def test_layers_draws_do_not_depend_on_their_neighbours() -> None:
    both = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    one = nn.ModuleDict({"b": nn.Linear(4, 4)})
    first = inject(both, ["a", "b"], 2, 2.0, seed=3)["b"].down
    assert torch.equal(first, inject(one, ["b"], 2, 2.0, seed=3)["b"].down)


def test_all_linears_of_flux_are_494() -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    assert len(targets(model, ("*",))) == 494
    assert len(targets(model, ("single_transformer_blocks.*.attn.to_q",))) == 38
    with pytest.raises(SettingsError, match=r"attn2.*matches none of the 494"):
        targets(model, ("*.attn2.*",))


def test_float8_rounds_to_within_its_mantissa_and_passes_gradients() -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 32)
    small = Float8Linear.of(base)
    x = torch.randn(5, 64, requires_grad=True)
    assert (small(x) - base(x)).norm() / base(x).norm() < 0.05
    small(x).sum().backward()
    assert x.grad is not None
    close = base.weight.detach().sum(0).expand(5, -1)
    assert (x.grad - close).norm() / close.norm() < 0.1
    assert not list(small.parameters())


def test_strata_are_drawn_equally_and_none_twice_before_all() -> None:
    draws = Draws(_items({"rare": 5, "common": 995}), seed=0, batch=10, turns=4, dropout=0.25)
    seen = np.concatenate([draws.batch(step).items for step in range(200)])
    assert abs(np.mean(seen < 5) - 0.5) < 0.04
    counts = np.bincount(seen[seen < 5], minlength=5)
    assert counts.max() - counts.min() <= 1
    common = seen[seen >= 5]
    assert len(set(common[:995])) == 995


def test_unbalanced_draws_follow_the_counts_over_buckets() -> None:
    plain = [
        Item(Path(str(n)), Record("x", "benign"), "", (32, 32) if n < 75 else (48, 16), (), str(n))
        for n in range(100)
    ]
    draws = Draws(plain, seed=1, batch=4, turns=1, dropout=0.0)
    batches = [draws.batch(step) for step in range(1000)]
    wide = np.mean([batch.bucket == (48, 16) for batch in batches])
    assert abs(wide - 0.25) < 0.05
    for batch in batches[:50]:
        assert {plain[i].bucket for i in batch.items} == {batch.bucket}


def test_draws_go_on_where_they_stopped() -> None:
    items = _items({"a": 7, "b": 30})
    whole = Draws(items, seed=5, batch=4, turns=4, dropout=0.5)
    every = [whole.batch(step) for step in range(40)]
    first = Draws(items, seed=5, batch=4, turns=4, dropout=0.5)
    for step in range(17):
        first.batch(step)
    later = Draws(items, seed=5, batch=4, turns=4, dropout=0.5)
    later.counters = first.counters
    for step in range(17, 40):
        again = later.batch(step)
        for name in ("items", "turns", "dropped", "uniform"):
            assert np.array_equal(getattr(again, name), getattr(every[step], name)), name


def test_a_step_costs_the_same_among_400_000() -> None:
    items = [*_items({"malignant": 393}), *_items({"benign": 1}) * 400_000]
    draws = Draws(items, seed=0, batch=64, turns=4, dropout=0.1)
    draws.batch(0)
    start = time.process_time()
    for step in range(1, 51):
        draws.batch(step)
    assert (time.process_time() - start) / 50 < 0.02


def test_uniform_numbers_leave_no_gap() -> None:
    draws = Draws(_items({"a": 3}), seed=0, batch=8, turns=1, dropout=0.0)
    for step in range(20):
        assert sorted((draws.batch(step).uniform * 8).astype(int)) == list(range(8))


def test_noise_is_normal_and_its_own_for_every_place() -> None:
    one = noise(0, 3, 1, (64, 64))
    assert np.array_equal(one, noise(0, 3, 1, (64, 64)))
    assert not np.array_equal(one, noise(0, 3, 2, (64, 64)))
    assert not np.array_equal(one, noise(0, 4, 1, (64, 64)))
    assert abs(one.mean()) < 0.05
    assert abs(one.std() - 1) < 0.05


def test_shares_have_the_moments_of_their_kind() -> None:
    uniform = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    dynamic = Schedule(shift=3.0, use_dynamic_shifting=True)
    assert torch.equal(objective.shares(uniform, "uniform", dynamic, 64), uniform.float())
    normal = torch.logit(objective.shares(uniform, "logit-normal", dynamic, 64))
    assert abs(normal.mean()) < 1e-3
    assert abs(normal.std() - 1) < 0.01
    shifted = torch.logit(objective.shares(uniform, "shifted", dynamic, 4096))
    # FLUX.1's scheduler shifts 4,096 tokens by 1.15.
    torch.testing.assert_close(shifted - normal, torch.full((1000,), 1.15), atol=1e-3, rtol=0)
    constant = objective.shift(Schedule(shift=3.0), 64)
    assert math.isclose(constant, math.log(3), abs_tol=1e-6)


def test_the_velocity_leads_from_noise_to_the_picture() -> None:
    clean, mess = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    share = torch.tensor([0.9, 0.4])
    mixed = objective.mixed(clean, mess, share)
    velocity = mess - clean
    torch.testing.assert_close(mixed - share[:, None, None] * velocity, clean)
    assert torch.equal(objective.losses(velocity, clean, mess), torch.zeros(2))
    latents = torch.randn(2, 4, 6, 8)
    assert np.array_equal(objective.pack(latents).numpy(), flow.pack(latents.numpy()))


def test_buckets_keep_area_and_ratio() -> None:
    for size, near in buckets((512, 256), 2.0, 16).items():
        assert near[0] == (size, size)
        for height, width in near:
            assert height % 16 == width % 16 == 0
            assert 0.7 * size * size < height * width <= size * size
            assert max(height, width) <= 2 * min(height, width)
    known = buckets((512, 256), 2.0, 16)
    assert place(600, 450, known) == (448, 576)
    assert place(450, 600, known) == (576, 448)
    assert place(300, 300, known) == (256, 256)
    assert place(10, 1000, known) == max(known[256])


def test_pixels_cover_the_bucket_around_the_centre(tmp_path: Path) -> None:
    columns = np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (50, 1, 3))
    Image.fromarray(columns).save(tmp_path / "a.png")
    digest = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    item = Item(tmp_path / "a.png", Record("a.png", "benign"), "", (50, 50), (), digest)
    assert np.array_equal(pixels(item)[0, :, 0], np.arange(25, 75))
    other = Item(item.file, item.record, "", (50, 50), (), "0" * 64)
    with pytest.raises(DermaFluxError, match="checksum"):
        pixels(other)


def test_store_keeps_what_was_flushed_and_refuses_damage(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", writing=True)
    store.add("a", torch.arange(6, dtype=torch.float16).reshape(2, 3))
    store.flush()
    store.add("b", torch.randn(4))
    again = Store(tmp_path / "s")
    assert "a" in again
    assert "b" not in again
    assert torch.equal(again.get("a"), torch.arange(6, dtype=torch.float16).reshape(2, 3))
    store.flush()
    assert len(Store(tmp_path / "s")) == 2
    shard = min((tmp_path / "s").iterdir())
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(DermaFluxError, match=r"is damaged .*delete it"):
        Store(tmp_path / "s")


def test_room_is_told_in_a_unit_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2_000))
    with pytest.raises(DermaFluxError, match=r"needs 3\.1 MB more, and 2\.0 kB are free"):
        encode._require_room(tmp_path, 3_100_000)


def test_rate_rises_and_falls() -> None:
    settings = _settings(rate=1.0, warmup=10, steps=110)
    rates = [optimizers.rate(step, settings) for step in range(110)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert math.isclose(rates[60], 0.5)
    assert rates[109] < 0.001
    assert sorted(rates[10:], reverse=True) == rates[10:]
    constant = _settings(rate=1.0, warmup=10, steps=110, schedule="constant")
    assert optimizers.rate(109, constant) == 1.0


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_optimizers_go_on_from_their_state(name: str) -> None:
    settings = _settings(optimizer=name, rate=1.0 if name == "prodigy" else 0.1)

    def begun() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        value = nn.Parameter(torch.ones(3, 2))
        return value, optimizers.make(settings, [value])

    def step(value: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        (value - 2).square().sum().backward()
        optimizers.set_rate(optimizer, settings.rate)
        optimizer.step()
        optimizer.zero_grad()

    value, optimizer = begun()
    for _ in range(3):
        step(value, optimizer)
    kept, state = value.detach().clone(), optimizer.state_dict()
    twin, other = begun()
    with torch.no_grad():
        twin.copy_(kept)
    load_optimizer(other, whole(state), [twin])
    step(value, optimizer)
    step(twin, other)
    assert torch.equal(value, twin)
    assert not torch.equal(value.detach(), kept)


def test_missing_packages_and_wrong_values_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install torchao"):
        optimizers.make(_settings(optimizer="adamw8bit"), [nn.Parameter(torch.ones(2))])
    for wrong, message in (
        ({"rank": 0}, "--rank 0 is out of range"),
        ({"turns": 3}, "--turns 3"),
        ({"balance": ("age",)}, "--balance 'age'"),
        ({"balance": ("none", "label")}, "--balance none,label: 'none' goes with nothing else"),
        ({"data": (Path("data"), Path("x/../data"))}, r"--data names .*/data twice"),
        ({"rate": math.nan}, "--rate nan"),
        ({"text_encoders": ("clip",)}, "--text-encoders 'clip'"),
    ):
        with pytest.raises(SettingsError, match=message):
            _settings(**wrong)


def test_command_line_reaches_every_setting() -> None:
    line = "b --data d --data e --out o --sizes 512,256 --targets *.attn.* --base-dtype fp8"
    found = parsed(
        [*line.split(), "--prompt", "x, y", "--only", "source=a, b", "--only", "sex=male"]
    )
    assert found.data == (Path("d"), Path("e"))
    assert found.sizes == (512, 256)
    assert found.targets == ("*.attn.*",)
    assert found.prompts == ("x, y",)
    assert found.only == ("source=a, b", "sex=male")
    assert (found.rank, found.alpha, found.base_dtype) == (64, 64.0, "fp8")


def test_a_full_disk_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.pt"
    write(file, {"step": 1, "x": torch.ones(3)})

    def full(content: object, stream: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StateError, match=r"step 2 .*No space left.*last good state.*is kept"):
        write(file, {"step": 2})
    assert torch.load(file, weights_only=True)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_log_is_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    cut_log(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
