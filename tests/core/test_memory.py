"""Memory: what a machine says it has, what parts need, and who takes turns where not all fit."""

from __future__ import annotations

import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dermaflux import memory
from dermaflux.bundle import GENERATOR_PARTS, Bundle, Data
from dermaflux.engines import ENGINES, Choice, choose
from dermaflux.engines.fake import Fake
from dermaflux.errors import EngineError
from dermaflux.hardware import Gpu, Machine, Memory, look, nvidia, ram
from dermaflux.memory import CPU, GPU, Plan, plan
from dermaflux.pipeline import Pipeline
from dermaflux.residency import InTurns

GB = 10**9
SIZES = {"text_encoder": 246, "text_encoder_2": 9524, "transformer": 23802, "vae_decoder": 99}
"""Megabytes of FLUX.1-dev's parts in bf16."""
CONFIGS = {
    "transformer": '{"num_attention_heads": 24, "attention_head_dim": 128}',
    "vae_decoder": '{"block_out_channels": [128, 256, 512, 512]}',
    "text_encoder": '{"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}',
    "text_encoder_2": '{"d_model": 4096, "d_ff": 10240, "num_heads": 64}',
}


def machine(gpu: float | None = None, ram: float | None = 64) -> Machine:
    """A machine with so many GB free on its GPU and beside it."""
    gpus = ()
    if gpu is not None:
        memory = Memory(round(gpu * GB), round(gpu * GB), "test")
        gpus = (Gpu("a card", "GPU-1", memory, (8, 9), "580.1"),)
    held = None if ram is None else Memory(round(ram * GB), round(ram * GB), "test")
    return Machine(2, held, gpus, "" if gpus else "none")


