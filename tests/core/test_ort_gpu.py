"""ONNX Runtime's GPU providers: bound memory for real on the CPU, all else with stand-ins."""

from __future__ import annotations

import gc
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dermaflux import engines
from dermaflux.bundle import Bundle
from dermaflux.engines import ORT, ORT_CUDA, ORT_TENSORRT, TENSORRT, Choice, choose, load
from dermaflux.engines import order as order_module
from dermaflux.errors import EngineError
from dermaflux.hardware import Gpu, Machine, Memory

ort_gpu = pytest.importorskip("dermaflux.engines.ort_gpu")
ort_trt = pytest.importorskip("dermaflux.engines.ort_trt")

CARD = Machine(2, None, (Gpu("a card", "GPU-1", Memory(1, 1, "test"), (8, 9), "580.1"),))
STEPPING = ("hidden_states", "timestep")


@pytest.fixture
def anywhere(tiny_bundle: Bundle) -> Bundle:
    """The tiny bundle, allowed on every engine, its int8 files also there as others."""
    parts = {}
    for name, part in tiny_bundle.parts.items():
        file = replace(part.files["fp32"], engines=engines.ENGINES)
        levels = ("fp32", "int8", "fp16", "bf16", "fp8") if name == "transformer" else ("fp32",)
        parts[name] = replace(part, files=dict.fromkeys(levels, file))
    return replace(tiny_bundle, parts=parts)


@pytest.fixture
def bound(tiny_bundle: Bundle):
    graph = tiny_bundle.path / "transformer/model.onnx"
    return ort_gpu.OrtGpuEngine(graph, "fp32", [("CPUExecutionProvider", {})], device="cpu")


@pytest.fixture
def inputs():
    from tests.core.test_engines import inputs

    return inputs


def test_bound_memory_gives_what_a_session_gives(bound, tiny_bundle, inputs):
    plain = load(tiny_bundle, choose(tiny_bundle, "transformer", ORT, "fp32"), threads=1)
    for batch, h, w in ((1, 8, 8), (3, 4, 12), (1, 8, 8), (2, 8, 8), (3, 4, 12)):
        everything = inputs(batch, h, w)
        expected = plain.run(everything)["out_hidden_states"]
        for _ in range(3):
            found = bound.run(everything)["out_hidden_states"]
            assert np.array_equal(found, expected)


def test_callers_who_share_memory_do_not_share_inputs(bound, inputs):
    everything = inputs(2)
    constant = {k: v for k, v in everything.items() if k not in STEPPING}
    varying = {k: everything[k] for k in STEPPING}
    one = bound.bind(constant)
    other = bound.bind({**constant, "guidance": constant["guidance"] + 1})
    first, second = one(varying)["out_hidden_states"], other(varying)["out_hidden_states"]
    kept = first.copy()
    for _ in range(3):
        assert np.array_equal(one(varying)["out_hidden_states"], first)
        assert np.array_equal(other(varying)["out_hidden_states"], second)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, kept)


def test_wrong_inputs_are_refused_and_the_next_run_is_right(bound, inputs):
    expected = bound.run(inputs(1))["out_hidden_states"]
    for change in ({"guidance": np.zeros(1)}, {"unknown": np.zeros(1, np.float32)}):
        with pytest.raises(EngineError, match="cannot run"):
            bound.run({**inputs(1), **change})
    with pytest.raises(EngineError, match="cannot run"):
        bound.run({k: v for k, v in inputs(1).items() if k != "guidance"})
    assert np.array_equal(bound.run(inputs(1))["out_hidden_states"], expected)


def test_memory_is_kept_for_few_shapes(bound, inputs):
    for width in range(2, 40, 2):
        bound.run(inputs(1, 2, width))
    assert len(bound._slots) == 8
    gc.collect()


