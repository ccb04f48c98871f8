"""Plans are built from what the bundle says, kept while current, and never half there."""

from __future__ import annotations

import _thread
import inspect
import json
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from dermaflux.bundle import Bundle, sha256
from dermaflux.engines import trt_api as runtime_api
from dermaflux.engines.cuda import Cuda
from dermaflux.engines.trt_plan import Hardware, read_sidecar
from dermaflux.errors import BundleError, Cancelled, EngineError
from export import trt_api as builder_api
from export.compile import Refused, Settings, compile_bundle, main
from export.shapes import Size
from export.trt_build import Flags, build, count_layers
from export.trt_jobs import plan_jobs
from export.trt_names import TARGET, read_names
from export.trt_profile import parse_size, profile
from export.trt_quantization import both_factors
from tests import fake_tensorrt
from tests.fake_tensorrt import FakeNvml, FakeRuntime, FakeTensorRT
from tests.tiny_bundle import write_bundle

ONE: dict[str, Any] = {"parts": ("transformer",), "precision": ("fp32",)}


class Machine:
    """A GPU that is not there."""

    def __init__(self, capability: tuple[int, int] = (9, 0), version: str = "11.4.0.106") -> None:
        runtime = FakeRuntime(capability)
        self.trt = FakeTensorRT(runtime, version)
        self.cuda = Cuda(runtime=runtime, nvml=FakeNvml())
        self.hardware = Hardware.of(version, self.cuda)

    def compile(self, bundle: Path, **settings: Any) -> list[dict[str, Any]]:
        return compile_bundle(Settings(bundle, **settings), self.trt, self.cuda)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle to be written to, fp32 only where the file is what it is called."""
    return write_bundle(tmp_path / "b")


def left(folder: Path) -> list[str]:
    """What is under `engines/`, without logs."""
    return sorted(p.name for p in folder.glob("engines/*/*") if p.suffix != ".log")


def test_every_part_gets_a_plan_and_a_sidecar(machine, folder):
    bundle = Bundle.open(folder)
    parts = ("text_encoder", "text_encoder_2", "transformer", "classifier")
    done = machine.compile(folder, parts=parts, precision=("fp32",))
    assert [Path(plan["plan"]).name for plan in done] == [f"{part}_fp32.plan" for part in parts]
    for plan, part in zip(done, parts, strict=True):
        path = Path(plan["plan"])
        assert path.parent == folder / "engines/9.0_11.4.0.106_580.65.06"
        sidecar = read_sidecar(path)
        assert sidecar.graph[0].sha256 == bundle.parts[part].files["fp32"].sha256
        assert sidecar.hardware == machine.hardware
        assert dict(sidecar.profile) == dict(profile(bundle, part))
        assert (plan["built"], plan["layers"], plan["quantized_layers"]) == (True, 2, 0)


def test_the_build_is_configured_as_asked(machine, folder):
    machine.compile(folder, **ONE, workspace=2.5, level=5)
    config = machine.trt.config
    assert config.pools == {FakeTensorRT.MemoryPoolType.WORKSPACE: int(2.5 * 2**30)}
    assert config.builder_optimization_level == 5
    assert config.flags == set()
    assert config.profiling_verbosity == FakeTensorRT.ProfilingVerbosity.DETAILED
    shapes = config.profiles[0].shapes
    assert shapes["hidden_states"] == ([1, 4, 16], [1, 16, 16], [8, 64, 16])
    assert shapes["txt_ids"] == ([16, 3],) * 3
    machine.compile(folder, **ONE, tf32=True)
    assert machine.trt.config.flags == {FakeTensorRT.BuilderFlag.TF32}


@pytest.mark.parametrize(
    "change",
    [{}, {"level": 4}, {"workspace": 4.0}, {"tf32": True}, {"force": True}],
    ids=["same", "level", "workspace", "tf32", "force"],
)
def test_a_current_plan_is_kept_and_any_other_built_anew(machine, folder, change):
    machine.compile(folder, **ONE)
    again = machine.compile(folder, **ONE, **change)
    assert [plan["built"] for plan in again] == [bool(change)]
    assert machine.trt.builds == 1 + bool(change)


@pytest.mark.parametrize("what", ["plan", "sidecar"])
def test_a_damaged_plan_is_built_anew(machine, folder, what):
    path = Path(machine.compile(folder, **ONE)[0]["plan"])
    whole = path.read_bytes()
    damaged = path if what == "plan" else path.with_name(f"{path.name}.json")
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"123456789")
    assert machine.compile(folder, **ONE)[0]["built"]
    assert path.read_bytes() == whole


def test_a_changed_graph_is_built_anew(machine, folder):
    machine.compile(folder, **ONE)
    model = onnx.load(folder / "transformer/model.onnx")
    model.doc_string = "another"
    onnx.save(model, folder / "transformer/model.onnx")
    with pytest.raises(BundleError, match="bytes"):
        machine.compile(folder, **ONE)
    manifest = json.loads((folder / "bundle.json").read_text())
    entry = manifest["parts"]["transformer"]["files"]["fp32"]
    entry["bytes"] = (folder / entry["path"]).stat().st_size
    entry["sha256"] = sha256(folder / entry["path"])
    (folder / "bundle.json").write_text(json.dumps(manifest))
    assert machine.compile(folder, **ONE)[0]["built"]


def test_static_variants_stand_beside_the_dynamic_plan(machine, folder):
    machine.compile(folder, **ONE)
    machine.compile(folder, **ONE, static=("64x64", "32x96x4"))
    names = ["transformer_fp32", "transformer_fp32_32x96x4", "transformer_fp32_64x64x1"]
    plans = [name for name in left(folder) if name.endswith(".plan")]
    assert plans == [f"{name}.plan" for name in sorted(names, key=lambda n: f"{n}.plan")]
    path = folder / f"engines/{machine.hardware.key}/transformer_fp32_32x96x4.plan"
    sidecar = read_sidecar(path)
    assert sidecar.static
    assert sidecar.profile["hidden_states"].max == (4, 2 * 6, 16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("64", "is not a size"), ("64x", "is not a size"), ("64x64x2x2", "is not a size"),
        ("0x64", "is not a size"), ("64x60", "in steps of 16"), ("16x64", "32 to 128"),
        ("64x64x9", "up to 8"),
    ],
)  # fmt: skip
def test_static_sizes_outside_of_the_bundle_are_refused(machine, folder, text, words):
    with pytest.raises(BundleError, match=words):
        machine.compile(folder, **ONE, static=(text,))
    assert left(folder) == []


def test_an_axis_without_a_known_range_is_refused(machine, folder):
    manifest = folder / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"latent_height"', '"h"'))
    with pytest.raises(BundleError, match="latent_sample has a free axis 'h'; known are batch"):
        machine.compile(folder, parts=("vae_decoder",), precision=("fp32",))


def test_sizes_are_height_width_batch():
    assert parse_size("512x768") == Size(1, 512, 768)
    assert parse_size("512x768x4") == Size(4, 512, 768)


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("parse", "cannot parse it: .*Mystery node_1: no importer registered"),
        ("build", "builds no plan: .*could not find any implementation"),
    ],
)
def test_a_failed_build_leaves_no_plan_and_a_log(machine, folder, fails, words):
    machine.trt.fails = fails
    with pytest.raises(EngineError, match=words):
        machine.compile(folder, **ONE)
    assert [name for name in left(folder) if ".plan" in name] == []
    log = folder / f"engines/{machine.hardware.key}/transformer_fp32.log"
    assert log.is_file()
    assert fails == "parse" or "a warning of the build" in log.read_text()


def test_a_failed_build_leaves_the_plan_before_as_it_was(machine, folder):
    path = Path(machine.compile(folder, **ONE)[0]["plan"])
    before = (path.read_bytes(), read_sidecar(path))
    machine.trt.fails = "build"
    with pytest.raises(EngineError):
        machine.compile(folder, **ONE, force=True)
    assert (path.read_bytes(), read_sidecar(path)) == before


def test_what_is_not_quantized_is_not_called_so(machine, exported, tmp_path):
    """The tiny exported bundle has a true int8 file."""
    jobs = plan_jobs(exported, machine.hardware, ["transformer"], ["int8"], [], _flags())
    job = replace(jobs[0], plan=tmp_path / "never.plan")
    machine.trt.fails = "quantize"
    with pytest.raises(EngineError, match="none of its 2 layers is in int8"):
        build(machine.trt, job, machine.hardware, lambda *_: True)
    assert not job.plan.exists()


def test_weights_alone_in_8_bits_need_no_quantized_layer(machine, exported, tmp_path):
    """T5's int8 saves memory; TensorRT multiplies in high precision."""
    jobs = plan_jobs(exported, machine.hardware, ["text_encoder_2"], ["int8"], [], _flags())
    assert both_factors(jobs[0].onnx) == 0
    machine.trt.fails = "quantize"
    job = replace(jobs[0], plan=tmp_path / "t5.plan")
    sidecar = build(machine.trt, job, machine.hardware, lambda *_: True)
    assert (job.plan.is_file(), sidecar.quantized_layers) == (True, 0)


