"""LPIPS: how different two images look to a network that people's judgements were fitted on.

Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric
(2018), by its authors' package `lpips` 0.1 with AlexNet. The package brings the fitted layers;
AlexNet's own weights are ImageNet's, which this project cannot ship: save torchvision's
`alexnet(weights="IMAGENET1K_V1").state_dict()` with safetensors where the internet is reached.

    >>> distance = Perceptual.open(Path("alexnet.safetensors"))
    >>> distance([image], [reference])
    [0.0004]
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dermaflux.errors import EngineError
from export.parity import Pixels

SMALLEST: Final = 31
"""Pixels a side: AlexNet's strides leave nothing of less."""


@dataclass(frozen=True)
class Perceptual:
    """LPIPS of pairs of images; 0 is equal, and 0.1 a difference that most people see."""

    network: Any

    @classmethod
    def open(cls, weights: Path) -> Perceptual:
        """Read torchvision's AlexNet.

        Raises:
            EngineError: lpips is not installed, or the file is none of AlexNet's weights.
        """
        if importlib.util.find_spec("lpips") is None:
            raise EngineError("--lpips needs the package lpips; pip install lpips")
        import lpips
        from torchvision.models import alexnet

        trunk = alexnet()
        try:
            trunk.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise EngineError(
                f"{weights} does not hold torchvision's AlexNet as safetensors: {why}"
            ) from error
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        for number in range(1, network.net.N_slices + 1):
            for index, layer in getattr(network.net, f"slice{number}").named_children():
                layer.load_state_dict(trunk.features[int(index)].state_dict())
        return cls(network.eval().requires_grad_(False))

    def __call__(self, images: Sequence[Pixels], references: Sequence[Pixels]) -> list[float]:
        """The distance of each image [H, W, 3] uint8 from its reference.

        Raises:
            EngineError: an image is smaller than AlexNet reads.
        """
        found = []
        for image, reference in zip(images, references, strict=True):
            if min(image.shape[:2]) < SMALLEST:
                raise EngineError(f"LPIPS needs {SMALLEST} pixels a side, not {image.shape[:2]}")
            with torch.inference_mode():
                found.append(float(self.network(_tensor(image), _tensor(reference))))
        return found


def _tensor(image: Pixels) -> torch.Tensor:
    scaled = image.astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    return torch.from_numpy(np.ascontiguousarray(scaled))
