"""The latent space of the embedded default: sixteen numbers for every 8 x 8 pixels.

FLUX.1's own latents were tried first (through a tiny autoencoder of them, 34.5 dB on lesions).
They carry fine texture that a transformer of a few million weights cannot model, so its samples
are noisy. These latents are the other way round: the sixteen block-DCT coefficients that vary most
over the training images, in the colour axes that vary most. They keep 35.4 dB of dermoscopy, put
the broad structure first, need no teacher and no training, and a flip or a quarter turn of the
picture stays in the space. The AutoencoderKL (`training.autoencoder`) learns to read and write
them, and only it is shipped.

Each coefficient is divided by its standard deviation to the power 0.6, which brings fine detail
within the reach of the sampler's last steps without giving it the weight of the skin's colour
(full whitening would).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

BLOCK = 8
CHANNELS = 16
_WHITENING = 0.6
_COLOUR_SAMPLES = 50  # every 50th pixel is plenty for a 3 x 3 covariance


def _dct_matrix() -> NDArray[np.float64]:
    """Orthonormal DCT-II of eight samples, [8, 8]; rows are frequencies."""
    k = np.arange(BLOCK)
    matrix = np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / (2 * BLOCK)) * np.sqrt(2 / BLOCK)
    matrix[0] /= np.sqrt(2)
    return np.asarray(matrix)


@dataclass(frozen=True)
class Basis:
    """A fitted latent space: `encode` and `decode` are linear and each other's pseudo-inverse.

    Attributes:
        mean: [192] float32, the mean 8 x 8 x 3 block in -1..1.
        weights: [192, 16] float32, block -> latent.
        inverse: [16, 192] float32, latent -> block.
    """

    mean: Floats
    weights: Floats
    inverse: Floats

    def encode(self, images: NDArray[np.uint8]) -> Floats:
        """[N, H, W, 3] uint8, sides multiples of 8 -> [N, 16, H/8, W/8], unit mean square."""
        count, height, width, _ = images.shape
        shape = (count, height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3)
        blocks = (images.astype(np.float32) / 127.5 - 1).reshape(shape).transpose(0, 1, 3, 2, 4, 5)
        flat = blocks.reshape(count, shape[1], shape[3], -1)
        return np.ascontiguousarray(((flat - self.mean) @ self.weights).transpose(0, 3, 1, 2))

    def decode(self, latents: Floats) -> Floats:
        """[N, 16, h, w] -> [N, 8h, 8w, 3] in -1..1 (may run over a little)."""
        count, _, h, w = latents.shape
        blocks = latents.transpose(0, 2, 3, 1) @ self.inverse + self.mean
        image = blocks.reshape(count, h, w, BLOCK, BLOCK, 3).transpose(0, 1, 3, 2, 4, 5)
        return image.reshape(count, h * BLOCK, w * BLOCK, 3)


def fit(images: NDArray[np.uint8]) -> Basis:
    """Fit the space to training images, [N, H, W, 3] uint8 with sides that are multiples of 8."""
    pixels = images.reshape(-1, 3)[::_COLOUR_SAMPLES].astype(np.float64) / 127.5 - 1
    _, colours = np.linalg.eigh(np.cov((pixels - pixels.mean(0)).T))
    dct = _dct_matrix()
    # full[(y, x, c), (i, l, k)]: the picture's block -> every coefficient of every colour axis.
    full = np.einsum("iy,lx,ck->yxcilk", dct, dct, colours).reshape(192, 192)
    mean = np.tile(pixels.mean(0), BLOCK * BLOCK)
    everything = Basis(mean.astype(np.float32), full.astype(np.float32), full.T.astype(np.float32))
    coefficients = np.concatenate(
        [
            everything.encode(images[start : start + 256]).transpose(0, 2, 3, 1).reshape(-1, 192)
            for start in range(0, len(images), 256)
        ]
    )
    spread = coefficients.std(axis=0)
    kept = np.argsort(-spread)[:CHANNELS]
    scale = spread[kept] ** -_WHITENING
    scale /= np.sqrt(np.mean((spread[kept] * scale) ** 2))
    return Basis(
        mean=everything.mean,
        weights=np.ascontiguousarray(full[:, kept] * scale, dtype=np.float32),
        inverse=np.ascontiguousarray((full[:, kept] / scale).T, dtype=np.float32),
    )


def orientations(images: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The eight flips and quarter turns of [N, S, S, 3]: dermoscopy has no upright."""
    turned = [np.rot90(images, turns, axes=(1, 2)) for turns in range(4)]
    return turned + [image[:, :, ::-1] for image in turned]
