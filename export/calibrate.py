"""Which numbers a model's layers see while it makes its own images: eager torch -> a table.

The model makes images of its own prompts over all timesteps, one request after another, and every
layer notes the largest magnitude of each of its input channels, whether a recipe quantizes it or
not: a table outlives a recipe, and `export.sensitivity` asks what the others would cost. Attention
notes the largest query, key and value. Largest is enough: on the trained mini, ranges cut at a
percentile, and those of NNCF, were worse (`export.recipes`).

A model that does not fit into memory is calibrated with `offload`: accelerate reads one layer after
the other from its shards, so `batch` requests share each reading.

The table is written after every request. A maximum does not care for order, so a calibration that
was stopped goes on where it was; one that is done is not made again.

    >>> table = calibrate(checkpoint, requests(checkpoint, 8, seed=1), Path("mini.scales.npz"))
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers.models.transformers.transformer_flux import FluxAttention
from numpy.typing import NDArray
from torch import nn

from dermaflux.bundle import GENERATOR_PARTS
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import eager
from dermaflux.errors import BundleError, EngineError
from dermaflux.flow import Schedule
from dermaflux.hardware import look
from dermaflux.pipeline import Pipeline, Request
from export.offload import offloaded
from export.quantized import FACTORS
from export.recipes import RECIPES
from export.reference import as_inputs
from export.scales import Scales, fingerprint
from export.source import folder_of
from export.trace import RotaryAttention, restate
from export.weights import stored

log = logging.getLogger(__name__)

ASSUMED: Final = "assumed"
_LAYERS: Final = (nn.Linear, nn.Conv2d)
_MARGIN: Final = 1.3
"""What runs a part beside its weights: activations, and the allocator's own."""


def calibrate(
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    path: Path | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    batch: int = 1,
) -> Scales:
    """The ranges of every layer of the generator and of the classifier; kept at `path`, if given.

    `batch` requests pass together. With `offload` the generator's weights stay on the disk.

    Raises:
        BundleError: `path` holds something else.
        EngineError: the parts do not fit into memory, or cannot be opened.
    """
    parts = (*GENERATOR_PARTS, *(["classifier"] if checkpoint.classifier is not None else []))
    started = _begin(checkpoint, requests, path, parts)
    if started.done == started.asked:
        return started
    if device == "cpu" and not offload:
        require_room(checkpoint, parts, dtype.itemsize, "calibrating")
    opened = {
        part: offloaded(checkpoint.path, part, dtype, device=device)
        if offload and part in GENERATOR_PARTS
        else eager.load(checkpoint.path, part, dtype, device=device)
        for part in parts
    }
    seen = {part: dict(channels) for part, channels in started.parts.items()}
    for part in parts:
        _watch(opened[part].model, seen.setdefault(part, {}))
    pipeline = Pipeline(
        checkpoint.model,
        Schedule.from_config(checkpoint.scheduler),
        checkpoint.limits,
        checkpoint.defaults,
        eager.tokenizers(checkpoint),
        {part: opened[part] for part in GENERATOR_PARTS},
    )
    table = started
    for done in range(started.done, len(requests), batch):
        images = pipeline.generate(requests[done : done + batch])
        if "classifier" in parts:
            opened["classifier"].run(as_inputs(checkpoint, "classifier", images))
        table = replace(table, parts=seen, done=done + len(images))
        if path is not None:
            table.save(path)
        log.info("calibrated on %d of %d images", table.done, len(requests))
    return table


def assume(checkpoint: Checkpoint, largest: float) -> Scales:
    """A table that takes one range for every layer: enough to write a graph and to measure its
    writing, and of no use for images, so it calls itself "assumed"."""
    parts = needing_scales(checkpoint)
    seen: dict[str, dict[str, NDArray[np.float32]]] = {}
    for part in parts:
        recipes = [found[part] for found in RECIPES.values() if part in found]
        for key, tensor in stored(checkpoint.path / folder_of(part)).items():
            layer = key.removesuffix(".weight")
            if len(tensor.shape) > 1 and any(recipe.needs_scale(layer) for recipe in recipes):
                width = tensor.shape.numpy()[1]
                seen.setdefault(part, {})[layer] = np.full(width, largest, np.float32)
    models = {part: fingerprint(checkpoint.path, part) for part in parts}
    return Scales(parts=seen, models=models, request_set=ASSUMED, asked=0, done=0)


