"""Layers in fp8: numbers are near, only the blocks' are low, and weights take a byte."""

from __future__ import annotations

import json

import pytest

from dermaflux.errors import EngineError

torch = pytest.importorskip("torch")

from dermaflux.engines import eager, flux_fp8, flux_weights  # noqa: E402
from dermaflux.engines.flux_fp8 import KINDS, product, quantized  # noqa: E402


def test_rows_keep_four_bits_of_their_own_size():
    """Half of the last of 3 bits of mantissa: a sixteenth; rows of any size alike."""
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1e-6, 1.0, 1e6, 0.0])[:, None]
    numbers, scale = quantized(x)
    assert numbers.dtype == torch.float8_e4m3fn
    back = numbers.float() * scale[:, None]
    assert torch.isfinite(back).all()
    # Below 1/448 of the largest numbers are subnormal: an absolute step remains.
    step = x.abs().amax(dim=-1, keepdim=True) / 448 * 2**-9
    assert ((back - x).abs() <= x.abs() / 16 + step / 2 + 1e-20).all()
    assert torch.equal(back[3], x[3])


def test_a_product_is_that_of_the_low_numbers():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 64), (48, 64)))
    bias = torch.randn(48, generator=generator)
    low, scale = quantized(weight)
    found = product(x, low, scale, bias)
    numbers, scales = quantized(x)
    exact = (numbers.double() * scales[..., None]) @ (low.double() * scale[:, None]).T + bias
    assert (found - exact).abs().max() < 1e-4
    plain = torch.nn.functional.linear(x, weight, bias)
    assert 0 < (found - plain).norm() / plain.norm() < 0.05
    assert product(x.bfloat16(), low, scale, bias.bfloat16()).dtype == torch.bfloat16


def test_only_the_layers_of_blocks_are_low(tiny_checkpoint):
    config = json.loads((tiny_checkpoint / "transformer/config.json").read_text())
    plain = eager.load(tiny_checkpoint, "transformer", fast=True)
    low = eager.load(tiny_checkpoint, "transformer", precision="fp8")
    (double,), singles = low.flux.doubles, low.flux.singles
    for stream in double:
        assert {getattr(stream, n).weight.dtype for n in ("qkv", "out", "up", "down")} == {
            torch.float8_e4m3fn
        }
    assert {s.qkv_up.weight.dtype for s in singles} == {torch.float8_e4m3fn}
    for layer in (low.flux.modulation, low.flux.out, low.flux.image_in, *low.flux.time):
        assert (layer.weight.dtype, layer.scale) == (torch.bfloat16, None)
    d = config["attention_head_dim"] * config["num_attention_heads"]
    blocks = (24 * config["num_layers"] + 12 * config["num_single_layers"]) * d * d
    # A byte each instead of two, and a scale of four bytes for each row of them.
    rows = (18 * config["num_layers"] + 8 * config["num_single_layers"]) * d
    expected = plain.counts()["weight_bytes"] // 2 - blocks + 4 * rows
    assert low.counts()["weight_bytes"] == expected


def test_kinds_can_be_left_out(tiny_checkpoint):
    folder = tiny_checkpoint / "transformer"
    place = torch.device("cpu")
    some = flux_weights.opened(folder, torch.float32, place, ["single.down"])
    assert {s.down.scale is None for s in some.singles} == {False}
    assert {s.qkv_up.scale is None for s in some.singles} == {True}
    assert some.doubles[0].image.down.scale is None
    with pytest.raises(EngineError, match=r"single\.up is no kind of layer; use image\.qkv"):
        flux_weights.opened(folder, torch.float32, place, ["single.up"])
    assert set(flux_fp8.LOW) <= set(KINDS)