def test_the_best_precision_of_a_part_is_chosen_by_the_gpu(exported):
    def chosen(capability: str) -> dict[str, str]:
        hardware = Hardware(capability, "11.4.0.106", "580")
        jobs = plan_jobs(exported, hardware, list(exported.parts), (), [], _flags())
        return {job.part: job.precision for job in jobs}

    assert chosen("9.0")["transformer"] == "fp8"
    assert chosen("8.6")["transformer"] == "int8"
    assert chosen("9.0")["vae_decoder"] == "fp32"
    # Its int8 has weights in 8 bits alone, which is no faster.
    assert "int8" in exported.parts["text_encoder_2"].files
    assert chosen("9.0")["text_encoder_2"] == "fp32"
    assert chosen("7.0")["transformer"] == "fp32"
    with pytest.raises(EngineError, match=r"int8 needs .* 7\.5 or newer; this one has 7\.0"):
        plan_jobs(exported, Hardware("7.0", "11.4", "5"), ["transformer"], ["int8"], [], _flags())


def _flags() -> Any:
    return Flags(8.0, 3, False)


def test_timings_are_kept_and_those_of_another_gpu_are_not_taken(machine, folder):
    machine.compile(folder, **ONE)
    cache = folder / f"engines/{machine.hardware.key}/timing.cache"
    assert cache.read_bytes() == b"timings of this GPU"
    machine.compile(folder, **ONE, force=True)
    assert machine.trt.config.cache.content == b"timings of this GPU"
    cache.write_bytes(b"timings of another GPU")
    machine.compile(folder, **ONE, force=True)
    assert machine.trt.config.cache.content == b""


