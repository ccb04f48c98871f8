"""Our forward of the transformer equals diffusers', however it is bound, compiled or replayed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dermaflux import flow
from dermaflux.engines import Arrays
from dermaflux.errors import EngineError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from dermaflux.engines import eager, flux, flux_engine, flux_weights  # noqa: E402
from dermaflux.engines.flux_engine import FluxEngine  # noqa: E402
from dermaflux.engines.flux_graph import SHAPES, Blocks, Replayed  # noqa: E402
from tests.tiny import write_checkpoint  # noqa: E402

TIGHT = 1e-5
VARYING = ("hidden_states", "timestep")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unguided(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("unguided"), guided=False)


@pytest.fixture(params=["mini", "tiny", "tiny, no guidance"])
def any_checkpoint(request, checkpoint, tiny_checkpoint, unguided) -> Path:
    return {"mini": checkpoint, "tiny": tiny_checkpoint}.get(request.param, unguided)


def example(folder: Path, batch: int = 1, h: int = 8, w: int = 6, seed: int = 0) -> dict:
    """Inputs of a transformer, all items and timesteps different."""
    config = json.loads((folder / "transformer/config.json").read_text())
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    given = {
        "hidden_states": normal(batch, h * w // 4, config["in_channels"]),
        "encoder_hidden_states": normal(batch, 20, config["joint_attention_dim"]),
        "pooled_projections": normal(batch, config["pooled_projection_dim"]),
        "timestep": rng.random(batch).astype(np.float32),
        "img_ids": flow.image_ids(h, w),
        "txt_ids": flow.text_ids(20),
    }
    if config["guidance_embeds"]:
        given["guidance"] = 1 + rng.random(batch).astype(np.float32)
    return given


def halves(given: Arrays) -> tuple[dict, dict]:
    """What is bound, and what a step is given."""
    varying = {name: given[name] for name in VARYING}
    return {name: value for name, value in given.items() if name not in VARYING}, varying


def output(answer: Arrays) -> np.ndarray:
    (only,) = answer.values()
    return only


def error(found: Arrays, expected: Arrays) -> float:
    """Largest difference, relative to the largest value."""
    a, b = output(found), output(expected)
    assert a.shape == b.shape
    assert np.abs(b).max() > 0.01, "nothing would equal nothing"
    return float(np.abs(a - b).max() / np.abs(b).max())


def fast(folder: Path, **options) -> FluxEngine:
    engine = eager.load(folder, "transformer", fast=True, **options)
    assert isinstance(engine, FluxEngine)
    return engine


@pytest.mark.parametrize("batch", [1, 3])
def test_the_forward_is_that_of_diffusers(any_checkpoint, batch):
    given = example(any_checkpoint, batch)
    engine = fast(any_checkpoint)
    reference = eager.load(any_checkpoint, "transformer")
    assert set(engine.inputs) == set(reference.inputs)
    assert error(engine.run(given), reference.run(given)) < TIGHT


def test_steps_that_were_told_are_modulated_in_one_product(any_checkpoint, products):
    """Items begin at different places, and the first one ends sooner."""
    told = np.array([[0.4, 0.2, 0.2, 0.2], [0.9, 0.7, 0.4, 0.1]], np.float32)
    given = example(any_checkpoint, 2)
    constant, varying = halves(given)
    engine, reference = fast(any_checkpoint), eager.load(any_checkpoint, "transformer")
    steps = engine.bind(constant, told), reference.bind(constant)
    for column in told.T:
        ours, theirs = (step({**varying, "timestep": column.copy()}) for step in steps)
        assert error(ours, theirs) < TIGHT
    assert products == [told.size]


def test_a_timestep_that_was_not_told_is_right_too(any_checkpoint):
    told = np.array([[0.9, 0.5], [0.9, 0.5]], np.float32)
    constant, varying = halves(example(any_checkpoint, 2))
    engine, reference = fast(any_checkpoint), eager.load(any_checkpoint, "transformer")
    steps = engine.bind(constant, told), reference.bind(constant)
    for column in ([0.9, 0.9], [0.33, 0.5], [0.5, 0.9], [0.5, 0.5]):
        asked = {**varying, "timestep": np.array(column, np.float32)}
        assert error(*(step(asked) for step in steps)) < TIGHT


def test_long_runs_are_modulated_in_windows(tiny_checkpoint, products, monkeypatch):
    monkeypatch.setattr(flux_engine, "ROWS", 4)
    told = np.linspace(1, 0.1, 10, dtype=np.float32)[None].repeat(2, axis=0)
    constant, varying = halves(example(tiny_checkpoint, 2))
    engine = fast(tiny_checkpoint)
    step = engine.bind(constant, told)
    reference = eager.load(tiny_checkpoint, "transformer").bind(constant)
    for column in told.T:
        asked = {**varying, "timestep": column.copy()}
        assert error(step(asked), reference(asked)) < TIGHT
    assert products == [4, 4, 4, 4, 4]


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """Rows of every matrix product of modulation."""
    seen: list[int] = []

    def modulated(weights, timesteps, pooled, guidance):
        seen.append(len(timesteps))
        return flux.modulated(weights, timesteps, pooled, guidance)

    monkeypatch.setattr(flux_engine, "modulated", modulated)
    return seen


def test_what_is_not_bound_is_given_with_each_step(tiny_checkpoint):
    given = example(tiny_checkpoint, 2)
    expected = fast(tiny_checkpoint).run(given)
    half = {name: given[name] for name in ("encoder_hidden_states", "img_ids", "timestep")}
    rest = {name: value for name, value in given.items() if name not in half}
    assert error(fast(tiny_checkpoint).bind(half)(rest), expected) < 1e-6
    with pytest.raises(EngineError, match="takes"):
        fast(tiny_checkpoint).bind(half)({})


def test_two_batches_of_one_engine_keep_apart(tiny_checkpoint):
    engine = fast(tiny_checkpoint)
    bound = []
    for seed in (0, 1):
        given = example(tiny_checkpoint, 1, seed=seed)
        constant, varying = halves(given)
        bound.append((engine.bind(constant, given["timestep"][None]), varying, engine.run(given)))
    for step, varying, expected in bound * 2:
        assert error(step(varying), expected) < 1e-6


def test_bf16_is_as_near_to_fp32_as_diffusers_is(checkpoint):
    given = example(checkpoint)
    exact = eager.load(checkpoint, "transformer").run(given)
    theirs = error(eager.load(checkpoint, "transformer", torch.bfloat16).run(given), exact)
    engine = fast(checkpoint, precision="bf16")
    assert engine.precision == "bf16"
    assert 0 < error(engine.run(given), exact) < 1.5 * theirs


def test_weights_are_in_memory_once(checkpoint):
    reference = eager.load(checkpoint, "transformer")
    whole = sum(p.numel() * p.element_size() for p in reference.model.parameters())
    assert fast(checkpoint).counts()["weight_bytes"] == whole


def test_random_weights_have_the_names_and_shapes_of_diffusers(unguided, tiny_checkpoint):
    for folder in (unguided, tiny_checkpoint):
        config = json.loads((folder / "transformer/config.json").read_text())
        model = diffusers.FluxTransformer2DModel.from_config(config)
        named = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        assert flux_weights.shapes(config) == named
        made = flux_weights.randomly(config, torch.float32, torch.device("cpu"), seed=3)
        out = output(FluxEngine(made, "fp32").run(example(folder)))
        assert np.isfinite(out).all()
        assert 0.1 < out.std() < 10
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                flux_weights.fill(name, tensor, seed=3)
        given = {k: torch.from_numpy(v) for k, v in example(folder).items()}
        (theirs,) = model(**given, return_dict=False)
        assert np.abs(theirs.detach().numpy() - out).max() < TIGHT * np.abs(out).max()


def test_damaged_weights_are_refused(tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(EngineError, match="cannot be opened"):
        fast(tmp_path)
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_checkpoint / "transformer/config.json").read_text())
    name = "diffusion_pytorch_model.safetensors"
    tensors = load_file(tiny_checkpoint / "transformer" / name)
    bias = tensors.pop("proj_out.bias")
    save_file(tensors, folder / name)
    with pytest.raises(EngineError, match=r"no tensor proj_out\.bias"):
        fast(tmp_path)
    save_file({**tensors, "proj_out.bias": bias[:3].clone()}, folder / name)
    with pytest.raises(EngineError, match=r"proj_out\.bias .* is \(3,\).*asks for \(16,\)"):
        fast(tmp_path)


class Recorded:
    """Stands for CUDA graphs: replays the work, and sees that its buffers stay where they are."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, work: Callable) -> tuple:
        self.captures += 1
        output = work().clone()

        def replay() -> None:
            output.copy_(work())

        return output, replay


