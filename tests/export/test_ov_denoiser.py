"""A step on OpenVINO without what does not change: the whole graph's numbers, whoever else is in
the batch, in fp32, fp16 and int8, with guidance and without."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from dermaflux import flow
from dermaflux.bundle import Bundle
from dermaflux.engines import OPENVINO, Choice, load, ov, ov_shapes
from dermaflux.engines.ov import OpenVinoEngine, opened
from dermaflux.engines.ov_denoiser import Denoiser
from dermaflux.engines.ov_graph import read
from dermaflux.engines.ov_library import core
from dermaflux.engines.ov_rewrite import attentions, joined
from dermaflux.engines.ov_split import STEPPING, split
from dermaflux.errors import EngineError
from export.shapes import examples

SHARED = ("img_ids", "txt_ids")
PRECISIONS = [("exported", "fp32"), ("exported", "int8"), ("schnell", "fp32"), ("schnell", "fp16")]
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-5, "int8": 2e-2}


def inputs(bundle: Bundle, batch: int, h: int = 8, w: int = 8) -> dict[str, np.ndarray]:
    widths = {t.name: t.shape for t in bundle.parts["transformer"].inputs}
    made = {
        "hidden_states": flow.noise(1, (batch, h * w // 4, widths["hidden_states"][2])),
        "encoder_hidden_states": flow.noise(
            2, (batch, bundle.model.text_length, widths["encoder_hidden_states"][2])
        ),
        "pooled_projections": flow.noise(3, (batch, widths["pooled_projections"][1])),
        "timestep": np.linspace(1, 0.1, batch, dtype=np.float32),
        "img_ids": flow.image_ids(h, w),
        "txt_ids": flow.text_ids(bundle.model.text_length),
    }
    if bundle.model.guidance_embeds:
        made["guidance"] = np.linspace(1, 4, batch, dtype=np.float32)
    return made


def pick(everything: dict[str, np.ndarray], items: list[int]) -> dict[str, np.ndarray]:
    return {k: v if k in SHARED else v[items] for k, v in everything.items()}


def graph_of(bundle: Bundle, precision: str) -> Path:
    return bundle.file(bundle.parts["transformer"].files[precision].path)


@pytest.fixture(params=PRECISIONS, ids=[" ".join(one) for one in PRECISIONS])
def case(request: pytest.FixtureRequest) -> tuple[Bundle, Path, str]:
    name, precision = request.param
    bundle: Bundle = request.getfixturevalue(name)
    return bundle, graph_of(bundle, precision), precision


@pytest.fixture(params=[True, False], ids=["shape by shape", "free shapes"])
def engine(
    request: pytest.FixtureRequest,
    case: tuple[Bundle, Path, str],
    monkeypatch: pytest.MonkeyPatch,
) -> Denoiser:
    if not request.param:
        monkeypatch.setattr(ov_shapes, "MOST_FIXED_BYTES", 0)
    _, graph, precision = case
    made = opened(graph, precision, threads=2)
    assert isinstance(made, Denoiser)
    return made


def test_numbers_are_those_of_the_whole_graph(engine, case):
    bundle, graph, precision = case
    everything = inputs(bundle, 3, 4, 12)
    expected = OpenVinoEngine(graph, precision, 2).run(everything)["out_hidden_states"]
    found = engine.run(everything)["out_hidden_states"]
    assert np.abs(found - expected).max() < TOLERANCE[precision] * np.abs(expected).max()


def test_rows_of_a_batch_have_the_bits_that_they_have_alone(engine, case):
    bundle, _, _ = case
    everything = inputs(bundle, 8)
    alone = [engine.run(pick(everything, [i]))["out_hidden_states"][0] for i in range(8)]
    for items in ([0, 1], [3, 1, 2], [7, 6, 5, 4, 3], list(range(8))):
        found = engine.run(pick(everything, items))["out_hidden_states"]
        assert all(np.array_equal(found[row], alone[item]) for row, item in enumerate(items))


def test_a_row_has_the_same_bits_whatever_was_announced(engine, case):
    bundle, _, _ = case
    mine = inputs(bundle, 2)
    constant = {k: v for k, v in mine.items() if k not in STEPPING}
    times = np.linspace(1, 0.05, 11, dtype=np.float32)
    found = []
    for announced in (None, np.tile(times, (2, 1)), np.tile(times[4:], (2, 1))):
        # Another prompt each time, and the first again: rows that are kept are not looked at.
        step = engine.bind(constant, announced)
        found.append(
            [
                step({"hidden_states": mine["hidden_states"], "timestep": np.full(2, t)})
                for t in times
            ]
        )
        engine._ahead._rows.clear()
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert np.array_equal(one["out_hidden_states"], other["out_hidden_states"])


def test_modulation_is_not_in_the_step(engine, case):
    """Proof by what runs: products of one row an item are in the other graph."""
    bundle, _, _ = case
    engine.run(inputs(bundle, 1))
    step, modulation, kept = engine.compiled()
    names = [{port.get_any_name() for port in one.inputs} for one in (step, modulation, kept)]
    assert "timestep" not in names[0]
    assert "encoder_hidden_states" not in names[0]
    assert "timestep" in names[1]
    assert "encoder_hidden_states" in names[2]
    products = [
        sum("linear" in op.get_friendly_name() and "norm" in op.get_friendly_name()
            for op in one.get_runtime_model().get_ops())
        for one in (step, modulation)
    ]  # fmt: skip
    assert products[0] == 0
    assert products[1] > 0


def test_requests_are_used_again_once_a_picture_is_done(engine, case):
    bundle, _, _ = case
    mine = inputs(bundle, 1)
    constant = {k: v for k, v in mine.items() if k not in STEPPING}
    expected = engine.run(mine)["out_hidden_states"]
    for _ in range(3):
        step = engine.bind(constant)
        assert np.array_equal(step({k: mine[k] for k in STEPPING})["out_hidden_states"], expected)
        del step
    gc.collect()
    (slot,) = engine._step._slots.values()
    assert slot._idle.qsize() == 1


def test_threads_at_once_get_their_own_answers(engine, case):
    bundle, _, _ = case
    everything = inputs(bundle, 6)
    alone = [engine.run(pick(everything, [i]))["out_hidden_states"] for i in range(6)]
    start = threading.Barrier(6)

    def work(item: int) -> bool:
        mine = pick(everything, [item])
        start.wait()
        step = engine.bind({k: v for k, v in mine.items() if k not in STEPPING})
        outs = [step({k: mine[k] for k in STEPPING}) for _ in range(5)]
        return all(np.array_equal(out["out_hidden_states"], alone[item]) for out in outs)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x.pop("txt_ids"), "takes the input"),
        (lambda x: x.update(other=x["timestep"]), "takes the inputs"),
        (lambda x: x.update(timestep=x["timestep"].astype(np.float64)), "input timestep needs"),
        (lambda x: x.update(timestep=x["timestep"][:1]), "2 items with 1 timesteps"),
        (lambda x: x.update(hidden_states=x["hidden_states"][:, :3]), "cannot run"),
        (lambda x: x.update(encoder_hidden_states=x["encoder_hidden_states"][:1]), "cannot run"),
        (lambda x: x.update(pooled_projections=x["pooled_projections"][:, :3]), "cannot run"),
    ],
)
def test_inputs_of_other_names_types_and_shapes_are_refused(exported, change, sentence):
    engine = opened(graph_of(exported, "fp32"), "fp32")
    given = inputs(exported, 2)
    change(given)
    with pytest.raises(EngineError, match=sentence):
        engine.run(given)
    # And it still runs.
    assert np.isfinite(engine.run(inputs(exported, 2))["out_hidden_states"]).all()


def test_a_bundle_is_opened_so(exported):
    made = load(exported, Choice("transformer", OPENVINO, "int8", ""))
    assert isinstance(made, Denoiser)
    assert (made.name, made.precision) == (OPENVINO, "int8")
    # The usual size is ready.
    assert len(made.compiled()) == 3
    other = load(exported, Choice("vae_decoder", OPENVINO, "fp32", ""))
    assert not isinstance(other, Denoiser)


def test_the_size_that_is_asked_for_first_is_ready_alone(exported):
    height, width = exported.limits.min_size, exported.defaults.width
    made = load(exported, Choice("transformer", OPENVINO, "int8", ""), size=(height, width))
    assert isinstance(made, Denoiser)
    before = made.compiled()
    cells = exported.model.scale
    made.run(inputs(exported, 1, height // cells, width // cells))
    assert made.compiled() == before
    assert len(before) == 3
    # One that nobody will be given is not tried.
    for sizes in ((height, 2**20), (height + 1, width), (0, width)):
        made = load(exported, Choice("transformer", OPENVINO, "int8", ""), size=sizes)
        before = made.compiled()
        usual = (exported.defaults.height // cells, exported.defaults.width // cells)
        made.run(inputs(exported, 1, *usual))
        assert made.compiled() == before


def test_shapes_that_stay_compiled_are_few(exported, monkeypatch):
    monkeypatch.setattr(ov, "kept_at_once", lambda size: 2)
    engine = opened(graph_of(exported, "fp32"), "fp32", threads=1)
    sizes = [(4, 4), (4, 6), (4, 8)]
    before = [engine.run(inputs(exported, 1, *size))["out_hidden_states"] for size in sizes]
    assert len(engine._step.compiled()) == 2
    again = [engine.run(inputs(exported, 1, *size))["out_hidden_states"] for size in sizes]
    assert all(np.array_equal(a, b) for a, b in zip(before, again, strict=True))


def test_the_graph_in_other_words(exported):
    """Attention is spelled out and 8 bits are joined as such; heads rotate by halves."""
    graph = graph_of(exported, "int8")
    model = read(core(), graph)
    kinds = [op.get_type_name() for op in model.get_ordered_ops()]
    count = kinds.count("ScaledDotProductAttention")
    config = [n for n in onnx.load(graph).graph.node if n.op_type == "RotaryEmbedding"]
    assert count > 0
    assert len(config) == 2 * count
    assert all(a.i == 0 for n in config for a in n.attribute if a.name == "interleaved")
    assert attentions(model) == count
    assert attentions(model) == 0
    assert joined(model) > 0
    assert joined(model) == 0
    assert "ScaledDotProductAttention" not in {o.get_type_name() for o in model.get_ordered_ops()}
    assert split(model) is not None


def test_a_graph_of_another_kind_is_left_alone(exported):
    model = read(core(), exported.file(exported.parts["vae_decoder"].files["fp32"].path))
    before = len(model.get_ordered_ops())
    assert split(model) is None
    assert len(model.get_ordered_ops()) == before


def test_examples_of_the_export_run_too(exported, tiny_checkpoint):
    from dermaflux.checkpoint import Checkpoint
    from export.shapes import sizes

    checkpoint = Checkpoint.open(tiny_checkpoint)
    engine = opened(graph_of(exported, "fp32"), "fp32")
    for size in sizes(checkpoint):
        given = examples(checkpoint, "transformer", size)
        assert np.isfinite(engine.run(given)["out_hidden_states"]).all()
