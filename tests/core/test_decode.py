"""Latents to pixels: what diffusers' own formulas give, a picture at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dermaflux.decode import decode
from dermaflux.errors import EngineError
from dermaflux.flow import noise

MODEL: Any = SimpleNamespace(scaling_factor=0.5, shift_factor=0.25)


class Given:
    """A decoder that gives what it holds, whatever it is given."""

    name, precision = "given", "fp32"

    def __init__(self, sample: np.ndarray) -> None:
        self.sample = sample
        self.latents = np.empty(0)

    def run(self, inputs: Any) -> dict[str, np.ndarray]:
        self.latents = inputs["latent_sample"]
        return {"sample": self.sample}

    def bind(self, constant: Any, timesteps: Any = None) -> Any:
        raise AssertionError


def test_pixels_are_those_of_the_whole_batch_at_once():
    sample = 2 * noise(1, (3, 3, 24, 16))
    # Halves between two levels, both ends, and what lies beyond them.
    sample[0, 0, 0] = np.arange(16, dtype=np.float32) / np.float32(127.5) - 1
    sample[0, 1, 0, :6] = (-1, 1, -1.5, 1.5, -0.0, 1e30)
    shares = np.clip(sample * np.float32(0.5) + np.float32(0.5), 0, 1).transpose(0, 2, 3, 1)
    want = (shares * 255).round().astype(np.uint8)
    held = sample.copy()
    engine = Given(sample)
    latents = noise(2, (3, 4, 3, 2))
    found = decode(engine, MODEL, latents)
    assert np.array_equal(np.stack(found), want)
    assert all(one.flags.c_contiguous and one.flags.writeable for one in found)
    assert np.array_equal(engine.latents, latents / np.float32(0.5) + np.float32(0.25))
    assert np.array_equal(sample, held)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_error(number):
    sample = np.zeros((2, 3, 8, 8), np.float32)
    sample[1, 2, 3, 4] = number
    with pytest.raises(EngineError, match="given gave numbers that are not finite"):
        decode(Given(sample), MODEL, np.zeros((2, 4, 1, 1), np.float32))