class Fake(types.SimpleNamespace):
    """Stands in for onnxruntime: sessions that note how they were made and run."""

    def __init__(self, have=("CUDAExecutionProvider",), refuse_graphs=False):
        super().__init__(__version__="1.31.1", __file__=__file__)
        import onnxruntime

        self.sessions: list[object] = []
        self.graph_ids: list[str] = []
        outer, real = self, onnxruntime

        class OrtValue:
            def __init__(self, array):
                self.array = array

            ortvalue_from_numpy = staticmethod(lambda array, device, n: OrtValue(array.copy()))
            ortvalue_from_shape_and_type = staticmethod(
                lambda shape, kind, device, n: OrtValue(np.zeros(shape, kind))
            )

            def update_inplace(self, array):
                np.copyto(self.array, array)

            def numpy(self):
                return self.array

        class Binding:
            def __init__(self):
                self.inputs, self.outputs = {}, [None]

            def bind_ortvalue_input(self, name, value):
                self.inputs[name] = value

            def bind_output(self, name, device, number):
                self.outputs = [OrtValue(np.zeros(1))]

            def bind_ortvalue_output(self, name, value):
                self.outputs = [value]

            def get_outputs(self):
                return self.outputs

        class RunOptions(dict):
            add_run_config_entry = dict.__setitem__

        class InferenceSession:
            def __init__(self, path, options, providers):
                self.providers = providers
                if refuse_graphs and any(o.get("enable_cuda_graph") == "1" for _, o in providers):
                    raise RuntimeError("has nodes on the CPU")
                outer.sessions.append(self)

            def get_providers(self):
                return [*have, "CPUExecutionProvider"]

            def get_outputs(self):
                return [types.SimpleNamespace(name="y")]

            def io_binding(self):
                return Binding()

            def run_with_iobinding(self, binding, options):
                outer.graph_ids.append(options["gpu_graph_id"])
                total = sum(value.array.sum() for value in binding.inputs.values())
                binding.outputs[0].array[...] = total

        self.OrtValue, self.RunOptions = OrtValue, RunOptions
        self.InferenceSession, self.SessionOptions = InferenceSession, real.SessionOptions
        self.get_available_providers = lambda: list(have)


@pytest.fixture
def fake(monkeypatch):
    def install(**options):
        found = Fake(**options)
        monkeypatch.setattr(ort_gpu, "onnxruntime", found)
        monkeypatch.setattr(ort_trt, "onnxruntime", found)
        return found

    return install


def test_a_step_becomes_a_cuda_graph_of_its_own_after_its_first_run(fake, anywhere):
    library = fake()
    engine = load(anywhere, Choice("transformer", ORT_CUDA, "fp16", ""))
    assert (engine.name, engine.precision, engine.graphs) == (ORT_CUDA, "fp16", True)
    ((name, options),) = library.sessions[0].providers
    assert (name, options["use_tf32"], options["enable_cuda_graph"]) == (
        "CUDAExecutionProvider", "0", "1",
    )  # fmt: skip
    for size in (2, 3, 2, 3):
        step = engine.bind({"a": np.ones(size, np.float32)})
        for value in (1, 5):
            found = step({"b": np.full(size, value, np.float32)})["y"]
            assert found[0] == size + value * size
    # Per shape: a run without, then one id, which no other shape has.
    assert library.graph_ids == ["-1", "1", "-1", "2", "1", "1", "2", "2"]


def test_what_cannot_be_captured_runs_and_is_said(fake, anywhere, caplog):
    library = fake(refuse_graphs=True)
    engine = load(anywhere, Choice("transformer", ORT_CUDA, "fp16", ""))
    assert engine.graphs is False
    assert "runs without CUDA graphs: has nodes on the CPU" in caplog.text
    engine.run({"a": np.ones(2, np.float32)})
    engine.run({"a": np.ones(2, np.float32)})
    assert library.graph_ids == ["-1", "-1"]


def test_a_provider_that_falls_back_to_the_cpu_is_refused(fake, anywhere):
    fake(have=())
    with pytest.raises(EngineError, match="would run .* on the CPU.*onnxruntime-gpu"):
        load(anywhere, Choice("transformer", ORT_CUDA, "fp16", ""))


def test_tensorrts_provider_gets_sizes_types_and_a_cache(fake, anywhere, tmp_path, monkeypatch):
    library = fake(have=("TensorrtExecutionProvider", "CUDAExecutionProvider"))
    bundle = replace(anywhere, path=tmp_path)
    engine = load(bundle, Choice("transformer", ORT_TENSORRT, "bf16", ""))
    assert engine.name == ORT_TENSORRT
    (_, options), (_, cuda) = library.sessions[0].providers
    assert cuda["enable_cuda_graph"] == "0"
    assert options["trt_bf16_enable"] == "1"
    assert "trt_fp16_enable" not in options
    shapes = [options[f"trt_profile_{which}_shapes"].split(",") for which in ("min", "opt", "max")]
    assert [row[0] for row in shapes] == [
        "hidden_states:1x4x16", "hidden_states:1x16x16", "hidden_states:8x64x16",
    ]  # fmt: skip
    assert {row[5] for row in shapes} == {"txt_ids:16x3"}
    cache = Path(options["trt_engine_cache_path"])
    assert cache.parent == tmp_path / "engines"
    assert cache.name == "unknown_unknown_onnxruntime-1.31.1"
    assert cache.is_dir()
    # A bundle that is not to be written to.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    elsewhere = ort_trt.cache_folder(replace(bundle, path=blocked))
    assert elsewhere.parent == tmp_path / "cache/dermaflux" / bundle.id


