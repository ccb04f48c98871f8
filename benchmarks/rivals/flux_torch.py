"""diffusers' `FluxPipeline` on torch: eager, in bf16, or compiled, with the checkpoint's weights.

    >>> rival = eager("models/mini", threads=2)
    >>> rival.draw(task.asked(0)).pixels

It is called as its documentation does (prompt, size, steps, guidance, `latents`,
`max_sequence_length`, pictures as PIL), and its pictures are saved as PNG as `Image.save` does.
Compiled means its documentation's two lines: the transformer and the decoder as whole graphs. To
measure the stages its own methods are wrapped in a clock; nothing of them is changed.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.machine import instructions
from benchmarks.rivals.task import Asked, Draw, Drawn
from dermaflux import flow
from dermaflux.errors import EngineError, translated

BF16: Final = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True)
class Rival:
    """A side that draws; `evidence` is asked after it has drawn, and says what really ran."""

    draw: Draw
    opened_s: float
    evidence: Callable[[], Mapping[str, Any]]
    pipeline: Any = None


def eager(checkpoint: Path | str, threads: int, dtype: str = "float32") -> Rival:
    """As it comes; `dtype` is torch's name of what weights are opened in.

    Raises:
        EngineError: diffusers is not installed, or cannot open the checkpoint; bf16 on a processor
            that would emulate it.
    """
    if dtype == "bfloat16" and not set(BF16) & set(instructions()):
        raise EngineError(
            f"this processor has none of {', '.join(BF16)}: bf16 would be emulated, and slower "
            "than fp32"
        )
    began = time.perf_counter()
    pipeline = _opened(checkpoint, threads, dtype)

    def evidence() -> dict[str, Any]:
        return {
            "transformer_dtype": str(pipeline.transformer.dtype),
            "decoder_dtype": str(pipeline.vae.dtype),
            "attention": type(next(iter(pipeline.transformer.attn_processors.values()))).__name__,
        }

    return Rival(timed(pipeline), time.perf_counter() - began, evidence, pipeline)


def compiled(
    checkpoint: Path | str, threads: int, first: Asked, backend: str = "inductor"
) -> Rival:
    """With torch.compile around transformer and decoder, and `first` drawn: that compiles them.

    The cache of compiled code is empty at that moment, so `opened_s` is what a new machine takes.

    Raises:
        EngineError: see `eager`; or it cannot be compiled (no compiler of C++, say).
    """
    import torch
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    began = time.perf_counter()
    pipeline = _opened(checkpoint, threads, "float32")
    with translated(EngineError, "torch.compile failed"):
        torch.compiler.reset()
        counters.clear()
        pipeline.transformer.compile(fullgraph=True, backend=backend)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, fullgraph=True, backend=backend)
        draw = timed(pipeline)
        with tempfile.TemporaryDirectory() as folder, fresh_cache(dir=folder):
            draw(first)
    opened_s = time.perf_counter() - began
    graphs = dict(counters["stats"])

    def evidence() -> dict[str, Any]:
        since = counters["stats"].get("unique_graphs", 0) - graphs.get("unique_graphs", 0)
        return {
            "backend": backend,
            "graphs": graphs.get("unique_graphs", 0),
            "graph_breaks": sum(counters["graph_break"].values()),
            "recompiled_while_measured": since,
            "compile_s": round(opened_s, 2),
        }

    return Rival(draw, opened_s, evidence, pipeline)


def timed(pipeline: Any) -> Draw:
    """A call of a pipeline of diffusers' kind as something to draw with, with a clock inside."""
    import torch

    spent: dict[str, float] = {}

    def clocked(stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = work(*given, **options)
            spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - began
            return result

        return called

    pipeline.encode_prompt = clocked("text", pipeline.encode_prompt)
    pipeline.vae.decode = clocked("decode", pipeline.vae.decode)

    def draw(asked: Asked) -> Drawn:
        spent.clear()
        began = time.perf_counter()
        given = {} if asked.guidance is None else {"guidance_scale": asked.guidance}
        images = pipeline(
            list(asked.prompts),
            height=asked.height,
            width=asked.width,
            num_inference_steps=asked.steps,
            latents=torch.from_numpy(flow.pack(asked.noise)).to(pipeline.transformer.dtype),
            max_sequence_length=asked.text_length,
            **given,
        ).images
        drawn = time.perf_counter()
        for image in images:
            image.save(io.BytesIO(), format="PNG")
        done = time.perf_counter()
        stages = dict(spent)
        stages["denoise"] = drawn - began - sum(spent.values())
        stages["png"] = done - drawn
        return Drawn(np.stack([np.asarray(image) for image in images]), stages)

    return draw


def _opened(checkpoint: Path | str, threads: int, dtype: str) -> Any:
    with translated(EngineError, f"diffusers cannot open {checkpoint}"):
        import torch
        from diffusers import FluxPipeline

        torch.set_num_threads(threads)
        pipeline: Any = FluxPipeline.from_pretrained(
            str(checkpoint),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
        )
        pipeline.set_progress_bar_config(disable=True)
    return pipeline
