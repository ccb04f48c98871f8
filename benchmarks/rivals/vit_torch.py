"""timm's model on torch with the checkpoint's weights: eager, in bf16, or compiled.

>>> rival = eager(Path("models/mini"), threads=2)
>>> rival.judge(pixels)                 # float32 [n, 3, H, W], normalised -> logits [n, classes]
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import instructions
from benchmarks.rivals.flux_torch import BF16
from dermaflux.errors import EngineError, translated
from dermaflux.flow import Floats


@dataclass(frozen=True)
class Judge:
    """A side that judges; `evidence` is asked after it has."""

    judge: Callable[[Floats], Floats]
    opened_s: float
    evidence: Callable[[], Mapping[str, Any]]


def module(checkpoint: Path) -> Any:
    """The classifier of a checkpoint as timm makes it, in fp32, ready to judge.

    Raises:
        EngineError: timm is not installed, or the weights are not there or do not fit.
    """
    folder = Path(checkpoint) / "classifier"
    with translated(EngineError, f"timm cannot open {folder}"):
        import timm
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model: Any = timm.create_model(
            config["architecture"],
            pretrained=False,
            num_classes=config["num_classes"],
            **config.get("model_args", {}),
        )
        model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False)


def eager(checkpoint: Path, threads: int, dtype: str = "float32") -> Judge:
    """As it comes; `dtype` is torch's name of what weights and pixels are in.

    Raises:
        EngineError: see `module`; bf16 on a processor that would emulate it.
    """
    if dtype == "bfloat16" and not set(BF16) & set(instructions()):
        raise EngineError(
            f"this processor has none of {', '.join(BF16)}: bf16 would be emulated, and slower "
            "than fp32"
        )
    import torch

    began = time.perf_counter()
    kind = getattr(torch, dtype)
    torch.set_num_threads(threads)
    model = module(checkpoint).to(kind)
    judge = _called(model, kind)
    return Judge(judge, time.perf_counter() - began, lambda: {"dtype": dtype})


def compiled(checkpoint: Path, threads: int, first: Floats, backend: str = "inductor") -> Judge:
    """torch.compile around it, and `first` judged: that compiles it, with an empty cache.

    Raises:
        EngineError: see `module`; or it cannot be compiled.
    """
    import torch
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    began = time.perf_counter()
    torch.set_num_threads(threads)
    model = module(checkpoint)
    with translated(EngineError, "torch.compile failed"):
        counters.clear()
        judge = _called(torch.compile(model, backend=backend), torch.float32)
        with tempfile.TemporaryDirectory() as folder, fresh_cache(dir=folder):
            judge(first)
    opened_s = time.perf_counter() - began
    found = {
        "backend": backend,
        "graphs": counters["stats"].get("unique_graphs", 0),
        "graph_breaks": sum(counters["graph_break"].values()),
        "compile_s": round(opened_s, 2),
    }
    return Judge(judge, opened_s, lambda: found)


def _called(model: Callable[[Any], Any], dtype: Any) -> Callable[[Floats], Floats]:
    import torch

    def judge(pixels: Floats) -> Floats:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(pixels).to(dtype)).float().numpy())

    return judge
