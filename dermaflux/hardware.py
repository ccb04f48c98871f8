"""What this machine has: cores, memory, NVIDIA GPUs, Intel's GPU and NPU. Facts only, no choice.

Cheap enough to be asked at every start: files of the kernel, and NVIDIA's management library only
where its driver is. No engine and no CUDA context is made.

    >>> look().ram
    Memory(total=25281871872, available=19327352832, source='MemAvailable')
    >>> look().gpus[0].capability       # (8, 9) is Ada

Only machines without a GPU have run this so far: what NVML answers is tested with a fake.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_UNLIMITED: Final = 2**60
"""Version 1 of control groups writes "no limit" as a number near 2**63."""
_INTEL: Final = "0x8086"
_DRIVERS: Final = ("dev/nvidiactl", "dev/dxg", "proc/driver/nvidia/version")
"""Where NVIDIA's driver shows on Linux, and on Linux within Windows."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a device: all, those free now, and what said so."""

    total: int
    available: int
    source: str


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU that CUDA may use here; `memory` is its own."""

    name: str
    uuid: str
    memory: Memory
    capability: tuple[int, int]
    driver: str


@dataclass(frozen=True)
class Machine:
    """`gpus` in the order of `CUDA_VISIBLE_DEVICES`; `no_gpu` says why there are none.

    `ram` is None where the system does not tell; `intel` are OpenVINO's names of Intel's devices
    beside the CPU, as far as drivers show them.
    """

    cores: int
    ram: Memory | None
    gpus: tuple[Gpu, ...] = ()
    no_gpu: str = ""
    intel: tuple[str, ...] = ()


def look(root: Path = Path("/")) -> Machine:
    """The machine as this process may use it; `root` is where the kernel's files are."""
    gpus, why = nvidia(root)
    return Machine(usable_cores(root), ram(root), gpus, why, tuple(_intel(root)))


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may use: its affinity, and the CPU quota of its container.

    ONNX Runtime counts the host's cores, and then a container of 2 fights with 64 threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return cores or 1
    return max(1, min(cores or 1, allowed))


def processor(root: Path = Path("/")) -> str:
    """The name of the processor as the kernel has it, or the kind of machine where it has none."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def ram(root: Path = Path("/")) -> Memory | None:
    """Memory that can be had without swapping: the machine's, or less in a container.

    The kernel's `MemAvailable`, or what the limit of a control group (version 2 or 1, this one or
    one above it) leaves: limit - usage + file cache that can be dropped (`inactive_file`).
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        kilobytes = {key: int(rest.split()[0]) for key, rest in (x.split(":", 1) for x in lines)}
        found = Memory(
            kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024, "MemAvailable"
        )
    except (OSError, ValueError, KeyError, IndexError):
        return _other_system()
    for limit, usage, cache, source in _limits(root):
        free = max(0, limit - usage + cache)
        if limit < found.total or free < found.available:
            available = min(found.available, free)
            found = Memory(min(found.total, limit), available, source)
    return found


def nvidia(root: Path = Path("/")) -> tuple[tuple[Gpu, ...], str]:
    """NVIDIA's GPUs that CUDA may use, and why there are none."""
    if not any((root / driver).exists() for driver in _DRIVERS):
        return (), "no NVIDIA driver is loaded"
    if importlib.util.find_spec("pynvml") is None:
        return (), "nvidia-ml-py, which tells GPUs and their memory, is not installed"
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (), f"NVIDIA's driver does not answer ({error})"
    try:
        found = tuple(_gpu(pynvml, handle) for handle in handles(pynvml))
    except pynvml.NVMLError as error:
        return (), f"NVIDIA's driver does not answer ({error})"
    finally:
        pynvml.nvmlShutdown()
    return found, "" if found else "CUDA_VISIBLE_DEVICES leaves no NVIDIA GPU"


def handles(nvml: Any) -> Iterator[Any]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order; CUDA stops at the first it lacks."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = nvml.nvmlDeviceGetCount()
    names = [str(i) for i in range(count)] if visible is None else visible.split(",")
    for name in (text.strip() for text in names):
        if name.isdigit():
            if int(name) >= count:
                return
            yield nvml.nvmlDeviceGetHandleByIndex(int(name))
        elif name.startswith(("GPU-", "MIG-")):
            yield nvml.nvmlDeviceGetHandleByUUID(name)
        else:
            return


def _gpu(nvml: Any, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        memory=Memory(int(memory.total), int(memory.free), "NVML"),
        capability=(int(major), int(minor)),
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
    )


def _text(value: str | bytes) -> str:
    """Older releases of NVML's bindings give bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _limits(root: Path) -> Iterator[tuple[int, int, int, str]]:
    """Limit, usage and droppable cache of every control group that holds this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            bases: tuple[Path, ...] = (base, base / "unified")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            bases = (base / "memory",)
        else:
            continue
        own = Path(path.lstrip("/"))
        for folder in (top / above for top in bases for above in (own, *own.parents)):
            try:
                limit = int((folder / names[0]).read_text())
                usage = int((folder / names[1]).read_text())
                stat = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # "max" is no number: no limit at this level.
                continue
            if limit < _UNLIMITED:
                yield limit, usage, int(stat.get(names[2], 0)), f"control group {names[0]}"


def _other_system() -> Memory | None:
    """Where there is no /proc: psutil, if something brought it along."""
    if importlib.util.find_spec("psutil") is None:
        return None
    import psutil  # type: ignore[import-untyped]

    found = psutil.virtual_memory()
    return Memory(int(found.total), int(found.available), "psutil")


def _intel(root: Path) -> Iterator[str]:
    for vendor in sorted((root / "sys/class/drm").glob("renderD*/device/vendor")):
        try:
            if vendor.read_text().strip() == _INTEL:
                yield "GPU"
                break
        except OSError:
            continue
    if any((root / "sys/bus/pci/drivers/intel_vpu").glob("*:*")):
        yield "NPU"
