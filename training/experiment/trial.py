"""One run: train, score the validation pictures and every test, and say what came of it.

    >>> line = run(key, config, sets, kept, Album(Pictures()), Path("runs/experiment"))
    >>> line["metrics"]["test"]["auc"]
    0.7931

The raw scores go to `scores/` as a `.npz` of their own, so that every figure can be made again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from dermaflux import files
from dermaflux.prompt import LABELS
from training.data import Sample
from training.experiment.config import Config, changed
from training.experiment.key import Key
from training.experiment.raw import VAL, Scores, calibrated, difference, measured, rounded
from training.experiment.sets import Sets, chosen
from training.figures import Floats, Pixels

if TYPE_CHECKING:
    from training.pictures import Pictures

SCORES: Final = "scores"


class Album:
    """Pictures in memory for all runs of a process, with the controls of the tests' pictures."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        self._controls: dict[tuple[str, int], tuple[Pixels, Pixels, NDArray[np.bool_]]] = {}

    def controls(
        self, test: str, samples: Sequence[Sample], size: int
    ) -> tuple[Pixels, Pixels, NDArray[np.bool_]]:
        """A test's pictures without all but the border, without lesion, and which have a mask."""
        from training.scores import border_only, lesion_masked

        if (test, size) not in self._controls:
            images = self.pictures.images(samples, size)
            self._controls[test, size] = border_only(images), *lesion_masked(images, list(samples))
        return self._controls[test, size]


def run(
    key: Key, config: Config, sets: Sets, kept: Mapping[str, Sequence[Sample]],
    album: Album, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train and test; what the journal's line says beside key and digest.

    Raises:
        DatasetError: a picture cannot be read, or the training diverged.
    """
    import torch

    from training import classifier, supervise
    from training.pretrained import Pretrained

    started, used = time.monotonic(), time.process_time()
    model = config.recipes()[key.model]
    recipe = changed(model.recipe, key.arm, key.seed)
    weights = None if model.pretrained is None else Pretrained.open(Path(model.pretrained))
    samples = chosen(sets, config, key)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        net, history = supervise.fit(
            samples, recipe, sets.val, pictures=album.pictures, weights=weights
        )
        classifier.as_shipped(net)

        def logits_of(images: NDArray[np.uint8]) -> Floats:
            return classifier.logits_of(net, images)

        parts = [_scored(VAL, sets.val, logits_of, recipe.whole, album, sets)]
        parts += [
            _scored(name, test, logits_of, recipe.whole, album, sets) for name, test in kept.items()
        ]
    finally:
        torch.set_num_threads(threads)
    scores = Scores(
        **{
            one.name: np.concatenate([getattr(part, one.name) for part in parts])
            for one in fields(Scores)
        }
    )
    calibration = calibrated(scores.where(scores.part == VAL))
    content = scores.bytes()
    file = folder / SCORES / f"{key.file}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, content)
    seconds = time.monotonic() - started
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pool = {sample.file for sample in sets.pools.get(key.generator, ())}
    made = [sample for sample in samples if sample.file in pool]
    return {
        "learnt": {"real": len(samples) - len(made), "synthetic": len(made)} | {
            label: sum(s.lesion.label == label for s in samples) for label in LABELS
        },
        "steps": history.steps,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time() - used, 2),
        "gpu_seconds": round(seconds, 2) if device == "cuda" else 0.0,
        "device": device,
        "loss": history.loss,
        "calibration": calibration,
        "validation": rounded(measured(scores.where(scores.part == VAL), calibration)),
        "metrics": {
            name: rounded(measured(scores.where(scores.part == name), calibration))
            for name in kept
        },
        "scores": f"{SCORES}/{file.name}",
        "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip


def _scored(
    part: str, samples: Sequence[Sample], logits_of: Any, size: int, album: Album, sets: Sets
) -> Scores:
    images = album.pictures.images(samples, size)
    border = masked = np.full(len(samples), np.nan)
    if part != VAL:
        rim, painted, done = album.controls(part, samples, size)
        border = difference(logits_of(rim))
        masked = np.where(done, difference(logits_of(painted)), np.nan)
    return Scores(
        part=np.full(len(samples), part),
        picture=np.array([sets.names[s.file] for s in samples], np.str_),
        group=np.array([s.group for s in samples], np.str_),
        confirmed=np.array([s.confirmed for s in samples], np.str_),
        label=np.array([LABELS.index(str(s.lesion.label)) for s in samples], np.int64),
        logits=logits_of(images), border=border, masked=masked,
    )  # fmt: skip
