"""Floating-point operations of one LoRA step on a Flux transformer, and what a machine can do.

A step is the forward, the gradient of every frozen layer's input, and LoRA's own products; frozen
weights have no gradient, and of the text the last block needs the keys and values alone. 2
operations a multiply-add; linear layers and attention count, norms and activations do not.

    >>> step_flops(config, image_tokens=1024, text_tokens=512, batch=4, rank=64) / 1e12
    183.5
    >>> len(linears(config))
    494
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

_ROUNDS: Final = 20
_CPU_SIDE: Final = 1024
_GPU_SIDE: Final = 8192
"""Large enough to be bound by arithmetic, small enough to take milliseconds."""


Rows = Literal["item", "image", "text", "all"]
"""One row a picture (modulation), or one for every token of the picture, the text or both."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block: which rows have to go through it, `width` numbers in and `out`
    out."""

    name: str
    width: int
    out: int
    rows: Rows


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
        last = number == config["num_single_layers"] - 1
        used: Rows = "image" if last else "all"
        found += [
            Linear(f"{block}.norm.linear", d, 3 * d, "item"),
            Linear(f"{block}.proj_mlp", d, 4 * d, used),
            Linear(f"{block}.proj_out", 5 * d, d, used),
            Linear(f"{block}.attn.to_q", d, d, used),
            Linear(f"{block}.attn.to_k", d, d, "all"),
            Linear(f"{block}.attn.to_v", d, d, "all"),
        ]
    return found


def step_flops(
    config: Mapping[str, Any], *, image_tokens: int, text_tokens: int, batch: int, rank: int
) -> int:
    """Operations of a step that adapts every linear layer of every block.

    `config` is FluxTransformer2DModel's. Backward of the frozen base: as much as its linears'
    forward, but for modulation and the first embeddings, whose inputs need no gradient; attention's
    four products to the forward's two (Dao, arXiv 2307.08691, without its recomputation). LoRA of r
    on R rows from n to m numbers: 2 R r (n + m) forward and twice that backward; or, where that is
    less, over the merged weight, 2 r n m and the factors' gradients the cheaper way. What
    checkpointing computes again is not counted, so a share of a machine's rate is a "model"
    utilisation (Chowdhery et al., arXiv 2204.02311, appendix B).
    """
    d = config["attention_head_dim"] * config["num_attention_heads"]
    tokens = image_tokens + text_tokens
    rows = {"item": 1, "image": image_tokens, "text": text_tokens, "all": tokens}
    shared = config["num_layers"] + max(config["num_single_layers"] - 1, 0)
    pairs = shared * tokens * tokens
    if config["num_single_layers"]:
        pairs += image_tokens * tokens
    attention = 4 * pairs * d
    answer = 2 * image_tokens * config["in_channels"] * d
    # The first embeddings, the last norm's modulation and the answer; embeddings of time are small.
    forward = 2 * answer + 2 * text_tokens * config["joint_attention_dim"] * d + 4 * d * d
    forward += attention
    backward = answer + 2 * attention
    own = 0
    for one in linears(config):
        product = 2 * rows[one.rows] * one.width * one.out
        forward += product
        needs = one.rows != "item"
        if needs:
            backward += product
        own += _lora(batch * rows[one.rows], one.width, one.out, rank, needs)
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