def test_a_graph_is_captured_once_and_fed_in_place():
    seen = []
    held, other = ({"constant": torch.full((2,), value)} for value in (10.0, 20.0))

    def work(tensors):
        seen.append({name: tensor.data_ptr() for name, tensor in tensors.items()})
        return tensors["constant"] + tensors["varying"]

    capture = Recorded()
    replayed = Replayed(work, {**held, "varying": torch.zeros(2)}, capture)
    first, second = object(), object()
    for owner, constant, value, expected in (
        (first, held, 1.0, 11.0),
        (first, held, 2.0, 12.0),
        (second, other, 2.0, 22.0),
        (first, held, 3.0, 13.0),
    ):
        result = replayed.run(owner, constant, {"varying": torch.full((2,), value)})
        assert result.tolist() == [expected] * 2
    assert capture.captures == 1
    assert replayed.replays == 4
    assert all(addresses == seen[0] for addresses in seen), "a buffer moved"
    with pytest.raises(AssertionError, match="another shape"):
        replayed.run(first, held, {"varying": torch.zeros(3)})


def test_graphs_give_the_same_as_forwards(tiny_checkpoint):
    plain = fast(tiny_checkpoint)
    capture = Recorded()
    graphs = FluxEngine(plain.flux, "fp32", capture=capture)
    requests = [example(tiny_checkpoint, b, h, seed=b) for b, h in ((1, 8), (2, 8), (1, 4))] * 2
    bound = [(graphs.bind(halves(given)[0]), given) for given in requests]
    for _ in range(2):
        for step, given in bound:
            assert error(step(halves(given)[1]), plain.run(given)) < 1e-6
    assert capture.captures == 3
    assert graphs.counts()["graphs"] == 3
    assert graphs.counts()["replays"] == 12