@pytest.fixture(scope="module")
def flux(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle, said to be as large as FLUX.1-dev in bf16, its transformer also in fp8."""
    folder = tmp_path_factory.mktemp("flux")
    for part, text in CONFIGS.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(text)
    parts = {}
    for name, part in tiny_bundle.parts.items():
        file = next(iter(part.files.values()))
        size = SIZES.get(name, 1) * 10**6
        bf16 = replace(file, bytes=1000, data=(Data("x", size - 1000, ""),), engines=ENGINES)
        half = replace(bf16, data=(Data("x", size // 2, ""),))
        files = {"bf16": bf16, "fp8": half} if name == "transformer" else {"bf16": bf16}
        parts[name] = replace(part, files=files)
    return replace(
        tiny_bundle,
        path=folder,
        parts=parts,
        defaults=replace(tiny_bundle.defaults, height=1024, width=1024),
        limits=replace(tiny_bundle.limits, max_size=2048, max_batch=8),
    )


def on_card(flux: Bundle, precision: str = "bf16") -> dict[str, Choice]:
    def level(part: str) -> str:
        return precision if precision in flux.parts[part].files else "bf16"

    return {
        part: Choice(part, "tensorrt", level(part), "", (), "cuda:0") for part in GENERATOR_PARTS
    }


def planned(flux: Bundle, gpu: float, precision: str = "bf16") -> Plan:
    return plan(flux, on_card(flux, precision), machine(gpu))


def test_all_parts_stay_where_they_fit(flux):
    found = planned(flux, 48)
    assert not found.in_turns
    assert found.groups == (GENERATOR_PARTS,)
    weights = sum(SIZES.values()) * 10**6
    assert weights < found.peak(GPU, 1024, 1024) < weights + 8 * GB
    assert found.peak(CPU, 1024, 1024) == 0


def test_text_encoders_leave_a_24_gb_card_to_the_transformer(flux):
    found = planned(flux, 25.4)
    assert found.in_turns
    assert found.groups[0] == ("text_encoder", "text_encoder_2")
    assert found.peak(GPU, 1024, 1024) <= 25.4 * GB


def test_fp8_takes_turns_on_a_16_gb_card_and_stays_on_a_32_gb_one(flux):
    assert planned(flux, 16.5, "fp8").in_turns
    assert not planned(flux, 32, "fp8").in_turns


def test_what_does_not_fit_is_refused_with_figures_and_a_way_out(flux, monkeypatch):
    def card_only(bundle, part, engine, precision, machine):
        return on_card(flux, precision)[part]

    monkeypatch.setattr(memory, "choose", card_only)
    with pytest.raises(EngineError) as refused:
        planned(flux, 16.5)
    text = str(refused.value)
    assert "transformer bf16 23.8 GB" in text
    assert "has 16.5 GB free of 16.5 GB" in text
    assert "--precision fp8 (" in text
    with pytest.raises(EngineError, match="No precision or size of this bundle fits"):
        planned(flux, 4)


def test_a_device_that_is_forced_or_silent_is_not_refused(flux):
    card = machine(4)
    assert plan(flux, on_card(flux), card, in_turns=True).in_turns
    assert not plan(flux, on_card(flux), card, in_turns=False).in_turns
    silent = machine(None, None)
    found = plan(flux, on_card(flux), silent)
    assert (found.in_turns, found.batch(1024, 1024)) == (False, 8)


@pytest.mark.parametrize("gpu", [24.0, 26.0, 30.0, 40.0, 80.0])
def test_more_memory_never_plans_worse(flux, gpu):
    """Fewer groups, larger batches, and every plan keeps within what there is."""
    try:
        less = planned(flux, gpu)
    except EngineError:
        planned(flux, 80)
        return
    more = planned(flux, gpu + 5)
    assert len(more.groups) <= len(less.groups)
    for size in (256, 512, 1024):
        batch = less.batch(size, size)
        assert less.peak(GPU, size, size, batch) <= gpu * GB
        if len(more.groups) == len(less.groups):
            assert more.batch(size, size) >= batch


def test_needs_grow_with_size_and_batch(flux):
    found = planned(flux, 80)
    for batch in (1, 2, 8):
        peaks = [found.peak(GPU, size, size, batch) for size in (256, 512, 1024, 2048)]
        assert peaks == sorted(set(peaks))
    for size in (256, 1024):
        peaks = [found.peak(GPU, size, size, batch) for batch in (1, 2, 4, 8)]
        assert peaks == sorted(set(peaks))
    assert found.peak(GPU, 512, 1024) == found.peak(GPU, 1024, 512)


def test_every_part_has_a_recipe_of_its_own(flux):
    found = planned(flux, 80)
    images = {need.part: need.image(1024, 1024, 8) for need in found.needs}
    # 512 text and 4096 image tokens of 3072 numbers; the tiny bundle's text has 16.
    assert images["transformer"] == 16 * (16 + 4096) * 3072 * 2
    assert images["vae_decoder"] == 5 * 1024 * 1024 * 256 * 2
    assert images["text_encoder_2"] == 4 * 16 * (4096 + 10240) * 2
    unfused = memory.need(flux, Choice("transformer", "onnxruntime-cpu", "bf16", ""))
    assert unfused.image(1024, 1024, 8) == (16 * 4112 * 3072 + 3 * 24 * 4112**2) * 4


def test_without_a_config_the_tensors_are_counted(tiny_bundle):
    need = memory.need(tiny_bundle, choose(tiny_bundle, "classifier", machine=machine()))
    assert need.image(64, 64, 8) == 32 * (3 * 32 * 32 + 2 + 3) * 4


def test_batches_that_do_not_fit_are_split_and_nobody_sees_it(fake_pipeline, tiny_bundle):
    requests = [fake_pipeline.request("lesion", seed=i) for i in range(7)]
    expected = fake_pipeline.generate(requests)
    sizes: list[int] = []

    def watched(inputs):
        sizes.append(len(inputs["hidden_states"]))
        return fake_pipeline.engines["transformer"].run(inputs)

    choices = {part: choose(tiny_bundle, part, machine=machine()) for part in GENERATOR_PARTS}
    roomy = plan(tiny_bundle, choices, machine())
    room = roomy.peak(CPU, 64, 64, 2)
    tight = replace(roomy, devices={CPU: Memory(room, room, "test")})
    assert tight.batch(64, 64) == 2
    engines = {**fake_pipeline.engines, "transformer": Fake(watched)}
    pipeline = rebuilt(fake_pipeline, engines, tight)
    assert all(map(np.array_equal, pipeline.generate(requests), expected))
    assert set(sizes) == {1, 2}
    with pytest.raises(EngineError, match="an image of 128 x 128 pixels does not fit.*smaller"):
        pipeline.generate([replace(requests[0], height=128, width=128)])


def rebuilt(pipeline: Pipeline, engines, plan: Plan | None = None) -> Pipeline:
    return Pipeline(
        pipeline.model, pipeline.schedule, pipeline.limits, pipeline.defaults, pipeline.tokenizers,
        engines, plan=plan,
    )  # fmt: skip


def test_parts_in_turns_are_loaded_once_a_call_and_never_beside_each_other(fake_pipeline):
    groups = (("text_encoder", "text_encoder_2"), ("transformer",), ("vae_decoder",))
    loaded: list[str] = []
    seen: list[set[str]] = []

    def load(part: str):
        loaded.append(part)
        seen.append({*turns.resident, part})
        return fake_pipeline.engines[part]

    turns = InTurns(load, groups)
    assert list(turns) == list(GENERATOR_PARTS)
    assert ("transformer" in turns, "x" in turns, loaded) == (True, False, [])
    pipeline = rebuilt(fake_pipeline, turns)
    requests = [
        fake_pipeline.request("lesion " * (1 + i % 3), seed=i, height=32 + 16 * (i % 2))
        for i in range(9)
    ]
    expected = fake_pipeline.generate(requests)
    assert all(map(np.array_equal, pipeline.generate(requests), expected))
    assert loaded == list(GENERATOR_PARTS)
    assert all(any(parts <= set(group) for group in groups) for parts in seen)

    found: list[bool] = []

    def work() -> None:
        images = pipeline.generate(requests)
        found.append(all(map(np.array_equal, images, expected)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3
    assert loaded == list(GENERATOR_PARTS) * 4
    with pytest.raises(KeyError):
        turns["x"]


def test_freed_engines_are_gone(fake_pipeline):
    import weakref

    class Held(Fake):
        pass

    refs = {}

    def load(part: str):
        engine = Held(fake_pipeline.engines[part].run)
        refs[part] = weakref.ref(engine)
        return engine

    pipeline = rebuilt(fake_pipeline, InTurns(load, [(part,) for part in GENERATOR_PARTS]))
    pipeline.generate([fake_pipeline.request("lesion", seed=1)])
    assert [part for part, ref in refs.items() if ref() is not None] == ["vae_decoder"]


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable:   800 kB\n"


def test_ram_is_what_the_kernel_says(tmp_path):
    root = write(tmp_path, proc__meminfo=MEMINFO)
    assert ram(root) == Memory(1_024_000, 819_200, "MemAvailable")


@pytest.mark.parametrize("own", ["/", "/a/b"])
def test_ram_is_the_containers_in_version_2(tmp_path, own):
    root = write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=f"0::{own}\n")
    group = root / "sys/fs/cgroup" / own.split("/")[1]
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text("500000\n")
    (group / "memory.current").write_text("300000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 40000\n")
    assert ram(root) == Memory(500_000, 240_000, "control group memory.max")
    (group / "memory.max").write_text("max\n")
    assert ram(root) == Memory(1_024_000, 819_200, "MemAvailable")


def test_ram_is_the_containers_in_version_1(tmp_path):
    root = write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="5:memory:/x\n3:cpu:/\n")
    group = root / "sys/fs/cgroup/memory"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("500000")
    (group / "memory.usage_in_bytes").write_text("600000")
    (group / "memory.stat").write_text("total_inactive_file 0\n")
    assert ram(root) == Memory(500_000, 0, "control group memory.limit_in_bytes")
    (group / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert ram(root) == Memory(1_024_000, 819_200, "MemAvailable")


def test_this_machine_can_be_looked_at():
    found = look()
    assert found.cores >= 1
    if found.ram is not None:
        assert 0 < found.ram.available <= found.ram.total
    assert bool(found.gpus) != bool(found.no_gpu)


class Nvml(types.ModuleType):
    """Stands in for NVIDIA's management library: two cards of different kinds."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken: bool = False) -> None:
        super().__init__("pynvml")
        self.open = 0
        self.broken = broken

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver/library version mismatch")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid not in ("GPU-0", "GPU-1"):
            raise self.NVMLError("Not Found")
        return int(uuid[-1])

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> object:
        return types.SimpleNamespace(total=(handle + 1) * GB, free=handle * GB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (8, 9) if handle else (7, 5)

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return "Ada" if handle else b"Turing"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["Turing", "Ada"]),
        ("1,0", ["Ada", "Turing"]),
        ("GPU-1", ["Ada"]),
        ("1,7,0", ["Ada"]),
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_are_those_that_cuda_may_use(tmp_path, monkeypatch, visible, names):
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus, why = nvidia(write(tmp_path, dev__nvidiactl=""))
    assert [gpu.name for gpu in gpus] == names
    assert nvml.open == 0
    assert bool(why) != bool(gpus)
    if names[:1] == ["Ada"]:
        memory = Memory(2 * GB, GB, "NVML")
        assert gpus[0] == Gpu("Ada", "GPU-1", memory, (8, 9), "580.1")


def test_a_gpu_that_cannot_be_had_says_why(tmp_path, monkeypatch):
    assert nvidia(tmp_path) == ((), "no NVIDIA driver is loaded")
    root = write(tmp_path, dev__nvidiactl="")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "nvidia-ml-py" in nvidia(root)[1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(broken=True))
    assert "version mismatch" in nvidia(root)[1]
