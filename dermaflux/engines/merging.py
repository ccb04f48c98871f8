"""A vision transformer that merges pieces of the picture which say the same: less work, not the
same answer.

After the attention of every block but the last, some patches are joined with those that are most
like them, and their mean goes on. Source: Bolya et al., Token Merging: Your ViT But Faster
(arXiv 2210.09461): patches in two sets by turns, likeness is the cosine of attention's keys, the
likest pairs are joined, means and attention are weighted by how many patches are in one. The
weights are those of the whole model; nothing is trained. How many are joined is the same for every
picture, so shapes do not depend on what it shows, and the graph is of standard operators.

Dropping what the class token looks at least and fusing it (Liang et al., EViT, arXiv 2202.07800)
was tried on the embedded default beside it, and cost more.

    >>> counts = plan(model, share=0.65)                 # (11, 9, 6, 4, 2, 0)
    >>> merged = Merged(parts.module(Path("models/mini"), "classifier"), counts)
    >>> logits, features = merged(pixel_values)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from dermaflux.errors import EngineError

SHARE: Final = 0.65
"""Of the work of all blocks that is left. On the embedded default in fp32 the area under the ROC
curve of both test sets falls by 0.005 and by 0.000, and at 0.60 by 0.008 and 0.000
(`benchmarks/results/pruning.json`); the rest is room for 8 bits."""
_POOLS: Final = ("token", "avg")


class Merged(nn.Module):
    """pixel_values [B, 3, H, W] (normalised) -> logits [B, classes], features [B, F].

    `whole` is a `parts.Classifier`, whose model is used and changed; `counts` are the patches that
    each block merges away. No map of attention is given: a merged patch has no place.

    Raises:
        EngineError: its model is none that can be merged.
    """

    inputs = ("pixel_values",)
    outputs: tuple[str, ...] = ("logits", "features")

    def __init__(self, whole: Any, counts: Sequence[int]) -> None:
        super().__init__()
        refused = unfit(whole.model)
        if refused:
            raise EngineError(
                f"a classifier can be merged if it is a vision transformer: {refused}"
            )
        self.model = whole.model
        self.counts = tuple(counts)
        for block in self.model.blocks:
            # Those of the map, which would keep every pass's products.
            block.attn.qkv._forward_hooks.clear()

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model = self.model
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(pixel_values)))
        sizes: torch.Tensor | None = None
        for block, count in zip(model.blocks, self.counts, strict=True):
            mixed, keys = _attention(block.attn, block.norm1(tokens), sizes)
            tokens = tokens + block.ls1(mixed)
            if count:
                tokens, sizes = merge(tokens, sizes, keys, count, model.num_prefix_tokens)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        tokens = model.norm(tokens)
        if model.global_pool == "token":
            pooled = tokens[:, 0]
        else:
            patches = tokens[:, model.num_prefix_tokens :]
            if sizes is None:
                pooled = patches.mean(1)
            else:
                weights = sizes[:, model.num_prefix_tokens :]
                pooled = (patches * weights).sum(1) / weights.sum(1)
        features = model.fc_norm(pooled)
        return model.get_classifier()(features), features


def merge(
    tokens: torch.Tensor, sizes: torch.Tensor | None, keys: torch.Tensor, count: int, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join `count` patches with their likest: tokens [B, N, D] -> [B, N - count, D], and how many
    patches are in each, [B, N - count, 1]. `keys` are [B, N, size]; the first `prefix` tokens are
    no patches."""
    keys = keys[:, prefix:]
    keys = keys / keys.square().sum(-1, keepdim=True).sqrt()
    likeness = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    best, partner = likeness.max(-1)
    # All of them in one order: the likest are joined, the others stay.
    order = best.topk(best.shape[1], dim=1).indices
    gone, stay = order[:, :count], order[:, count:]
    first, second = tokens[:, prefix:][:, ::2], tokens[:, prefix:][:, 1::2]
    target = partner.gather(1, gone)
    places = torch.arange(second.shape[1], device=tokens.device)
    joins = (target[:, None, :] == places[None, :, None]).to(tokens.dtype)
    # What stays as it is, is not touched: passes over memory cost as much as the merging saves.
    joined = _picked(first, gone)
    if sizes is None:
        sizes = torch.ones_like(tokens[:, :, :1])
        totals = 1 + joins.sum(-1, keepdim=True)
        second = (second + joins @ joined) / totals
    else:
        many, few = sizes[:, prefix:][:, 1::2], _picked(sizes[:, prefix:][:, ::2], gone)
        totals = many + joins @ few
        second = (second * many + joins @ (joined * few)) / totals
    apart = _picked(sizes[:, prefix:][:, ::2], stay)
    return (
        torch.cat([tokens[:, :prefix], _picked(first, stay), second], 1),
        torch.cat([sizes[:, :prefix], apart, totals], 1),
    )