def needing_scales(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Parts of a checkpoint whose activations some recipe quantizes."""
    return tuple(
        part
        for part in dict.fromkeys(part for recipes in RECIPES.values() for part in recipes)
        if (part != "classifier" or checkpoint.classifier is not None)
        and any(
            recipes[part].kind and "*" not in recipes[part].weights_only
            for recipes in RECIPES.values()
            if part in recipes
        )
    )


def require_room(checkpoint: Checkpoint, parts: Sequence[str], width: int, what: str) -> None:
    """Check that parts fit into this machine's memory with `width` bytes per weight.

    Raises:
        EngineError: they do not; with both figures.
    """
    memory = look().ram
    folders = dict.fromkeys(folder_of(part) for part in parts)
    count = sum(
        tensor.size for folder in folders for tensor in stored(checkpoint.path / folder).values()
    )
    needed = int(count * width * _MARGIN)
    if memory is not None and needed > memory.available:
        raise EngineError(
            f"{what} in eager torch needs {needed / 1e9:.1f} GB of memory for "
            f"{count / 1e9:.1f} billion weights, and {memory.available / 1e9:.1f} GB are free here"
        )


def request_set(requests: Sequence[Request]) -> str:
    """Names a list of requests."""
    content = json.dumps([asdict(request) for request in requests], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _begin(
    checkpoint: Checkpoint, requests: Sequence[Request], path: Path | None, parts: Sequence[str]
) -> Scales:
    """The table at `path`, or an empty one where there is none.

    Raises:
        BundleError: it is of other weights or requests.
    """
    empty = Scales(
        parts={},
        models={part: fingerprint(checkpoint.path, part) for part in parts},
        request_set=request_set(requests),
        asked=len(requests),
        done=0,
    )
    if path is None or not path.exists():
        return empty
    found = Scales.open(path)
    if (found.models, found.request_set, found.asked) != (
        empty.models,
        empty.request_set,
        empty.asked,
    ):
        raise BundleError(
            f"{path} is a table of other weights or other requests ({found.done} of {found.asked} "
            "done) and is left as it is; remove it or name another --out"
        )
    return found


class _Watched(RotaryAttention):
    """Attention of Flux that notes the largest of what it multiplies."""

    def __init__(self, name: str, seen: dict[str, NDArray[np.float32]]) -> None:
        self._name = name
        self._seen = seen

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        for what, factor in zip(FACTORS, (query, key, value), strict=True):
            largest = factor.detach().abs().amax().float().reshape(1).cpu().numpy()
            _note(self._seen, f"{self._name}.{what}", largest)
        return super().mix(query, key, value)


def _note(seen: dict[str, NDArray[np.float32]], name: str, largest: NDArray[np.float32]) -> None:
    seen[name] = np.maximum(seen[name], largest) if name in seen else largest


def _watch(part: Any, seen: dict[str, NDArray[np.float32]]) -> None:
    """Have every layer of a part note the largest magnitude of its input channels in `seen`."""

    def watcher(name: str, axis: int) -> Any:
        def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            numbers = inputs[0].detach().abs()
            others = [other for other in range(numbers.ndim) if other != axis % numbers.ndim]
            _note(seen, name, numbers.amax(dim=others).float().cpu().numpy())

        return watch

    def thirds(name: str) -> Any:
        def watch(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            for what, factor in zip(FACTORS, output.detach().abs().chunk(3, dim=-1), strict=True):
                _note(seen, f"{name}.{what}", factor.amax().float().reshape(1).cpu().numpy())

        return watch

    restate(part)
    for name, module in part.model.named_modules():
        if isinstance(module, _LAYERS):
            axis = 1 if isinstance(module, nn.Conv2d) else -1
            module.register_forward_pre_hook(watcher(name, axis))
        if isinstance(module, FluxAttention):
            module.set_processor(_Watched(name, seen))
        if name.endswith(".qkv") and isinstance(module, nn.Linear):
            module.register_forward_hook(thirds(name.removesuffix(".qkv")))
