"""Which numbers a model's layers see while it makes its own images: eager torch -> a table.

The model makes images of its own prompts over all timesteps, one request after another, and every
quantized layer notes the largest magnitude of each of its input channels. Largest is enough: on the
trained mini, ranges cut at a percentile, and those of NNCF, were worse (`export.recipes`).

The table is written after every request. A maximum does not care for order, so a calibration that
was stopped goes on where it was; one that is done is not made again.

    >>> table = calibrate(checkpoint, requests(checkpoint, 8, seed=1), Path("mini.scales.npz"))
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dermaflux.bundle import GENERATOR_PARTS
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import eager
from dermaflux.errors import EngineError
from dermaflux.flow import Schedule
from dermaflux.hardware import look
from dermaflux.pipeline import Pipeline, Request
from export.recipes import RECIPES
from export.reference import as_inputs
from export.scales import Scales, fingerprint
from export.source import folder_of
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
) -> Scales:
    """The ranges of every layer whose inputs any recipe quantizes; kept at `path`, if given.

    Raises:
        BundleError: `path` holds something else.
        EngineError: the parts do not fit into memory, or cannot be opened.
    """
    parts = needing_scales(checkpoint)
    started = _begin(checkpoint, requests, path, parts)
    if started.done == started.asked:
        return started
    if device == "cpu":
        require_room(checkpoint, (*GENERATOR_PARTS, *parts), dtype.itemsize, "calibrating")
    opened = {
        part: eager.load(checkpoint.path, part, dtype, device=device)
        for part in dict.fromkeys((*GENERATOR_PARTS, *parts))
    }
    seen = {part: dict(channels) for part, channels in started.parts.items()}
    for part in parts:
        _watch(opened[part].model, part, seen.setdefault(part, {}))
    pipeline = Pipeline(
        checkpoint.model,
        Schedule.from_config(checkpoint.scheduler),
        checkpoint.limits,
        checkpoint.defaults,
        eager.tokenizers(checkpoint),
        {part: opened[part] for part in GENERATOR_PARTS},
    )
    table = started
    for done in range(started.done, len(requests)):
        images = pipeline.generate([requests[done]])
        if "classifier" in parts:
            opened["classifier"].run(as_inputs(checkpoint, "classifier", images))
        table = replace(table, parts=seen, done=done + 1)
        if path is not None:
            table.save(path)
        log.info("calibrated on %d of %d images", done + 1, len(requests))
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
    """The table at `path` where it is of these weights and requests, else an empty one."""
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
    same = (found.models, found.request_set, found.asked) == (
        empty.models,
        empty.request_set,
        empty.asked,
    )
    return found if same else empty


def _watch(model: Any, part: str, seen: dict[str, NDArray[np.float32]]) -> None:
    """Have every layer of a part note the largest magnitude of its input channels in `seen`."""
    recipes = [recipes[part] for recipes in RECIPES.values() if part in recipes]

    def watcher(name: str, axis: int) -> Any:
        def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            numbers = inputs[0].detach().abs()
            others = [other for other in range(numbers.ndim) if other != axis % numbers.ndim]
            largest = numbers.amax(dim=others).float().cpu().numpy()
            seen[name] = np.maximum(seen[name], largest) if name in seen else largest

        return watch

    modules: Mapping[str, nn.Module] = dict(model.model.named_modules())
    for name, module in modules.items():
        if isinstance(module, _LAYERS) and any(r.needs_scale(name) for r in recipes):
            axis = 1 if isinstance(module, nn.Conv2d) else -1
            module.register_forward_pre_hook(watcher(name, axis))