def _picked(rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Rows [B, N, D] by numbers [B, K] -> [B, K, D]. As rows of one table of B N: engines copy
    them whole, where `gather` would look every number up."""
    batch, length, width = rows.shape
    first = torch.arange(batch, device=rows.device)[:, None] * length
    return rows.reshape(-1, width)[chosen + first]


def _attention(
    attention: Any, tokens: torch.Tensor, sizes: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """timm's attention, a token that stands for more looked at more; and its keys, heads averaged.

    Source: `timm.models.vision_transformer.Attention.forward`.
    """
    batch, length, _ = tokens.shape
    parts = attention.qkv(tokens).reshape(batch, length, 3, attention.num_heads, -1)
    query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    mask = None if sizes is None else sizes.log().transpose(1, 2)[:, None]
    mixed = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=attention.scale
    )
    mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
    return attention.proj(attention.norm(mixed)), key.mean(1)


def unfit(model: Any) -> str:
    """Why a timm model cannot be merged; empty where it can."""
    blocks = list(getattr(model, "blocks", ()))
    kind = type(model).__name__
    if not blocks or not hasattr(model, "num_prefix_tokens"):
        return f"{kind} has no blocks of tokens"
    known = ("qkv", "q_norm", "k_norm", "norm", "proj", "num_heads", "scale")
    for block in blocks:
        attention = getattr(block, "attn", None)
        if not all(hasattr(attention, name) for name in known) or not hasattr(block, "ls1"):
            return f"{kind} has blocks of another form"
        if getattr(attention, "gate", None) is not None:
            return f"{kind} has a gate behind its attention"
    pool = getattr(model, "global_pool", "")
    if pool not in _POOLS or getattr(model, "pool_include_prefix", False):
        return f"{kind} pools its tokens by {pool or 'nothing'}, not by {' or '.join(_POOLS)}"
    return ""


def work(tokens: int, width: int, hidden: int, counts: Sequence[int]) -> float:
    """Multiply-adds of all blocks: four products of the width and two of the attention over the
    tokens before a merge, two of the hidden width over those after it."""
    done = 0.0
    for count in counts:
        done += tokens * 4 * width**2 + 2 * tokens**2 * width
        tokens -= count
        done += tokens * 2 * width * hidden
    return done


def plan(model: Any, share: float = SHARE) -> tuple[int, ...]:
    """Patches that each block merges away so that `share` of the work is left, or a little less:
    fewer from block to block, none in the last, and never more than half of them.

    What is merged early saves most, and the paper's falling schedule does so. At 0.60 of the work
    it cost the embedded default half of the area under the curve that equal counts did at 0.58.

    Raises:
        EngineError: the share is none, or not even the most merging leaves so little.
    """
    if not 0 < share <= 1:
        raise EngineError(f"a share of {share} of the work cannot be left; use above 0, up to 1")
    rows, columns = model.patch_embed.grid_size
    tokens, depth = model.num_prefix_tokens + rows * columns, len(model.blocks)
    width, hidden = model.embed_dim, model.blocks[0].mlp.fc1.out_features
    whole = work(tokens, width, hidden, [0] * depth)
    least = 1.0
    for total in range(2 * depth * rows * columns):
        counts, left = _falling(total, rows * columns, depth)
        if left < 2:
            break
        least = work(tokens, width, hidden, counts) / whole
        if least <= share:
            return counts
    raise EngineError(f"merging leaves {least:.2f} of the work at least, not {share}; ask for more")


def _falling(total: int, patches: int, depth: int) -> tuple[tuple[int, ...], int]:
    """`total` shared out over blocks, the first `depth - 1` times the last but one; and what is
    left of the patches."""
    counts = []
    steps = max(depth * (depth - 1), 1)
    for number in range(depth):
        wanted = round(2 * total * (depth - 1 - number) / steps)
        counts.append(min(wanted, patches // 2))
        patches -= counts[-1]
    return tuple(counts), patches
