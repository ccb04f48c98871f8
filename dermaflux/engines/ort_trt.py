"""ONNX Runtime's TensorRT provider: its settings, the library it needs, where its engines are kept.

The second road to TensorRT, where no plan was built. It needs the libnvinfer that its library is
linked to (10 for onnxruntime-gpu 1.31), whichever TensorRT `dermaflux.engines.trt` has plans of. It
builds an engine per part at its first run, which takes minutes, and keeps it in
`BUNDLE/engines/<compute capability>_<driver>_onnxruntime-<version>/`, or in the user's cache folder
where the bundle cannot be written to. Neither it nor a GPU has run; settings are tested alone.

    >>> provider(bundle, choice, cache_folder(bundle))
    ('TensorrtExecutionProvider', {'device_id': '0', 'trt_engine_cache_enable': '1', ...})
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from pathlib import Path
from typing import Final

import onnxruntime

from dermaflux.bundle import Bundle
from dermaflux.engines import Choice
from dermaflux.engines.sizes import shape_of
from dermaflux.engines.sizes import sizes as lengths
from dermaflux.errors import EngineError
from dermaflux.hardware import nvidia

Provider = tuple[str, dict[str, str]]
TENSORRT: Final = "TensorrtExecutionProvider"


def provider(bundle: Bundle, choice: Choice, cache: Path) -> Provider:
    """TensorRT, with one profile over all sizes of the bundle, and engines kept in `cache`."""
    smallest, usual, largest = profile(bundle, choice.part)
    options = {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_engine_cache_prefix": f"{bundle.id}_{choice.part}_{choice.precision}",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
        "trt_profile_min_shapes": smallest,
        "trt_profile_opt_shapes": usual,
        "trt_profile_max_shapes": largest,
    }
    # Tensors' own types are a wish to this road; without the switch TensorRT takes fp32 for them.
    switches = {"fp16": ("fp16",), "bf16": ("bf16",), "int8": ("int8", "fp16")}
    for kind in switches.get(choice.precision, ()):
        options[f"trt_{kind}_enable"] = "1"
    return TENSORRT, options


def profile(bundle: Bundle, part: str) -> tuple[str, str, str]:
    """Smallest, usual and largest shapes of a part's inputs: `name:1x64x3,other:...`.

    Raises:
        EngineError: an axis whose sizes nobody knows.
    """
    limits, defaults = bundle.limits, bundle.defaults
    sizes = (
        (1, limits.min_size, limits.min_size),
        (1, defaults.height, defaults.width),
        (limits.max_batch, limits.max_size, limits.max_size),
    )
    words = []
    for batch, height, width in sizes:
        free = lengths(bundle.model.scale, batch, height, width)
        words.append(
            ",".join(
                f"{tensor.name}:{'x'.join(map(str, shape_of(tensor, free)))}"
                for tensor in bundle.parts[part].inputs
            )
        )
    return words[0], words[1], words[2]


def cache_folder(bundle: Bundle) -> Path:
    """Where engines are kept: tied to GPU, driver and release, as they are."""
    gpus, _ = nvidia()
    capability, driver = "unknown", "unknown"
    if gpus:
        capability, driver = ".".join(map(str, gpus[0].capability)), gpus[0].driver
    key = f"{capability}_{driver}_onnxruntime-{onnxruntime.__version__}"
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (bundle.path / "engines" / key, user / "dermaflux" / bundle.id / key):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise EngineError(
        f"no folder takes the engines that TensorRT builds; make {bundle.path / 'engines'} "
        "writable, or name one in XDG_CACHE_HOME"
    )


def missing() -> str | None:
    """Why the provider's library could not be loaded, or None."""
    needed = linked()
    if needed and _find(needed) is None:
        return (
            f"its TensorRT provider is linked to libnvinfer.so.{needed}, which is not here; "
            f"install TensorRT {needed} (a newer one beside it does not help)"
        )
    return None


def linked(folder: Path | None = None) -> str:
    """The major version of TensorRT that the provider's library asks the system for, or ""."""
    home = folder or Path(str(onnxruntime.__file__)).parent / "capi"
    try:
        content = (home / "libonnxruntime_providers_tensorrt.so").read_bytes()
    except OSError:
        return ""
    found = re.search(rb"libnvinfer\.so\.(\d+)", content)
    return found[1].decode() if found else ""


def _find(version: str) -> str | None:
    """What to load: the system's library by its name, or the one of the Python package."""
    name = f"libnvinfer.so.{version}"
    spec = importlib.util.find_spec("tensorrt_libs")
    places = [Path(p) / name for p in (spec.submodule_search_locations or ())] if spec else []
    for candidate in (name, *map(str, places)):
        try:
            ctypes.CDLL(candidate)
        except OSError:
            continue
        return candidate
    return None


def preload() -> None:
    """Python's package of TensorRT is on no search path either; what is loaded is found."""
    needed = linked()
    if needed and (found := _find(needed)):
        ctypes.CDLL(found, mode=ctypes.RTLD_GLOBAL)