def test_the_provider_says_which_tensorrt_it_needs(tmp_path, fake):
    fake(have=("TensorrtExecutionProvider",))
    assert ort_trt.linked(tmp_path) == ""
    (tmp_path / "libonnxruntime_providers_tensorrt.so").write_bytes(b"\0libnvinfer.so.99\0")
    assert ort_trt.linked(tmp_path) == "99"
    assert ort_trt._find("99") is None
    assert "no CUDAExecutionProvider" in str(ort_gpu.missing("CUDAExecutionProvider"))


@pytest.fixture
def everything_here(monkeypatch):
    """A machine with a card, every library, and TensorRT 11.4 without any plan."""
    monkeypatch.setattr(engines, "installed", lambda name: True)
    monkeypatch.setattr(order_module, "_no_bindings", lambda: None)
    monkeypatch.setattr(order_module, "_no_provider", lambda provider: None)
    monkeypatch.setattr(order_module.importlib.metadata, "version", lambda name: "11.4.0")


@pytest.mark.usefixtures("everything_here")
def test_a_plan_is_taken_first_and_its_absence_has_a_command(anywhere, tmp_path):
    bundle = replace(anywhere, path=tmp_path)
    choice = choose(bundle, "transformer", machine=CARD)
    assert (choice.engine, choice.precision, choice.device) == (ORT_TENSORRT, "int8", "cuda:0")
    why = dict(choice.rejected)
    assert "no plan of transformer in fp8 for 8.9_11.4.0_580.1" in why["tensorrt fp8"]
    assert f"python -m export.compile {tmp_path}" in why["tensorrt fp8"]
    folder = tmp_path / "engines/8.9_11.4.0_580.1"
    folder.mkdir(parents=True)
    (folder / "transformer_fp8.plan").write_bytes(b"")
    (folder / "transformer_fp8.plan.json").write_bytes(b"{}")
    choice = choose(bundle, "transformer", machine=CARD)
    assert (choice.engine, choice.precision) == (TENSORRT, "fp8")
    assert choice.rejected == ()


@pytest.mark.usefixtures("everything_here")
@pytest.mark.parametrize(
    ("capability", "refused"),
    [
        ((7, 0), {"fp8", "int8", "bf16"}),
        ((7, 5), {"fp8", "bf16"}),
        ((8, 0), {"fp8"}),
        ((9, 0), set()),
    ],
)
def test_a_card_is_asked_for_what_it_has_only(anywhere, capability, refused):
    old = replace(CARD, gpus=(replace(CARD.gpus[0], capability=capability),))
    for level in ("fp8", "int8", "bf16", "fp16", "fp32"):
        with pytest.raises(EngineError, match="no engine can run") as error:
            choose(anywhere, "transformer", TENSORRT, level, old)
        assert (f"{level} needs" in str(error.value)) == (level in refused)


@pytest.mark.usefixtures("everything_here")
def test_parts_of_a_bundle_may_run_in_different_precisions(anywhere):
    """fp8 is asked for, and only the transformer has it."""
    forced = choose(anywhere, "text_encoder", ORT_CUDA, "fp8", CARD)
    assert (forced.precision, forced.reason) == ("fp32", "text_encoder has no fp8 file")


def test_bf16_on_a_cpu_is_said_to_be_for_numbers(anywhere):
    files = {"bf16": anywhere.parts["transformer"].files["fp32"]}
    part = replace(anywhere.parts["transformer"], files=files)
    bundle = replace(anywhere, parts={**anywhere.parts, "transformer": part})
    plain = choose(bundle, "transformer", machine=Machine(2, None))
    assert plain.engine == "openvino-cpu"
    assert "computed in fp32" in plain.reason
