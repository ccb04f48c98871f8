"""Merging's memory does not grow with the model, measured from outside; nor does the measuring."""

from __future__ import annotations

import sys

import pytest

from benchmarks.merge_memory import measure
from benchmarks.peak import peak_of
from dermaflux.errors import EngineError

SHAPE = {
    "attention_head_dim": 64,
    "num_attention_heads": 16,
    "in_channels": 16,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [16, 24, 24],
    "guidance_embeds": True,
    "patch_size": 1,
}


def test_peak_memory_does_not_grow_with_the_model(tiny_checkpoint, tmp_path):
    small, large = (
        measure(tmp_path, tiny_checkpoint, blocks, SHAPE, rank=8) for blocks in ((1, 1), (3, 8))
    )
    assert (small.layers, large.layers) == (20, 90)
    growth = large.bytes_in - small.bytes_in
    assert growth > 200e6
    assert large.peak_bytes - small.peak_bytes < 0.3 * growth
    assert list(tmp_path.iterdir()) == []


def test_the_peak_is_the_commands_own():
    ours = bytearray(b"x" * 300_000_000)
    assert peak_of([sys.executable, "-c", "pass"]) < 100e6 < len(ours)
    assert peak_of([sys.executable, "-c", "x = b'x' * 200_000_000"]) > 200e6


def test_a_command_that_fails_is_told():
    with pytest.raises(EngineError, match="failed: oh no"):
        peak_of([sys.executable, "-c", "import sys; sys.exit('oh no')"])