def test_progress_can_stop_a_build(machine, folder):
    job = plan_jobs(Bundle.open(folder), machine.hardware, ["transformer"], ["fp32"], [], _flags())[
        0
    ]
    seen: list[tuple[str, int, int]] = []

    def progress(phase: str, done: int, steps: int) -> bool:
        seen.append((phase, done, steps))
        return done < 3

    with pytest.raises(Cancelled, match="nothing was written"):
        build(machine.trt, job, machine.hardware, progress)
    assert seen == [("Building Engine", n, 20) for n in (1, 2, 3)]
    assert left(folder) == []


def test_an_interrupt_is_heard_while_tensorrt_builds(machine, folder):
    """TensorRT builds on another thread than Python's signals are heard on."""
    threads = set()

    def on_step() -> None:
        threads.add(threading.get_ident())
        if len(steps) == 2:
            _thread.interrupt_main()
        steps.append(1)
        time.sleep(0.05)

    steps: list[int] = []
    machine.trt.on_step = on_step
    # A shell's background jobs ignore the signal, and Python then takes that over.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            machine.compile(folder, **ONE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 3 <= len(steps) < 20
    assert threading.get_ident() not in threads
    assert [name for name in left(folder) if ".plan" in name] == []


def test_what_the_check_refuses_is_not_built(machine, folder):
    with pytest.raises(Refused, match="is called int8 and has no product in it") as error:
        machine.compile(folder, parts=("transformer",), precision=("fp32", "int8"))
    assert "python -m export.compile --check" in str(error.value)
    assert machine.trt.builds == 0


@pytest.mark.parametrize("version", ["10.15.1.29", "10.16.1.11", "11.4.0.106"])
def test_every_version_that_takes_our_graphs_builds(folder, version):
    assert Machine(version=version).compile(folder, **ONE)[0]["built"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parts": ("unet",)}, "'unet' is not in"),
        ({"parts": ("vae_decoder",), "precision": ("fp8",)}, "has no fp8 file"),
        ({"level": 6}, "not one of 0 to 5"),
        ({"workspace": 0.0}, "no memory"),
    ],
)
def test_wrong_settings_are_refused(machine, folder, settings, words):
    with pytest.raises((BundleError, EngineError), match=words):
        machine.compile(folder, **settings)


