"""A classifier of real images that judges generated ones.

    python -m training.vit --data ISIC2017 --out runs/mini/judge

It must have seen real images alone, and none of the test split. Generated images are shown to it
at their own size, and real ones at the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from training import classifier, data
from training.drawing import fingerprint
from training.figures import Figure, Floats, Pixels, auc, comparison, interval, resampled


@dataclass(frozen=True)
class Judge:
    """A classifier of real images. `saw` are the sources that it was trained on."""

    model: nn.Module
    size: int
    weights: str
    saw: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> Judge:
        """Open what `training.vit` wrote.

        Raises:
            DatasetError: there is none; the message names the command that makes one.
        """
        model = classifier.load(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            size = int(config["pretrained_cfg"]["input_size"][1])
            saw = json.loads((folder / "report.json").read_text())["saw"]
            names = tuple(str(item["source"]) for item in saw)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise data.DatasetError(
                f"{folder} is no whole classifier ({type(error).__name__}: {error}); make it again "
                f"with: python -m training.vit --data DATASET --out {folder}"
            ) from error
        return cls(model, size, fingerprint(folder, ("model.safetensors",)), names)

    def features(self, images: Pixels) -> Floats:
        """[N, S, S, 3] -> [N, D], what the last layer sees."""
        return classifier.features_of(self.model, _resized(images, self.size))

    def malignant(self, images: Pixels) -> Floats:
        """[N, S, S, 3] -> [N], the malignant logit less the benign one."""
        logits = classifier.logits_of(self.model, _resized(images, self.size))
        return np.asarray(logits[:, 1] - logits[:, 0])


_ABOVE = "a ratio above 1 says that the generator exaggerates what the judge uses"

Scored = tuple[Floats, NDArray[np.bool_]]
"""Scores [N] of images, and which of them are, or were asked for as, malignant [N]."""


def label_figures(real: Scored, generated: Mapping[str, Scored]) -> list[Figure]:
    """Does a judge see the label asked for as well as it sees that of `real` test images?

    `generated` are the scores of images by what was asked for; each gets a line of its own.
    """
    random = np.random.default_rng(0)

    def tell(scores: Floats, malignant: NDArray[np.bool_]) -> tuple[float, Floats]:
        """AUC, and its draws."""
        wins = comparison(scores[malignant], scores[~malignant])
        drawn = auc(wins, *(resampled(count, random) for count in wins.shape))
        return float(auc(wins)[0]), drawn

    own, own_draws = tell(*real)
    # A judge that cannot tell real images is no measure of generated ones.
    blind = own <= 0.5
    lines = [
        Figure("judge", "judge on real test images, AUC", own, len(real[0]), interval(own_draws))
    ]
    for what, scored in generated.items():
        value, draws = tell(*scored)
        ratio = draws / np.where(own_draws > 0, own_draws, np.nan)
        lines.append(
            Figure(
                f"label.{what}",
                f"malignant against benign, {what}: AUC over the judge's own on real images",
                None if blind else value / own,
                len(scored[0]),
                None if blind else interval(ratio),
                0.9,
                beside={"AUC": value},
                note="the judge is no better than chance on real images" if blind else _ABOVE,
            )
        )
    return lines


def malignant(samples: Sequence[data.Sample]) -> NDArray[np.bool_]:
    """Which samples are malignant, [N]."""
    return np.array([sample.lesion.label == "malignant" for sample in samples])


def _resized(images: Pixels, size: int) -> Pixels:
    """[N, S, S, 3] -> [N, size, size, 3], bicubic as the judge's own pre-processing."""
    if images.shape[1] == size:
        return images
    bicubic = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), bicubic)) for i in images])
