from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from training import latents


@pytest.fixture(scope="module")
def pictures() -> NDArray[np.uint8]:
    """Smooth pictures: what sixteen coefficients of an 8 x 8 block can hold."""
    random = np.random.default_rng(0)
    coarse = random.integers(60, 200, (12, 4, 4, 3)).astype(np.float64)
    steps = np.linspace(0, 3, 64)
    low = np.floor(steps).astype(int).clip(0, 2)
    share = steps - low
    rows = coarse[:, low] * (1 - share)[:, None, None] + coarse[:, low + 1] * share[:, None, None]
    full = rows[:, :, low] * (1 - share)[:, None] + rows[:, :, low + 1] * share[:, None]
    return full.astype(np.uint8)


def test_decoding_inverts_encoding(pictures: NDArray[np.uint8]) -> None:
    basis = latents.fit(pictures)
    back = (basis.decode(basis.encode(pictures)) + 1) * 127.5
    assert np.sqrt(np.square(back - pictures).mean()) < 4


def test_encoding_inverts_decoding(pictures: NDArray[np.uint8]) -> None:
    basis = latents.fit(pictures)
    assert np.allclose(basis.inverse @ basis.weights, np.eye(latents.CHANNELS), atol=1e-4)


def test_the_latents_have_unit_mean_square(pictures: NDArray[np.uint8]) -> None:
    encoded = latents.fit(pictures).encode(pictures)
    assert encoded.shape == (12, latents.CHANNELS, 8, 8)
    assert np.square(encoded).mean() == pytest.approx(1, abs=0.1)


def test_eight_orientations_all_differ(pictures: NDArray[np.uint8]) -> None:
    turned = latents.orientations(pictures[:1])
    assert len({picture.tobytes() for picture in turned}) == 8
