"""Optimum's `ORTFluxPipeline` behind a pipe, in an environment that has nothing of ours.

    .venv-optimum/bin/python benchmarks/rivals/optimum_process.py bundles/mini 2

One JSON object a line, in and out. The first that comes out says that it is ready, with versions
and the seconds it took to open. Each that goes in asks for pictures:

    {"prompts": [...], "latents": "noise.npy", "out": "pixels.npy", "steps": 20, "guidance": 3.0,
     "height": 128, "width": 128, "text_length": 64}

`latents` are packed, float32 [n, tokens, 4C]. The answer is `{"seconds": s, "stages": {...}}`, and
the pictures are in `out`, uint8 [n, height, width, 3]; or `{"error": "..."}`. It ends when its
input does. `benchmarks.rivals.flux_optimum` is the other end.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any


def main() -> int:
    folder, threads = sys.argv[1], int(sys.argv[2])
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    began = time.perf_counter()
    import numpy as np
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTFluxPipeline  # type: ignore[import-not-found, unused-ignore]

    torch.set_num_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    pipeline: Any = ORTFluxPipeline.from_pretrained(
        folder, provider="CPUExecutionProvider", session_options=options
    )
    pipeline.set_progress_bar_config(disable=True)
    spent: dict[str, float] = {}

    def clocked(stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = work(*given, **named)
            spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - started
            return result

        return called

    pipeline.encode_prompt = clocked("text", pipeline.encode_prompt)
    pipeline.vae.decode = clocked("decode", pipeline.vae.decode)

    def draw(asked: Mapping[str, Any]) -> dict[str, Any]:
        latents = torch.from_numpy(np.load(asked["latents"], allow_pickle=False))
        given = {} if asked["guidance"] is None else {"guidance_scale": asked["guidance"]}
        spent.clear()
        started = time.perf_counter()
        images = pipeline(
            asked["prompts"],
            height=asked["height"],
            width=asked["width"],
            num_inference_steps=asked["steps"],
            latents=latents,
            max_sequence_length=asked["text_length"],
            **given,
        ).images
        drawn = time.perf_counter()
        for image in images:
            image.save(io.BytesIO(), format="PNG")
        done = time.perf_counter()
        np.save(asked["out"], np.stack([np.asarray(image) for image in images]))
        denoise = drawn - started - sum(spent.values())
        stages = {**spent, "denoise": denoise, "png": done - drawn}
        return {"seconds": done - started, "stages": stages}

    names = ("optimum", "optimum-onnx", "onnxruntime", "diffusers", "transformers", "torch")
    ready = {
        "opened_s": time.perf_counter() - began,
        "versions": {name: version(name) for name in names},
        "providers": list(onnxruntime.get_available_providers()),
    }
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = draw(json.loads(line))
        # Whatever it is, the other end is to be told, and may ask for something else.
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
