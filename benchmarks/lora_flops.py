"""Floating-point operations of one LoRA step on a Flux transformer, and what a machine can do.

A step is the forward, the gradient of every frozen layer's input, and LoRA's own products; frozen
weights have no gradient. 2 operations a multiply-add; linear layers and attention count, norms and
activations do not (as in `benchmarks.latency.transformer_flops`, which counts the forward).

    >>> step_flops(config, image_tokens=1024, text_tokens=512, batch=4, rank=64) / 1e12
    184.4
    >>> len(linears(config))
    494
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from benchmarks.latency import transformer_flops

_ROUNDS: Final = 20
_CPU_SIDE: Final = 1024
_GPU_SIDE: Final = 8192
"""Large enough to be bound by arithmetic, small enough to take milliseconds."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block: which rows go through it, `width` numbers in and `out` out.

    `rows` is `item` for layers that see one row a picture (modulation), not one a token.
    """

    name: str
    width: int
    out: int
    rows: Literal["item", "image", "text", "all"]


def linears(config: Mapping[str, Any]) -> list[Linear]:
    """All linear layers of both kinds of blocks, by diffusers' names: 14 of a double block and 6 of
    a single one. `config` is FluxTransformer2DModel's."""
    d = config["attention_head_dim"] * config["num_attention_heads"]
    found: list[Linear] = []
    for number in range(config["num_layers"]):
        block = f"transformer_blocks.{number}"
        found += [
            Linear(f"{block}.norm1.linear", d, 6 * d, "item"),
            Linear(f"{block}.norm1_context.linear", d, 6 * d, "item"),
            Linear(f"{block}.ff.net.0.proj", d, 4 * d, "image"),
            Linear(f"{block}.ff.net.2", 4 * d, d, "image"),
            Linear(f"{block}.ff_context.net.0.proj", d, 4 * d, "text"),
            Linear(f"{block}.ff_context.net.2", 4 * d, d, "text"),
        ]
        found += [
            Linear(f"{block}.attn.{name}", d, d, "image")
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        ]
        found += [
            Linear(f"{block}.attn.{name}", d, d, "text")
            for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        ]
    for number in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{number}"
        found += [
            Linear(f"{block}.norm.linear", d, 3 * d, "item"),
            Linear(f"{block}.proj_mlp", d, 4 * d, "all"),
            Linear(f"{block}.proj_out", 5 * d, d, "all"),
        ]
        found += [Linear(f"{block}.attn.{name}", d, d, "all") for name in ("to_q", "to_k", "to_v")]
    return found


def step_flops(
    config: Mapping[str, Any], *, image_tokens: int, text_tokens: int, batch: int, rank: int
) -> int:
    """Operations of a step that adapts every linear layer of every block.

    Backward of the frozen base: as much as its linears' forward, but for modulation and the first
    embeddings, whose inputs need no gradient; attention's four products to the forward's two (Dao,
    arXiv 2307.08691, without its recomputation). LoRA of r on R rows from n to m numbers: 2 R r
    (n + m) forward and twice that backward; or, where that is less, over the merged weight, 2 r n m
    and the factors' gradients the cheaper way. What checkpointing computes again is not counted, so
    a share of a machine's rate is a "model" utilisation (Chowdhery et al., arXiv 2204.02311, B).
    """
    d = config["attention_head_dim"] * config["num_attention_heads"]
    tokens = image_tokens + text_tokens
    blocks = config["num_layers"] + config["num_single_layers"]
    rows = {"item": 1, "image": image_tokens, "text": text_tokens, "all": tokens}
    backward = 2 * image_tokens * config["in_channels"] * d + blocks * 8 * tokens * tokens * d
    own: int = 0
    for one in linears(config):
        count = batch * rows[one.rows]
        needs = one.rows != "item"
        if needs:
            backward += 2 * rows[one.rows] * one.width * one.out
        own += _lora(count, one.width, one.out, rank, needs)
    forward = transformer_flops(config, image_tokens, text_tokens)
    return int(batch * (forward + backward) + own)


def _lora(rows: int, width: int, out: int, rank: int, needs_input: bool) -> int:
    apart = 6 * rows * rank * (width + out) - (0 if needs_input else 2 * rows * rank * width)
    factors = 4 * rows * rank * (width + out)
    by_weight = 2 * rows * width * out + 4 * rank * width * out
    return min(apart, 2 * rank * width * out + min(factors, by_weight))


def matmul_rate(device: str, dtype: str) -> float:
    """Operations a second of torch's square matrix product: the best of 20; `dtype` is torch's
    name (`float32`, `bfloat16`)."""
    import torch

    side = _CPU_SIDE if device == "cpu" else _GPU_SIDE
    a, b = torch.rand(2, side, side, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        c = a @ b
        if device != "cpu":
            torch.cuda.synchronize(c.device)
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best
