"""The TensorRT engine behind the seam, on stand-ins of TensorRT and CUDA that keep their rules."""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dermaflux import flow
from dermaflux.bundle import Bundle
from dermaflux.engines import TENSORRT
from dermaflux.engines import cuda as cuda_module
from dermaflux.engines import trt as trt_module
from dermaflux.engines.cuda import Cuda
from dermaflux.engines.ort import OrtEngine
from dermaflux.engines.trt import TrtEngine, TrtPlans, load
from dermaflux.engines.trt_plan import DYNAMIC, Hardware, open_plan, plan_path, read_sidecar
from dermaflux.errors import EngineError
from export.compile import Settings, compile_bundle
from tests.fake_tensorrt import FakeNvml, FakeRuntime, FakeTensorRT
from tests.tiny_bundle import write_bundle

BOUND = ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids", "guidance")


def inputs(batch: int, h: int = 8, w: int = 8, seed: int = 1) -> dict[str, np.ndarray]:
    """Inputs of the tiny bundle's transformer."""
    return {
        "hidden_states": flow.noise(seed, (batch, h * w // 4, 16)),
        "encoder_hidden_states": flow.noise(2, (batch, 16, 8)),
        "pooled_projections": flow.noise(3, (batch, 8)),
        "timestep": np.linspace(1, 0.1, batch, dtype=np.float32),
        "img_ids": flow.image_ids(h, w),
        "txt_ids": flow.text_ids(16),
        "guidance": np.linspace(1, 4, batch, dtype=np.float32),
    }


class Machine:
    """A GPU that is not there."""

    def __init__(self, version: str = "11.4.0.106", driver: str = "580.65.06") -> None:
        self.runtime = FakeRuntime()
        self.trt = FakeTensorRT(self.runtime, version)
        self.cuda = Cuda(runtime=self.runtime, nvml=FakeNvml(driver))
        self.hardware = Hardware.of(version, self.cuda)

    def compile(self, bundle: Bundle, **settings: object) -> None:
        asked = Settings(bundle.path, **settings)
        compile_bundle(asked, self.trt, self.cuda)

    def load(self, bundle: Bundle, variant: str | None = DYNAMIC) -> TrtEngine | TrtPlans:
        return load(bundle, "transformer", "fp32", variant=variant, trt=self.trt, cuda=self.cuda)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a dynamic and a static plan of its transformer."""
    folder = write_bundle(tmp_path_factory.mktemp("bundle") / "b")
    machine = Machine()
    chosen = {"parts": ("transformer",), "precision": ("fp32",)}
    machine.compile(Bundle.open(folder), **chosen)
    machine.compile(Bundle.open(folder), **chosen, static=("64x64", "64x64x2"))
    return folder


@pytest.fixture
def bundle(compiled: Path) -> Bundle:
    """Not to be written to."""
    return Bundle.open(compiled)


@pytest.fixture
def copy(compiled: Path, tmp_path: Path) -> Bundle:
    """To be written to."""
    return Bundle.open(shutil.copytree(compiled, tmp_path / "copy"))


@pytest.fixture
def reference(bundle: Bundle) -> OrtEngine:
    return OrtEngine(bundle.file("transformer/model.onnx"), "fp32", 1)


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 8, 8), (2, 4, 12), (1, 16, 16)])
def test_a_dynamic_plan_computes_what_its_graph_does_at_every_size(
    machine, bundle, reference, size
):
    engine = machine.load(bundle)
    assert (engine.name, engine.precision) == (TENSORRT, "fp32")
    given = inputs(*size)
    assert same(engine.run(given), reference.run(given))
    assert engine.replays == 0


def test_a_static_plan_runs_what_it_fits_and_the_dynamic_one_the_rest(machine, bundle, reference):
    engine = machine.load(bundle, variant=None)
    assert engine.open_variants == ()
    for size, variant in (((1, 8, 8), "64x64x1"), ((2, 8, 8), "64x64x2"), ((3, 8, 8), DYNAMIC)):
        given = inputs(*size)
        step = engine.bind({name: given[name] for name in BOUND})
        varying = {name: given[name] for name in ("hidden_states", "timestep")}
        assert same(step(varying), reference.run(given))
        assert same(engine.run(given), reference.run(given))
        assert engine.open_variants[-1] == variant
    with pytest.raises(EngineError, match="none of the plans .* takes .*export.compile"):
        engine.run(inputs(1, 64, 64))
    assert len(engine.open_variants) == 3


def test_static_plans_alone_are_plans(machine, copy, reference):
    plan = plan_path(copy, machine.hardware, "transformer", "fp32")
    plan.unlink()
    plan.with_name(f"{plan.name}.json").unlink()
    engine = machine.load(copy, variant=None)
    assert same(engine.run(inputs(1)), reference.run(inputs(1)))
    assert engine.open_variants == ("64x64x1",)
    with pytest.raises(EngineError, match="none of the plans"):
        engine.run(inputs(3))


def test_sizes_may_change_from_call_to_call(machine, bundle, reference):
    engine = machine.load(bundle)
    for size in ((1, 4, 4), (4, 16, 16), (2, 4, 12), (1, 4, 4)):
        assert same(engine.run(inputs(*size)), reference.run(inputs(*size)))
    # One context served them all, and its buffers grew.
    assert len(machine.runtime.streams) == 1


def test_arrays_that_are_not_in_order_are_read_as_they_are(machine, bundle, reference):
    given = inputs(2)
    turned = {**given, "img_ids": np.asfortranarray(given["img_ids"])}
    assert same(machine.load(bundle).run(turned), reference.run(given))


def test_what_is_bound_is_copied_once(machine, bundle, reference):
    engine, given = machine.load(bundle), inputs(2)
    step = engine.bind({name: given[name] for name in BOUND})
    before = machine.runtime.uploads
    for seed in range(3):
        moving = inputs(2, seed=seed)
        varying = {name: moving[name] for name in ("hidden_states", "timestep")}
        assert same(step(varying), reference.run({**given, **varying}))
    assert machine.runtime.uploads - before == 3 * 2


def test_two_that_are_bound_do_not_disturb_each_other(machine, bundle, reference):
    engine, ones, twos = machine.load(bundle), inputs(1), inputs(2)
    first = engine.bind({name: ones[name] for name in BOUND})
    second = engine.bind({name: twos[name] for name in BOUND})
    for _ in range(2):
        for step, given in ((first, ones), (second, twos)):
            varying = {name: given[name] for name in ("hidden_states", "timestep")}
            assert same(step(varying), reference.run(given))
    # What was bound goes back when it is dropped, and serves the next.
    assert len(machine.runtime.streams) == 2
    del first, second, step
    gc.collect()
    engine.bind({name: ones[name] for name in BOUND})
    assert len(machine.runtime.streams) == 2


def test_a_static_plan_is_captured_after_its_first_run(machine, bundle, reference):
    engine = machine.load(bundle, "64x64x2")
    for seed in range(4):
        given = inputs(2, seed=seed)
        assert same(engine.run(given), reference.run(given))
    assert engine.replays == 3
    assert len(machine.runtime.graphs) == 1


def test_a_static_plan_replays_with_other_bound_inputs(machine, bundle, reference):
    engine = machine.load(bundle, "64x64x1")
    for seed in range(3):
        given = {**inputs(1, seed=seed), "guidance": np.float32([seed])}
        step = engine.bind({name: given[name] for name in BOUND})
        varying = {name: given[name] for name in ("hidden_states", "timestep")}
        for _ in range(2):
            assert same(step(varying), reference.run(given))
        del step
        gc.collect()
    assert engine.replays == 5


def test_a_plan_that_cannot_be_captured_runs_without(machine, bundle, reference, caplog):
    engine = machine.load(bundle, "64x64x2")
    machine.trt.fails = "capture"
    for _ in range(3):
        assert same(engine.run(inputs(2)), reference.run(inputs(2)))
    assert engine.replays == 0
    assert caplog.text.count("without a CUDA graph") == 1


@pytest.mark.parametrize("variant", [DYNAMIC, "64x64x2"])
def test_threads_share_an_engine(machine, bundle, reference, variant):
    engine = machine.load(bundle, variant)
    given = [inputs(2, seed=seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine.run, given))
    assert all(same(f, reference.run(g)) for f, g in zip(found, given, strict=True))
    assert len(machine.runtime.streams) <= 4


def test_nothing_is_left_on_the_device(machine, bundle):
    engine = machine.load(bundle, "64x64x2")
    step = engine.bind({name: inputs(2)[name] for name in BOUND})
    for _ in range(2):
        engine.run(inputs(2))
    assert machine.runtime.allocations
    assert machine.runtime.graphs
    del engine, step
    gc.collect()
    left = machine.runtime.allocations, machine.runtime.graphs, machine.runtime.streams
    assert not any(left)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g.pop("guidance"), "not \\["),
        (lambda g: g.update(more=g["timestep"]), "more"),
        (lambda g: g.update(timestep=g["timestep"].astype(np.float64)), "float32, not float64"),
        (lambda g: g.update(timestep=np.zeros(9, np.float32)), r"\(1,\) to \(8,\)"),
        (lambda g: g.update(timestep=np.zeros((2, 1), np.float32)), r"\(2, 1\)"),
    ],
)
def test_inputs_that_the_plan_does_not_take_are_refused(machine, bundle, change, words):
    engine, given = machine.load(bundle), inputs(2)
    change(given)
    with pytest.raises(EngineError, match=words):
        engine.run(given)
    if "guidance" in given:
        with pytest.raises(EngineError, match=words):
            engine.bind(given)


def test_a_step_wants_exactly_what_is_not_bound(machine, bundle):
    given = inputs(2)
    step = machine.load(bundle).bind({name: given[name] for name in BOUND})
    for varying in ({}, {"timestep": given["timestep"]}, given):
        with pytest.raises(EngineError, match="bound are"):
            step(varying)


def test_no_memory_is_said_in_gigabytes(machine, bundle):
    engine = machine.load(bundle)
    machine.runtime.memory = 2_000
    with pytest.raises(EngineError, match=r"GB left: 0\.00 of 0\.00 GB"):
        engine.run(inputs(8))


@pytest.mark.parametrize(
    ("fails", "words"),
    [("context", "out of memory"), ("run", "Myelin"), ("bf16", "is BF16 in DEVICE memory")],
)
def test_what_tensorrt_refuses_is_said_with_its_reason(machine, bundle, fails, words):
    machine.trt.fails = fails
    with pytest.raises(EngineError, match=words):
        machine.load(bundle).run(inputs(1))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(EngineError, match="on device 3: cudaErrorNotPermitted"):
        Cuda(3, FakeRuntime())


def test_without_tensorrt_the_package_is_named(bundle):
    with pytest.raises(EngineError, match="TensorRT is not installed; install the package"):
        load(bundle, "transformer", "fp32")


# --- what may be opened -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [Machine("11.4.1.2"), Machine("10.16.1.11"), Machine(driver="590.1")]
)
def test_a_plan_of_other_hardware_is_not_opened(bundle, other):
    with pytest.raises(EngineError, match=r"built for 9\.0_11\.4\.0\.106_580\.65\.06\)") as error:
        other.load(bundle)
    assert "python -m export.compile" in str(error.value)
    assert "--parts transformer --precision fp32" in str(error.value)


def test_a_plan_that_was_moved_to_another_key_is_not_opened(copy):
    other = Machine("11.4.1.2")
    folder = copy.path / "engines"
    (folder / Machine().hardware.key).rename(folder / other.hardware.key)
    with pytest.raises(EngineError, match=r"was built for 9\.0_11\.4\.0\.106"):
        other.load(copy)


def _plan(copy: Bundle, machine: Machine) -> Path:
    return plan_path(copy, machine.hardware, "transformer", "fp32")


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "is missing"),
        (_append, "were built"),
        (_flip, "its sha256 differs"),
        (lambda plan: plan.with_name(f"{plan.name}.json").unlink(), "there is no"),
        (lambda plan: plan.with_name(f"{plan.name}.json").write_text("{}"), "schema 1"),
        (lambda plan: plan.with_name(f"{plan.name}.json").write_text("{"), "cannot be read"),
        (
            lambda plan: shutil.copy(
                plan.with_name("transformer_fp32_64x64x1.plan.json"), f"{plan}.json"
            ),
            "is of transformer fp32 64x64x1",
        ),
    ],
)
def test_a_damaged_plan_is_not_opened(machine, copy, damage, words):
    damage(_plan(copy, machine))
    with pytest.raises(EngineError, match=words) as error:
        machine.load(copy)
    assert "python -m export.compile" in str(error.value)


def test_a_plan_of_another_graph_is_not_opened(machine, copy):
    part = copy.parts["transformer"]
    file = replace(part.files["fp32"], sha256="0" * 64)
    other = replace(copy, parts={**copy.parts, "transformer": replace(part, files={"fp32": file})})
    with pytest.raises(EngineError, match="built from another graph"):
        machine.load(other)


def test_a_plan_that_tensorrt_does_not_open_is_refused(machine, copy):
    path = _plan(copy, machine)
    plan = open_plan(copy, "transformer", "fp32", machine.hardware)
    path.write_bytes(b"not a plan")
    with pytest.raises(EngineError, match="magic tag does not match"):
        TrtEngine(plan, "Build it", machine.trt, machine.cuda)


def test_a_sidecar_that_names_other_inputs_is_refused(machine, copy):
    path = _plan(copy, machine)
    sidecar = read_sidecar(path)
    content = json.loads(path.with_name(f"{path.name}.json").read_text())
    del content["profile"]["guidance"]
    path.with_name(f"{path.name}.json").write_text(json.dumps(content))
    assert "guidance" in sidecar.profile
    with pytest.raises(EngineError, match="its sidecar says"):
        machine.load(copy)


# --- names of the real bindings ---------------------------------------------------------------


def _parameters(function: Callable[..., object]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(
    ("protocol", "module"), [(cuda_module.Runtime, "runtime"), (cuda_module.Nvml, "nvml")]
)
def test_what_is_called_of_cuda_is_what_its_bindings_have(protocol, module):
    real = importlib.import_module(f"cuda.bindings.{module}")
    called = [name for name in vars(protocol) if not name.startswith("_")]
    assert len(called) >= 3
    for name in called:
        head = getattr(real, name).__doc__.split("\n")[0]
        inside = head[head.index("(") + 1 : head.index(")")]
        found = [part.split(":")[0].split()[-1] for part in inside.split(",") if part.strip()]
        assert found == _parameters(getattr(protocol, name)), name


def test_members_of_enumerations_are_those_of_cuda():
    runtime = importlib.import_module("cuda.bindings.runtime")
    for kind in (runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode, runtime.cudaDeviceAttr):
        for member in getattr(FakeRuntime, kind.__name__):
            assert getattr(kind, member.name).value == member.value


def test_importing_the_engine_imports_neither_tensorrt_nor_cuda():
    code = (
        f"import sys, {trt_module.__name__}; "
        "print([m for m in ('tensorrt', 'cuda', 'torch') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