@pytest.mark.parametrize(
    "tensor",
    [
        {"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"},
        {"Format": "Row major linear format", "DataType": "Int8"},
    ],
    ids=["10.x", "11.x"],
)
def test_quantized_layers_are_counted_in_both_forms(tensor):
    plain = {"Inputs": [{"Format/Datatype": "Row major linear FP32"}], "Outputs": []}
    layers = [{"Inputs": [tensor], "Outputs": []}, plain, {"Inputs": [], "Outputs": [tensor]}]
    assert count_layers(json.dumps({"Layers": layers}), "int8") == (3, 2)
    assert count_layers(json.dumps({"Layers": layers}), "fp8") == (3, 0)
    assert count_layers(json.dumps({"Layers": layers}), None) == (3, 0)


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["name only"]}', "[]"])
def test_an_inspector_of_another_form_is_not_read_as_zero(text):
    with pytest.raises(EngineError, match="inspector says something unknown"):
        count_layers(text, "int8")


def test_the_command_without_tensorrt_says_what_is_missing(folder, capsys):
    assert main([str(folder)]) == 2
    assert "TensorRT is not installed; install the package" in capsys.readouterr().err


# --- names of the real bindings ---------------------------------------------------------------

NAMES = json.loads(TARGET.read_text())["versions"]


def _protocols() -> dict[str, type]:
    """Class of TensorRT -> our protocol of it."""
    found = {}
    for module in (runtime_api, builder_api):
        for name, value in vars(module).items():
            if inspect.isclass(value) and getattr(value, "_is_protocol", False):
                found[name] = value
    for own in ("TensorRT", "Member", "Protocol"):
        del found[own]
    return found


@pytest.mark.parametrize("version", sorted(NAMES))
def test_every_call_is_in_the_real_bindings(version):
    real, checked = NAMES[version], 0
    for cls, protocol in _protocols().items():
        assert cls in real, cls
        members = {*vars(protocol), *getattr(protocol, "__annotations__", {})}
        for member in members:
            if member.startswith("_"):
                continue
            assert member in real[cls], f"{cls}.{member}"
            checked += 1
            ours = vars(protocol).get(member)
            if not inspect.isfunction(ours):
                assert real[cls][member] == [], f"{cls}.{member} is a method"
                continue
            given = [name for name in inspect.signature(ours).parameters if name != "self"]
            assert any(_takes(form, given) for form in real[cls][member]), (cls, member, given)
    assert checked > 40


def _takes(form: list[str], given: list[str]) -> bool:
    """Whether a form takes our parameters, in order and by name, and needs no others."""
    named = [name.rstrip("=") for name in form]
    rest = form[len(given) :]
    return named[: len(given)] == given and all(name.endswith("=") for name in rest)


@pytest.mark.parametrize("version", sorted(NAMES))
def test_what_tensorrt_makes_takes_our_arguments(version):
    real = NAMES[version]
    # `kernel_text` and the like aside: a form that takes exactly these.
    assert ["logger"] in real["Runtime"]["__init__"]
    assert ["logger"] in real["Builder"]["__init__"]
    assert ["network", "logger"] in real["OnnxParser"]["__init__"]
    assert real["ILogger"]["log"] == [["severity", "msg"]]
    assert real["IProgressMonitor"]["phase_start"] == [["phase_name", "parent_phase", "num_steps"]]
    assert real["IProgressMonitor"]["step_complete"] == [["phase_name", "step"]]
    assert real["IProgressMonitor"]["phase_finish"] == [["phase_name"]]
    for kind, members in (
        ("DataType", ("FLOAT", "INT64")),
        ("TensorIOMode", ("INPUT", "OUTPUT")),
        ("TensorLocation", ("DEVICE",)),
    ):
        assert set(members) <= set(real[kind])


def test_the_stand_in_has_no_calls_that_the_real_bindings_lack():
    pairs = {
        "Builder": fake_tensorrt.FakeBuilder, "IBuilderConfig": fake_tensorrt.FakeConfig,
        "ICudaEngine": fake_tensorrt.FakeEngine, "IExecutionContext": fake_tensorrt.FakeContext,
        "OnnxParser": fake_tensorrt.FakeParser, "EngineInspector": fake_tensorrt.FakeInspector,
        "IOptimizationProfile": fake_tensorrt.FakeProfile, "ITimingCache": fake_tensorrt.FakeCache,
    }  # fmt: skip
    for cls, stand_in in pairs.items():
        for name, value in vars(stand_in).items():
            if name.startswith("_") or name == "dtype" or not inspect.isfunction(value):
                continue
            given = [p for p in inspect.signature(value).parameters if p != "self"]
            for version in NAMES:
                assert any(_takes(form, given) for form in NAMES[version][cls][name]), (cls, name)


def test_a_file_that_is_no_wheel_is_refused(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"PK")
    with pytest.raises(EngineError, match="no wheel"):
        read_names(tmp_path / "x.whl")
