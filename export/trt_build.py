"""One ONNX file -> one TensorRT plan and its sidecar.

The network is strongly typed: TensorRT computes in the types and the quantization that the graph
says, and in no other. What it made of them is counted in the finished plan by its inspector, and a
plan that has no int8 or fp8 layer, of a graph with products in them, is not written.

A build holds weights and plan in memory, about three times the graph's bytes.

    >>> build(trt, job, hardware, progress=print)
    PosixPath('bundles/mini/engines/9.0_11.4.0.106_580.65.06/transformer_fp8.plan')
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

from dermaflux import __version__, files
from dermaflux.bundle import Data, sha256
from dermaflux.engines.trt_api import logger
from dermaflux.engines.trt_plan import SCHEMA, Hardware, Sidecar, write_sidecar
from dermaflux.errors import Cancelled, EngineError
from export.trt_api import Builder, IBuilderConfig, INetworkDefinition, TensorRT
from export.trt_profile import Profile
from export.trt_quantization import both_factors

log = logging.getLogger(__name__)

TIMINGS: Final = "timing.cache"
_QUANTIZED: Final = {"int8": "int8", "fp8": "fp8"}
"""Precision -> how the inspector writes its type, in small letters."""
Progress = Callable[[str, int, int], bool]
"""Phase, steps done, steps in all -> whether to go on."""


@dataclass(frozen=True)
class Flags:
    """What changes a plan besides graph and shapes."""

    workspace_gib: float
    level: int
    tf32: bool


@dataclass(frozen=True)
class Job:
    """A plan to build. `graph` are the ONNX file, first, and its external data, by their paths
    relative to the bundle; `onnx` is where the first lies, `plan` where the plan goes."""

    part: str
    precision: str
    variant: str
    onnx: Path
    graph: tuple[Data, ...]
    profile: Profile
    plan: Path
    flags: Flags


def build(trt: TensorRT, job: Job, hardware: Hardware, progress: Progress) -> Sidecar:
    """Build a plan on this thread's GPU and write it, its log beside it, and last its sidecar.

    Raises:
        EngineError: the parser refuses the graph, the builder fails, or nothing is quantized.
        Cancelled: `progress` said to stop.
    """
    started = time.monotonic()
    folder = job.plan.parent
    folder.mkdir(parents=True, exist_ok=True)
    errors: list[str] = []
    with _log(job.plan.with_suffix(".log")) as to:
        # TensorRT keeps no reference of its own to the logger and the monitor.
        listener = logger(trt, to, errors)
        builder = trt.Builder(listener)
        network, parser = _parse(trt, builder, listener, job, errors)
        config = _configure(trt, builder, job)
        _remember(config, folder / TIMINGS)
        monitor = _monitor(trt, progress)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if monitor.stopped:
            raise Cancelled("the build was stopped; nothing was written")
        if plan is None:
            raise EngineError(_failed(job, "builds no plan", errors))
        # Weights were read in place: the parser has to outlive the build.
        del parser
        content = memoryview(plan)
        layers, quantized = _inspect(trt, listener, content, job, errors)
        cache = config.get_timing_cache()
        if cache is not None:
            files.write(folder / TIMINGS, bytes(memoryview(cache.serialize())))
        # Any buffer is written; a copy in bytes would take its size once more.
        files.write(job.plan, cast(bytes, content))
    sidecar = Sidecar(
        schema=SCHEMA,
        part=job.part,
        precision=job.precision,
        variant=job.variant,
        graph=job.graph,
        profile=job.profile,
        flags=asdict(job.flags),
        hardware=hardware,
        plan=Data(job.plan.name, job.plan.stat().st_size, sha256(job.plan)),
        layers=layers,
        quantized_layers=quantized,
        seconds=round(time.monotonic() - started, 1),
        made_by=f"dermaflux {__version__}",
    )
    write_sidecar(job.plan, sidecar)
    return sidecar


def current(sidecar: Sidecar, job: Job, hardware: Hardware) -> bool:
    """Whether a plan that is there is the one that a job would build."""
    return (
        sidecar.hardware == hardware
        and sidecar.graph == job.graph
        and dict(sidecar.profile) == dict(job.profile)
        and dict(sidecar.flags) == asdict(job.flags)
        and (sidecar.part, sidecar.precision, sidecar.variant)
        == (job.part, job.precision, job.variant)
        and job.plan.is_file()
        and job.plan.stat().st_size == sidecar.plan.bytes
        and sha256(job.plan) == sidecar.plan.sha256
    )


def count_layers(information: str, kind: str | None) -> tuple[int, int]:
    """Layers of a plan, and those that take or give `kind` (`fp8`), from the inspector's JSON.

    Up to 10.x a tensor has "Format/Datatype", from 11.0 on "Format" and "DataType".

    Raises:
        EngineError: it is of no form that we know.
    """
    try:
        layers = json.loads(information)["Layers"]
        formats = [_formats(layer) for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"TensorRT's inspector says something unknown: {error!r}") from error
    return len(layers), sum(kind is not None and kind in text for text in formats)


def _formats(layer: Mapping[str, Any]) -> str:
    """All that a layer says of the types of its tensors, in small letters."""
    tensors = [*layer["Inputs"], *layer["Outputs"]]
    keys = ("Format/Datatype", "Format", "DataType", "Datatype")
    return " ".join(str(tensor[key]) for tensor in tensors for key in keys if key in tensor).lower()


def _parse(
    trt: TensorRT, builder: Builder, listener: Any, job: Job, errors: list[str]
) -> tuple[INetworkDefinition, Any]:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, listener)
    # By its path, from which the parser finds external data.
    if not parser.parse_from_file(str(job.onnx)):
        reasons = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [f"{r.node_operator()} {r.node_name()}: {r.desc()}" for r in reasons]
        raise EngineError(_failed(job, "cannot parse it", said or errors))
    return network, parser


def _configure(trt: TensorRT, builder: Builder, job: Job) -> IBuilderConfig:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(job.flags.workspace_gib * 2**30))
    config.builder_optimization_level = job.flags.level
    # For the inspector: how each layer is computed is else not in the plan.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # On unless cleared, and then fp32 is not fp32.
    set_tf32 = config.set_flag if job.flags.tf32 else config.clear_flag
    set_tf32(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for name, shapes in job.profile.items():
        profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(_failed(job, f"refuses the shapes {dict(job.profile)}", []))
    return config


def _remember(config: IBuilderConfig, path: Path) -> None:
    """Start from what earlier builds here have timed; a cache of another GPU is not taken."""
    try:
        known = path.read_bytes()
    except FileNotFoundError:
        known = b""
    if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
        log.info("%s is of another GPU or TensorRT; timing anew", path)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _inspect(
    trt: TensorRT, listener: Any, content: memoryview, job: Job, errors: list[str]
) -> tuple[int, int]:
    """Open the plan once here: it opens, and its quantization is there."""
    engine = trt.Runtime(listener).deserialize_cuda_engine(content)
    if engine is None:
        raise EngineError(_failed(job, "does not open its own plan", errors))
    inspector = engine.create_engine_inspector()
    information = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    layers, quantized = count_layers(information, _QUANTIZED.get(job.precision))
    # Where the weights alone are in 8 bits, as T5's, no layer need compute in them.
    if job.precision in _QUANTIZED and quantized == 0 and both_factors(job.onnx):
        raise EngineError(
            f"TensorRT built {job.part} and none of its {layers} layers is in {job.precision}: it "
            f"runs in high precision. {job.plan} is not written"
        )
    return layers, quantized


def _monitor(trt: TensorRT, progress: Progress) -> Any:
    """TensorRT's progress -> ours; it is called from several of its threads."""
    steps: dict[str, int] = {}

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            # An exception would have to find its way through C++; stopping is a return value.
            try:
                go_on = progress(phase_name, step + 1, steps.get(phase_name, 0))
            except BaseException:
                log.exception("progress could not be shown")
                go_on = False
            self.stopped = self.stopped or not go_on
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            steps.pop(phase_name, None)

    return Monitor()


@contextmanager
def _log(path: Path) -> Iterator[logging.Logger]:
    """A log file of one build, with all that TensorRT says; errors go on to the usual log too."""
    to = logging.getLogger(f"{__name__}.{path.stem}")
    level, to.propagate = to.level, False
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to.addHandler(handler)
    to.setLevel(logging.DEBUG)
    try:
        yield to
    finally:
        to.removeHandler(handler)
        to.setLevel(level)
        handler.close()


def _failed(job: Job, what: str, said: list[str]) -> str:
    reasons = "; ".join(said[-3:]) or "it gives no reason"
    return (
        f"TensorRT {what}: {job.part} in {job.precision} ({job.onnx}): {reasons}. All that it "
        f"said is in {job.plan.with_suffix('.log')}"
    )
