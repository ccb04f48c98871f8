"""The classifier's file that does less work: its graph, and what eager torch makes of the same.

The graph is that of `dermaflux.engines.merging` in int8. It is compared twice: with eager torch
that merges alike, which tells whether the file is right, and with the whole model, which tells what
merging costs.

>>> merger = merger_of(Path("models/mini"), share=0.6)
>>> model = trace(Path("models/mini"), "classifier", inputs, merger)
>>> cases = merged_cases(Path("models/mini"), merger, reference.seen["classifier"])
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from dermaflux.engines.merging import Merged, patches, plan, unfit
from dermaflux.engines.parts import module
from export.parity import Case

log = logging.getLogger(__name__)

Merger = Callable[[nn.Module], nn.Module]


def merger_of(checkpoint: Path, share: float) -> Merger | None:
    """What makes of the classifier one that merges, `share` of its blocks' work left; None, and a
    sentence in the log, where it is no vision transformer.

    Raises:
        EngineError: so little cannot be left.
    """
    with torch.device("meta"):
        model = module(checkpoint, "classifier", weights=False).model
    refused = unfit(model)
    if refused:
        log.info("classifier has no pruned file: %s", refused)
        return None
    count = plan(model, share)
    log.info("classifier merges %d of its %d patches", count, patches(model))
    return lambda whole: Merged(whole, count)


def merged_cases(checkpoint: Path, merger: Merger, cases: Sequence[Case]) -> list[Case]:
    """The same inputs, and what eager torch that merges makes of them."""
    merged = merger(module(checkpoint, "classifier"))
    found = []
    for case in cases:
        with torch.inference_mode():
            made = merged(torch.from_numpy(case.inputs["pixel_values"]))
        outputs = {name: value.numpy() for name, value in zip(Merged.outputs, made, strict=True)}
        found.append(Case(case.inputs, outputs))
    return found
