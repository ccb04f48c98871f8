"""Engines behind one seam: the same numbers, bit-equal batches, threads, and a stated choice."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dermaflux import engines, flow, hardware
from dermaflux.bundle import Bundle
from dermaflux.engines import EAGER, OPENVINO, ORT, Engine, choose, load
from dermaflux.errors import EngineError
from dermaflux.hardware import Machine

CPU = Machine(cores=2, ram=None, no_gpu="no NVIDIA driver is loaded")
"""A machine that has nothing but a CPU, whatever the tests run on."""
SHARED = ("img_ids", "txt_ids")
STEPPING = ("hidden_states", "timestep")


def inputs(batch: int, h: int = 8, w: int = 8) -> dict[str, np.ndarray]:
    """Inputs of the tiny bundle's transformer, every item at its own timestep."""
    return {
        "hidden_states": flow.noise(1, (batch, h * w // 4, 16)),
        "encoder_hidden_states": flow.noise(2, (batch, 16, 8)),
        "pooled_projections": flow.noise(3, (batch, 8)),
        "timestep": np.linspace(1, 0.1, batch, dtype=np.float32),
        "img_ids": flow.image_ids(h, w),
        "txt_ids": flow.text_ids(16),
        "guidance": np.linspace(1, 4, batch, dtype=np.float32),
    }


def pick(everything: dict[str, np.ndarray], items: list[int]) -> dict[str, np.ndarray]:
    return {k: v if k in SHARED else v[items] for k, v in everything.items()}


@pytest.fixture(params=[ORT, OPENVINO])
def engine(request: pytest.FixtureRequest, tiny_bundle: Bundle) -> Engine:
    choice = choose(tiny_bundle, "transformer", request.param, "fp32")
    return load(tiny_bundle, choice, threads=2)


def test_engines_say_what_they_are(engine):
    assert engine.name in (ORT, OPENVINO)
    assert engine.precision == "fp32"


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_batches_of_1_to_8_are_bit_equal(engine, size):
    everything = inputs(8, *size)
    alone = [engine.run(pick(everything, [i]))["out_hidden_states"][0] for i in range(8)]
    for batch in range(2, 9):
        out = engine.run(pick(everything, list(range(batch))))["out_hidden_states"]
        assert out.dtype == np.float32
        assert all(np.array_equal(out[i], alone[i]) for i in range(batch))


def test_bound_inputs_are_the_same_as_handed_over(engine):
    everything = inputs(3)
    expected = engine.run(everything)["out_hidden_states"]
    constant = {k: v.copy() for k, v in everything.items() if k not in STEPPING}
    step = engine.bind(constant)
    other = engine.bind({**constant, "guidance": constant["guidance"] + 1})
    del constant
    for _ in range(3):
        varying = {k: everything[k] for k in STEPPING}
        assert np.array_equal(step(varying)["out_hidden_states"], expected)
        assert not np.array_equal(other(varying)["out_hidden_states"], expected)


def test_outputs_belong_to_the_caller(engine):
    first = engine.run(inputs(1))["out_hidden_states"]
    kept = first.copy()
    engine.run(inputs(2))
    assert np.array_equal(first, kept)


def test_memory_that_is_not_in_order_is_read_rightly(engine):
    everything = inputs(2)
    turned = np.asfortranarray(everything["hidden_states"])
    expected = engine.run(everything)["out_hidden_states"]
    assert np.array_equal(
        engine.run({**everything, "hidden_states": turned})["out_hidden_states"], expected
    )


def test_several_threads_share_an_engine(engine):
    everything = inputs(8)
    alone = [engine.run(pick(everything, [i]))["out_hidden_states"] for i in range(8)]
    start = threading.Barrier(8)

    def work(item: int) -> bool:
        start.wait()
        mine = pick(everything, [item])
        step = engine.bind({k: v for k, v in mine.items() if k not in STEPPING})
        outs = [engine.run(mine), step({k: mine[k] for k in STEPPING})] * 10
        return all(np.array_equal(out["out_hidden_states"], alone[item]) for out in outs)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize(
    "change",
    [
        {"guidance": None},
        {"hidden_state": np.zeros(1, np.float32)},
        {"guidance": np.zeros(1)},
        {"guidance": np.zeros(1, np.float16)},
        {"hidden_states": np.zeros((1, 16, 15), np.float32)},
    ],
    ids=["missing", "unknown", "float64", "float16", "shape"],
)
def test_inputs_that_the_graph_does_not_take_are_refused(engine, change):
    wrong = {k: v for k, v in {**inputs(1), **change}.items() if v is not None}
    with pytest.raises(EngineError):
        engine.run(wrong)
    with pytest.raises(EngineError):
        engine.bind({})(wrong)
    assert engine.run(inputs(1))["out_hidden_states"].shape == (1, 16, 16)


@pytest.mark.parametrize("name", [ORT, OPENVINO])
def test_a_file_that_is_no_graph_is_refused(tiny_bundle, tmp_path, name):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/model.onnx").write_bytes(b"no graph")
    broken = replace(tiny_bundle, path=tmp_path)
    with pytest.raises(EngineError, match="cannot open"):
        load(broken, choose(broken, "transformer", name, "fp32"))


def without(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    monkeypatch.setattr(engines, "installed", lambda name: name not in absent)


ABSENT = {
    "tensorrt": "no NVIDIA driver is loaded",
    "onnxruntime-tensorrt": "no NVIDIA driver is loaded",
    "onnxruntime-cuda": "no NVIDIA driver is loaded",
    "openvino-gpu": "no GPU of Intel's is seen",
}


def test_int8_on_openvino_is_the_first_choice_of_a_cpu(tiny_bundle):
    choice = choose(tiny_bundle, "transformer", machine=CPU)
    assert (choice.engine, choice.precision, choice.device) == (OPENVINO, "int8", "cpu")
    assert dict(choice.rejected) == ABSENT


def test_a_part_without_int8_runs_in_fp32(tiny_bundle):
    choice = choose(tiny_bundle, "vae_decoder", machine=CPU)
    assert (choice.engine, choice.precision) == (OPENVINO, "fp32")
    why = {**ABSENT, "openvino-cpu int8": "the bundle has no int8 file of vae_decoder"}
    assert dict(choice.rejected) == why
    forced = choose(tiny_bundle, "vae_decoder", precision="int8", machine=CPU)
    assert (forced.precision, forced.reason) == ("fp32", "vae_decoder has no int8 file")


def test_without_openvino_fp32_on_onnx_runtime(tiny_bundle, monkeypatch):
    without(monkeypatch, OPENVINO)
    choice = choose(tiny_bundle, "transformer", machine=CPU)
    assert (choice.engine, choice.precision) == (ORT, "fp32")
    assert ("openvino-cpu", "openvino is not installed; pip install openvino") in choice.rejected


def test_the_bundle_says_who_may_run_a_file(tiny_bundle):
    part = tiny_bundle.parts["transformer"]
    files = {k: replace(v, engines=(ORT,)) for k, v in part.files.items()}
    parts = {**tiny_bundle.parts, "transformer": replace(part, files=files)}
    bundle = replace(tiny_bundle, parts=parts)
    assert choose(bundle, "transformer", machine=CPU).engine == ORT
    with pytest.raises(EngineError, match="does not allow openvino-cpu"):
        choose(bundle, "transformer", OPENVINO)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", [ORT, OPENVINO])
def test_what_is_asked_for_is_had(tiny_bundle, name, precision):
    choice = choose(tiny_bundle, "transformer", name, precision)
    assert (choice.engine, choice.precision, choice.reason) == (name, precision, "asked for")


def test_what_cannot_be_had_is_refused(tiny_bundle, monkeypatch):
    with pytest.raises(EngineError, match="engine 'tpu' is not known"):
        choose(tiny_bundle, "transformer", "tpu")
    with pytest.raises(EngineError, match="precision 'int4' .* it has fp32, int8"):
        choose(tiny_bundle, "transformer", precision="int4")
    with pytest.raises(EngineError, match="has no part 'vae_encoder'"):
        choose(tiny_bundle, "vae_encoder")
    without(monkeypatch, OPENVINO, EAGER)
    with pytest.raises(EngineError, match="pip install openvino"):
        choose(tiny_bundle, "transformer", OPENVINO)
    with pytest.raises(EngineError, match="needs torch"):
        choose(tiny_bundle, "transformer", EAGER)
    without(monkeypatch, OPENVINO, ORT)
    with pytest.raises(EngineError, match="pip install openvino or pip install onnxruntime"):
        choose(tiny_bundle, "transformer", machine=CPU)


def test_eager_needs_a_checkpoint(tiny_bundle, monkeypatch):
    without(monkeypatch)
    with pytest.raises(EngineError, match="--checkpoint"):
        load(tiny_bundle, choose(tiny_bundle, "transformer", EAGER))


def test_cores_are_those_of_the_container(monkeypatch):
    assert 1 <= engines.usable_cores() <= 4096
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(64)))
    for quota, cores in (("max 100000", 64), ("150000 100000", 2), ("10000 100000", 1)):
        monkeypatch.setattr(Path, "read_text", lambda self, quota=quota: quota)
        assert engines.usable_cores() == cores


class Core:
    """Stands in for OpenVINO's core: notes what is compiled, and how."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[int]] = {}
        self.device = ""
        self.settings: dict[str, str] = {}
        self.inputs: list[object] = []
        self.outputs: list[object] = []

    def read_model(self, path: str) -> Core:
        return self

    def get_ordered_ops(self) -> list[object]:
        return []

    def reshape(self, shapes: dict[str, list[int]]) -> None:
        self.shapes = shapes

    def compile_model(self, model: object, device: str, settings: dict[str, str]) -> Core:
        self.device, self.settings = device, settings
        return self


@pytest.mark.parametrize(
    ("engine", "precision", "device", "hint"),
    [
        ("openvino-cpu", "fp32", "CPU", "f32"),
        ("openvino-cpu", "int8", "CPU", "f32"),
        ("openvino-cpu", "bf16", "CPU", "f32"),
        ("openvino-gpu", "fp32", "GPU", "f32"),
        ("openvino-gpu", "int8", "GPU", "f16"),
        ("openvino-npu", "fp16", "NPU", "f16"),
    ],
)
def test_openvino_is_told_what_to_compute_in(
    tiny_bundle, monkeypatch, engine, precision, device, hint
):
    from dermaflux.engines import Choice, ov_library

    core = Core()
    monkeypatch.setattr(ov_library, "_cores", [core])
    part = tiny_bundle.parts["transformer"]
    files = {precision: part.files["fp32"]}
    parts = {**tiny_bundle.parts, "transformer": replace(part, files=files)}
    made = load(replace(tiny_bundle, parts=parts), Choice("transformer", engine, precision, ""))
    assert (made.name, made.precision, core.device) == (engine, precision, device)
    assert core.settings["INFERENCE_PRECISION_HINT"] == hint
    assert ("INFERENCE_NUM_THREADS" in core.settings) == (device == "CPU")
    # An NPU takes one shape: the bundle's default size, batch 1.
    fixed = {"hidden_states": [1, 16, 16], "timestep": [1]} if device == "NPU" else {}
    assert {name: core.shapes[name] for name in fixed} == fixed
    assert bool(core.shapes) == bool(fixed)


_SIGNALLED = """
import gc, signal, sys, threading
from pathlib import Path
from dermaflux.engines.ov import OpenVinoEngine

got = []
signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
engines = [OpenVinoEngine(Path(sys.argv[1]), "fp32", threads=1) for _ in range(3)]
if sys.argv[2] == "elsewhere":
    ending = threading.Thread(target=engines.clear)
    ending.start()
    ending.join()
while engines:
    del engines[0]
gc.collect()
signal.raise_signal(signal.SIGTERM)
assert got == [signal.SIGTERM]
"""


@pytest.mark.parametrize("where", ["in their order", "elsewhere"])
def test_signals_are_handled_after_engines_have_ended(tiny_bundle: Bundle, where: str) -> None:
    graph = tiny_bundle.path / tiny_bundle.parts["transformer"].files["fp32"].path
    # In a process of its own, since where it fails, that ends without a word.
    done = subprocess.run(
        [sys.executable, "-c", _SIGNALLED, str(graph), where], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_an_npu_is_never_chosen_by_itself(tiny_bundle):
    part = tiny_bundle.parts["transformer"]
    file = replace(part.files["int8"], engines=engines.ENGINES)
    parts = {**tiny_bundle.parts, "transformer": replace(part, files={"int8": file})}
    bundle = replace(tiny_bundle, parts=parts)
    both = replace(CPU, intel=("GPU", "NPU"))
    assert choose(bundle, "transformer", machine=both).engine == "openvino-gpu"
    assert choose(bundle, "transformer", machine=replace(CPU, intel=("NPU",))).engine == OPENVINO
    assert choose(bundle, "transformer", "openvino-npu", machine=both).reason == "asked for"
