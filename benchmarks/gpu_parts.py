"""Rows of `benchmarks.gpu` beside the transformer: decoder, text encoders, classifier.

Each imports the package that makes its model: diffusers, transformers, timm.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.flops import decoder_flops
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_shapes import DEV
from dermaflux.engines.flux_graph import Replayed


def decoder(bench: Bench) -> dict[str, Any]:
    """Diffusers' decoder as it is, and as a tier has it: channels last and compiled."""
    from diffusers import AutoencoderKL

    sides, found = bench.sides, {}
    with torch.device(bench.device):
        model = AutoencoderKL(**sides.shape.decoder).to(sides.dtype).eval().requires_grad_(False)
    for name in ("eager", "ours"):
        decode = model.decode
        if name == "ours":
            model.to(memory_format=torch.channels_last)
            decode = torch.compile(model.decode, backend=sides.backend, dynamic=False)
        for image in (sides.shape.image(DEV), sides.shape.image("schnell 512")):
            noise, _ = sides.inputs(image)
            latents = torch.from_numpy(noise).to(bench.device, sides.dtype)

            def draw(latents: Any = latents, decode: Any = decode) -> Any:
                with torch.no_grad():
                    return decode(latents, return_dict=False)[0].float().cpu().numpy()

            draw()
            began = time.perf_counter()
            for _ in range(sides.shape.rounds):
                draw()
            spent = (time.perf_counter() - began) / sides.shape.rounds
            floor = None
            if bench.rates.get("bf16"):
                operations = decoder_flops(sides.shape.decoder, image.side, image.side)
                floor = operations / float(bench.rates["bf16"] or 1)
            found[f"{name} {image.side}"] = {"seconds": spent, "floor_s": floor}
    return found


def text_encoders(bench: Bench) -> dict[str, Any]:
    """Both text encoders, once a request or not at all: a text that comes again is cached."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    shape, found = bench.sides.shape, {}
    image = shape.image(DEV)
    for name, kind, config, length in (
        ("T5", T5EncoderModel, T5Config(**shape.t5), image.text),
        ("CLIP", CLIPTextModel, CLIPTextConfig(**shape.clip), 77),
    ):
        with torch.device("meta"):
            model: Any = kind(config)
        model = model.to(bench.sides.dtype).to_empty(device=bench.device).eval()
        for tensor in model.parameters():
            tensor.data.fill_(0.01)
        ids = torch.ones(1, length, dtype=torch.long, device=bench.device)
        for buffer in model.buffers():
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))

        def encode(model: Any = model, ids: Any = ids) -> Any:
            with torch.no_grad():
                return model(ids)[0].float().cpu()

        encode()
        began = time.perf_counter()
        for _ in range(shape.rounds):
            encode()
        found[name] = {"seconds": (time.perf_counter() - began) / shape.rounds}
    return found


def classifier(bench: Bench) -> dict[str, Any]:
    """Images a second of the vision transformer: timm as it is, and compiled as one graph."""
    import timm

    sides, shape = bench.sides, bench.sides.shape
    model: Any = timm.create_model(pretrained=False, **shape.classifier)
    model = model.to(bench.device, sides.dtype).eval().requires_grad_(False)
    side = model.patch_embed.img_size[0]
    size = (shape.classifier_batch, 3, side, side)
    pixels = torch.randn(size, device=bench.device, dtype=sides.dtype)
    compiled: Any = torch.compile(model, backend=sides.backend, dynamic=False)
    ways: dict[str, Callable[[], Any]] = {"eager": lambda: model(pixels)}
    ways["compiled"] = lambda: compiled(pixels)
    capture = sides.capture()
    if capture is not None:
        replayed = Replayed(lambda given: compiled(given["pixels"]), {"pixels": pixels}, capture)
        ways["compiled, one graph"] = lambda: replayed.run(None, {}, {"pixels": pixels})
    found: dict[str, Any] = {}
    for name, way in ways.items():
        with torch.no_grad():
            way().float().cpu()
            began = time.perf_counter()
            for _ in range(shape.rounds * 4):
                result = way()
            result.float().cpu()
            spent = time.perf_counter() - began
        found[name] = shape.classifier_batch * shape.rounds * 4 / spent
    fastest = max(found.values())
    goal = shape.classifier_goal
    return {
        "images_per_second": found,
        "batch": shape.classifier_batch,
        "goal_images_per_second": goal,
        "goal_met": None if goal is None else fastest >= goal,
    }
