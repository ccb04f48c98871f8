"""The trainer's own attention and last block give what diffusers' give, gradients too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dermaflux import flow
from training.lora import attention
from training.lora.layers import LoraLinear, inject, parameters, targets


def _model(rank: int, alpha: float) -> tuple[Any, dict[str, LoraLinear]]:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=12,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    for name, value in model.named_parameters():
        # Norms of ones would hide that their weight is left out.
        if "norm_" in name and value.ndim == 1:
            nn.init.uniform_(value, 0.5, 1.5)
    layers = inject(model, targets(model, ("*",)), rank, alpha, seed=0)
    for layer in layers.values():
        nn.init.normal_(layer.up, std=0.05)
    return model, layers


def _velocity(model: Any, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.from_numpy(flow.image_ids(2 * rows, 2 * rows))
    (velocity,) = model(
        hidden_states=torch.randn(3, rows * rows, 16, generator=generator),
        encoder_hidden_states=torch.randn(3, 24, 24, generator=generator),
        pooled_projections=torch.randn(3, 12, generator=generator),
        timestep=torch.tensor([0.2, 0.5, 0.9]),
        img_ids=ids,
        txt_ids=torch.zeros(24, 3),
        guidance=torch.ones(3),
        return_dict=False,
    )
    assert isinstance(velocity, Tensor)
    return velocity


# Few rows go beside the weights, many through merged ones, by factors or by the whole weight.
@pytest.mark.parametrize(("rank", "alpha", "rows"), [(4, 4.0, 1), (4, 8.0, 10), (16, 16.0, 10)])
def test_it_computes_what_diffusers_computes(rank: int, alpha: float, rows: int) -> None:
    theirs, their_layers = _model(rank, alpha)
    ours, our_layers = _model(rank, alpha)
    ours.set_attn_processor(attention.Attention())
    attention.end_early(ours)
    wanted, found = _velocity(theirs, rows), _velocity(ours, rows)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    (wanted * weights).sum().backward()
    (found * weights).sum().backward()
    others = parameters(their_layers)
    for name, value in parameters(our_layers).items():
        other = others[name].grad
        assert value.grad is not None
        assert other is not None
        assert (value.grad - other).norm() <= 1e-4 * other.norm() + 1e-5, name


def test_layers_that_are_not_adapted_compute_for_themselves() -> None:
    model, _ = _model(4, 4.0)
    block = model.single_transformer_blocks[0].attn
    plain = copy.deepcopy(block.to_q.base)
    x = torch.randn(2, 50, 32)
    first, second = attention.together(x, [plain, block.to_k])
    torch.testing.assert_close(first, plain(x))
    torch.testing.assert_close(second, block.to_k(x))
