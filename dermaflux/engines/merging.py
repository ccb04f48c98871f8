"""A vision transformer that merges pieces of the picture which say the same: less work, not the
same answer.

Before the first block, some patches are joined with those that are most like them, and their mean
goes on in their place through all blocks. Source: Bolya et al., Token Merging: Your ViT But Faster
(arXiv 2210.09461): patches in two sets by turns, the likest pairs are joined, attention is weighted
by how many patches are in one. The weights are those of the whole model; nothing is trained. How
many are joined is the same for every picture, so shapes do not depend on what it shows, and the
graph is of standard operators.

The paper joins some in every block, by the likeness of attention's keys. On the embedded default
that cost more for the same work than to join all of them once, by the cosine of what the blocks are
given, patch and place: a photograph of skin is mostly skin, which one look at it tells. It is also
one pass over memory instead of one a block. Dropping what the class token looks at least and fusing
it (Liang et al., EViT, arXiv 2202.07800) cost more too.

    >>> count = plan(model, share=0.63)                  # 24 of 64 patches
    >>> merged = Merged(parts.module(Path("models/mini"), "classifier"), count)
    >>> logits, features = merged(pixel_values)
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from dermaflux.errors import EngineError

SHARE: Final = 0.63
"""Of the work of all blocks that is left. On the embedded default in fp32 the area under the ROC
curve of both test sets falls by 0.009 and by 0.000, and at 0.60 by 0.011 and 0.002
(`benchmarks/results/pruning.json`)."""
_POOLS: Final = ("token", "avg")


class Merged(nn.Module):
    """pixel_values [B, 3, H, W] (normalised) -> logits [B, classes], features [B, F].

    `whole` is a `parts.Classifier`, whose model is used and changed; `count` patches are merged
    away. No map of attention is given: a merged patch has no place.

    Raises:
        EngineError: its model is none that can be merged.
    """

    inputs = ("pixel_values",)
    outputs: tuple[str, ...] = ("logits", "features")

    def __init__(self, whole: Any, count: int) -> None:
        super().__init__()
        refused = unfit(whole.model)
        if refused:
            raise EngineError(
                f"a classifier can be merged if it is a vision transformer: {refused}"
            )
        self.model = whole.model
        self.count = count
        for block in self.model.blocks:
            # Those of the map, which would keep every pass's products.
            block.attn.qkv._forward_hooks.clear()

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model = self.model
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(pixel_values)))
        prefix = model.num_prefix_tokens
        sizes = mask = None
        if self.count:
            tokens, sizes = merge(tokens, self.count, prefix)
            mask = sizes.log().transpose(1, 2)[:, None]
        for block in model.blocks:
            tokens = tokens + block.ls1(_attention(block.attn, block.norm1(tokens), mask))
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        tokens = model.norm(tokens)
        if model.global_pool == "token":
            pooled = tokens[:, 0]
        elif sizes is None:
            pooled = tokens[:, prefix:].mean(1)
        else:
            weights = sizes[:, prefix:]
            pooled = (tokens[:, prefix:] * weights).sum(1) / weights.sum(1)
        features = model.fc_norm(pooled)
        return model.get_classifier()(features), features


def merge(tokens: torch.Tensor, count: int, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Join `count` patches with their likest: tokens [B, N, D] -> [B, N - count, D], and how many
    are in each, [B, N - count, 1]. The first `prefix` tokens are no patches."""
    patches = tokens[:, prefix:]
    directions = patches / patches.square().sum(-1, keepdim=True).sqrt()
    likeness = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)
    best, partner = likeness.max(-1)
    # All of them in one order: the likest are joined, the others stay.
    order = best.topk(best.shape[1], dim=1).indices
    gone, stay = order[:, :count], order[:, count:]
    first, second = patches[:, ::2], patches[:, 1::2]
    target = partner.gather(1, gone)
    places = torch.arange(second.shape[1], device=tokens.device)
    joins = (target[:, None, :] == places[None, :, None]).to(tokens.dtype)
    totals = 1 + joins.sum(-1, keepdim=True)
    second = (second + joins @ _picked(first, gone)) / totals
    ones = torch.ones_like(tokens[:, : prefix + stay.shape[1], :1])
    return (
        torch.cat([tokens[:, :prefix], _picked(first, stay), second], 1),
        torch.cat([ones, totals], 1),
    )


def _picked(rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Rows [B, N, D] by numbers [B, K] -> [B, K, D]. As rows of one table of B N: engines copy
    them whole, where `gather` would look every number up."""
    batch, length, width = rows.shape
    first = torch.arange(batch, device=rows.device)[:, None] * length
    return rows.reshape(-1, width)[chosen + first]


def _attention(attention: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """timm's attention, a token that stands for more looked at more.

    Source: `timm.models.vision_transformer.Attention.forward`.
    """
    batch, length, _ = tokens.shape
    parts = attention.qkv(tokens).reshape(batch, length, 3, attention.num_heads, -1)
    query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    mixed = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=attention.scale
    )
    mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
    projected: torch.Tensor = attention.proj(attention.norm(mixed))
    return projected


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
        if not hasattr(getattr(block, "mlp", None), "fc1"):
            return f"{kind} has an MLP of another form, whose work is not known"
    pool = getattr(model, "global_pool", "")
    if pool not in _POOLS or getattr(model, "pool_include_prefix", False):
        return f"{kind} pools its tokens by {pool or 'nothing'}, not by {' or '.join(_POOLS)}"
    return ""


def work(tokens: int, width: int, hidden: int) -> float:
    """Multiply-adds of a block: four products of the width, two of the hidden width, and two of
    the attention."""
    return float(tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width)


def plan(model: Any, share: float = SHARE) -> int:
    """Patches to merge away so that `share` of the blocks' work is left, or a little less: half of
    them at most.

    Raises:
        EngineError: the share is none, or not even the most merging leaves so little.
    """
    if not 0 < share <= 1:
        raise EngineError(f"a share of {share} of the work cannot be left; use above 0, up to 1")
    left = 1.0
    for count in range(patches(model) // 2 + 1):
        left = work_left(model, count)
        if left <= share:
            return count
    raise EngineError(f"merging leaves {left:.2f} of the work at least, not {share}; ask for more")


def work_left(model: Any, count: int) -> float:
    """The share of the blocks' work that is left when `count` patches are merged away."""
    tokens = model.num_prefix_tokens + patches(model)
    shape = model.embed_dim, model.blocks[0].mlp.fc1.out_features
    return work(tokens - count, *shape) / work(tokens, *shape)


def patches(model: Any) -> int:
    """Pieces that a picture is cut into."""
    rows, columns = model.patch_embed.grid_size
    return int(rows * columns)
