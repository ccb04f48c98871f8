"""A bundle's ONNX files -> TensorRT plans for the GPU of this machine; or whether they would build.

    python -m export.compile bundles/mini                             # all parts, their best file
    python -m export.compile bundles/mini --parts transformer --precision fp8
    python -m export.compile bundles/mini --parts transformer --static 512x512   # for CUDA graphs
    python -m export.compile --check bundles/mini                     # needs no TensorRT and no GPU

Plans go to `BUNDLE/engines/<compute capability>_<TensorRT>_<driver>/`, each with a sidecar of what
it was built from; one that is there and current is kept. TensorRT 10.15 or newer (`--check` says
why, by version) and cuda-bindings are needed, and are looked for only when building.

What has run: the check, and every line of the build against a stand-in for TensorRT and CUDA whose
names and parameters are those of the real bindings. What has not: a build by TensorRT on a GPU.

Progress goes to stderr; the last line of stdout is one JSON object. The exit status is 0, 1 where
the check refuses a graph, 2 where a plan could not be built, 130 where it was stopped.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermaflux.bundle import PARTS, Bundle
from dermaflux.command import ended, option, parsed
from dermaflux.engines.cuda import Cuda
from dermaflux.engines.trt_api import import_tensorrt
from dermaflux.engines.trt_plan import Hardware, Sidecar, read_sidecar
from dermaflux.errors import BundleError, EngineError
from export import preflight
from export.trt_api import TensorRT
from export.trt_build import Flags, Job, build, current
from export.trt_check import Ask, check
from export.trt_graph import Finding
from export.trt_jobs import chosen_parts, plan_jobs
from export.trt_profile import parse_size
from export.trt_support import OLDEST

log = logging.getLogger("export.compile")


@dataclass(frozen=True)
class Settings:
    """What to build or to check."""

    bundle: Path = option("the bundle's folder; with --check also one ONNX file")
    check: bool = option("only say whether the graphs would build", False)
    parts: tuple[str, ...] = option(f"comma-separated, of {','.join(PARTS)}; default: all", ())
    precision: tuple[str, ...] = option(
        "comma-separated; default: each part's best for this GPU", ()
    )
    static: tuple[str, ...] = option(
        "comma-separated, as 512x512 or 512x512x4 (height x width x batch): plans "
        "of one shape instead of one for all shapes",
        (),
    )
    tensorrt: str = option(f"with --check: only this version; default: {OLDEST} and newer", "")
    workspace: float = option("GiB of GPU memory that kernels may take; default: 8", 8.0)
    level: int = option("how long to search for fast kernels, 0 to 5; default: 3", 3)
    tf32: bool = option("let fp32 products run in TF32: faster, less exact", False)
    force: bool = option("build anew what is there and current", False)
    device: int = option("the GPU's number; default: 0", 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status. Errors meant for the user end in one sentence."""
    settings = parsed(
        Settings, "python -m export.compile", "Build TensorRT plans of a bundle.", arguments
    )
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("export").setLevel(logging.INFO)

    def work() -> int:
        if settings.check:
            asked = Ask(settings.parts, settings.precision, settings.static, settings.tensorrt)
            result = check(settings.bundle, asked)
        else:
            trt = import_tensorrt()
            result = {"plans": compile_bundle(settings, trt, Cuda(settings.device))}
        print(json.dumps(result), flush=True)
        return 0 if result.get("builds", True) else 1

    return ended(work)


class Refused(EngineError):
    """The check found what TensorRT would refuse."""

    exit_status = 1


def compile_bundle(settings: Settings, trt: TensorRT, cuda: Cuda) -> list[dict[str, Any]]:
    """Build what is asked for and not there; where each plan lies, and what is in it.

    Raises:
        BundleError: the bundle cannot be opened, or a static size is outside of its limits.
        Refused: the check refuses a graph; nothing has been built then.
        EngineError: an unknown part or precision, a GPU that lacks it, or TensorRT failed.
        Cancelled: it was stopped.
    """
    _check(settings)
    bundle = Bundle.open(settings.bundle, verify=True)
    hardware = Hardware.of(trt.__version__, cuda)
    flags = Flags(settings.workspace, settings.level, settings.tf32)
    sizes = [parse_size(text) for text in settings.static]
    parts = chosen_parts(bundle, settings.parts)
    jobs = plan_jobs(bundle, hardware, parts, settings.precision, sizes, flags)
    for job in jobs:
        found = preflight.check(job.onnx, trt.__version__, job.profile, job.precision)
        found = [finding for finding in found if finding.refuses]
        if found:
            raise Refused(_refusal(job, trt.__version__, found))
    done = []
    for job in jobs:
        kept = None if settings.force else _kept(job, hardware)
        name = f"{job.part} in {job.precision}, {job.variant}"
        log.info("%s: %s", name, "kept, it is current" if kept else "building")
        sidecar = kept or _Builder(trt, hardware, cuda)(job, name)
        if not kept:
            log.info("%s: built in %.0f s, %d layers, %d of them quantized", name,
                     sidecar.seconds, sidecar.layers, sidecar.quantized_layers)  # fmt: skip
        done.append(
            {
                "plan": str(job.plan),
                "built": kept is None,
                "bytes": sidecar.plan.bytes,
                "layers": sidecar.layers,
                "quantized_layers": sidecar.quantized_layers,
                "seconds": sidecar.seconds,
            }
        )
    return done


def _kept(job: Job, hardware: Hardware) -> Sidecar | None:
    try:
        sidecar = read_sidecar(job.plan)
    except EngineError:
        return None
    return sidecar if current(sidecar, job, hardware) else None


def _refusal(job: Job, version: str, found: Sequence[Finding]) -> str:
    shown = "; ".join(str(finding) for finding in found[:3])
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"TensorRT {version} would not build {job.part} in {job.precision}: {shown}{more}. "
        f"All of it: python -m export.compile --check {job.onnx} --tensorrt {version}"
    )


def _check(settings: Settings) -> None:
    if not 0 <= settings.level <= 5:
        raise BundleError(f"--level {settings.level} is not one of 0 to 5")
    if settings.workspace <= 0:
        raise BundleError(f"--workspace {settings.workspace} leaves kernels no memory; use 1 to 64")


class _Builder:
    """Builds on a thread of its own: an interrupt is heard by Python, and the main thread would be
    inside of TensorRT."""

    def __init__(self, trt: TensorRT, hardware: Hardware, cuda: Cuda) -> None:
        self._trt, self._hardware, self._cuda = trt, hardware, cuda
        self._stop = False

    def __call__(self, job: Job, name: str) -> Sidecar:
        def work() -> Sidecar:
            # CUDA keeps the device per thread.
            self._cuda.activate()
            return build(self._trt, job, self._hardware, progress)

        def progress(phase: str, done: int, steps: int) -> bool:
            # A build has thousands of steps; every tenth of a phase is enough to see it live.
            if done == steps or done % max(1, steps // 10) == 0:
                print(f"{name}: {phase} {done} of {steps}", file=sys.stderr, flush=True)
            return not self._stop

        with ThreadPoolExecutor(max_workers=1) as thread:
            future = thread.submit(work)
            try:
                # In slices: a signal that another thread was given wakes no one who waits.
                while not wait([future], timeout=0.2).done:
                    pass
                return future.result()
            except KeyboardInterrupt:
                print("stopping after this step", file=sys.stderr)
                raise
            finally:
                # Of no effect after a result; after an interrupt the build is asked to end.
                self._stop = True


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