def test_blocks_are_compiled_once_a_kind_and_shape(tiny_checkpoint):
    """Of two single blocks one is compiled; a shape that comes again compiles nothing."""
    plain = fast(tiny_checkpoint)
    engine = FluxEngine(plain.flux, "fp32", blocks=Blocks(backend="eager"))
    for batch, expected in ((1, 2), (1, 2), (2, 4), (1, 4)):
        given = example(tiny_checkpoint, batch, seed=batch)
        assert error(engine.run(given), plain.run(given)) < 1e-6
        assert engine.counts()["compiles"] == expected


def test_shapes_beyond_the_last_run_as_they_are(tiny_checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(flux_engine, "SHAPES", 1)
    plain, capture = fast(tiny_checkpoint), Recorded()
    engine = FluxEngine(plain.flux, "fp32", capture=capture)
    assert SHAPES > 1
    for h in (4, 8, 4):
        given = example(tiny_checkpoint, 1, h)
        assert error(engine.run(given), plain.run(given)) < 1e-6
    assert capture.captures == 1
    assert "run as they are" in caplog.text


def test_all_scales_have_their_one():
    """Shift, scale, gate, shift, scale, gate of both streams; shift, scale, gate; scale, shift."""
    assert flux.scales(1, 2) == [1, 4, 7, 10, 13, 16, 18]
