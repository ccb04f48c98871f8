"""Would a classifier that learns from marked synthetic and unmarked real pictures learn the mark?

Two questions, asked of real pictures alone, so that the mark is the only difference:

* Can it be told? Detectors learn the same pictures with and without the mark, and are tested on
  others. This bounds what could leak into any classifier at this size. The same with a key of its
  own for each picture shows what is left where there is no pattern to learn.
* Is it learnt? A classifier learns benign and malignant while the mark stands in for "synthetic":
  on half of one class, on half of both, on all, on none. Then test pictures are marked, and what
  that does to its answers is the shortcut. On half of one class is what must not happen.

    >>> shortcut([(pixels, "benign", "train"), ...], Watermark(key), Path("bundles/mini"), epochs=9)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermaflux.classifier import Classifier
from dermaflux.marks.spectrum import band, basis, coefficients, luminance
from dermaflux.marks.watermark import Watermark

Pixels = NDArray[np.uint8]
Vectors = NDArray[np.float32]
Marks = NDArray[np.bool_]
Model = Callable[[Pixels], Vectors]
"""uint8 [n, h, w, 3] -> a score each."""

ARMS: Final = ("no picture", "half of the malignant", "half of both classes", "every picture")


def shortcut(
    examples: Sequence[tuple[Pixels, str, str]], mark: Watermark, bundle: Path, *, epochs: int
) -> dict[str, Any]:
    """Both answers for (pixels [128, 128, 3], label, split); `val` counts as training.

    And how far the mark moves the answers of the bundle's own classifier, which never saw one.
    """
    plain = np.stack([one for one, _, _ in examples])
    marked = np.stack([mark.embed(one).pixels for one in plain])
    scattered = np.stack([
        Watermark(b"key %d" % number).embed(one).pixels for number, one in enumerate(plain)
    ])  # fmt: skip
    malignant = np.array([label == "malignant" for _, label, _ in examples])
    test = np.array([split == "test" for _, _, split in examples])
    return {
        "pictures": {"train": int((~test).sum()), "test": int(test.sum())},
        "told_apart_auc": told_apart(plain, marked, test, epochs),
        "told_apart_auc_with_a_key_a_picture": told_apart(plain, scattered, test, epochs),
        "learnt": learnt(plain, marked, malignant, test, epochs),
        "bundles_classifier": moved(plain[test], marked[test], malignant[test], bundle),
    }


def told_apart(plain: Pixels, marked: Pixels, test: Marks, epochs: int) -> dict[str, float]:
    """AUC of detectors on test pictures and their marked twins."""
    seen = np.concatenate([plain[~test], marked[~test]])
    target = np.repeat([False, True], (~test).sum())
    asked = np.concatenate([plain[test], marked[test]])
    truth = np.repeat([False, True], test.sum())
    models = {
        "linear, on the coefficients that are marked": linear(seen, target, _whitened),
        "linear, on pixels": linear(seen, target, _pixels),
        "boosted trees, on the spectrum's rings": boosted(seen, target),
        "small network, on pixels": network(seen, target, epochs),
    }
    return {name: _auc(truth, model(asked)) for name, model in models.items()}


def learnt(
    plain: Pixels, marked: Pixels, malignant: Marks, test: Marks, epochs: int
) -> dict[str, Any]:
    """What marking the test pictures does to classifiers that learnt with marks on some.

    `auc_unmarked` is on the test pictures as they are, `auc_marked` with the mark on all; `shift`
    is how far it moves the score towards malignant, in deviations of the scores: 0 is no shortcut.
    """
    coin = np.random.default_rng(0).random(len(plain)) < 0.5
    nobody = np.zeros(len(plain), bool)
    with_mark = dict(zip(ARMS, (nobody, coin & malignant, coin, ~nobody), strict=True))
    told: dict[str, Any] = {}
    for arm, where in with_mark.items():
        pictures = np.where(where[:, None, None, None], marked, plain)[~test]
        models = {
            "linear, on pixels": linear(pictures, malignant[~test], _pixels),
            "small network, on pixels": network(pictures, malignant[~test], epochs),
        }
        told[arm] = {name: _shift(model, plain[test], marked[test], malignant[test])
                     for name, model in models.items()}  # fmt: skip
    return told


def moved(plain: Pixels, marked: Pixels, malignant: Marks, bundle: Path) -> dict[str, float]:
    """How far the mark moves the probabilities of a bundle's classifier."""
    classifier = Classifier.open(bundle, gated=False)
    before, after = (
        np.array([
            one.probability for one in classifier.classify([Image.fromarray(p) for p in some])
        ])
        for some in (plain, marked)
    )  # fmt: skip
    return {
        "auc_unmarked": _auc(malignant, before),
        "auc_marked": _auc(malignant, after),
        "probability_moved_mean": round(float((after - before).mean()), 4),
        "probability_moved_median_size": round(float(np.median(np.abs(after - before))), 4),
        "probability_moved_largest": round(float(np.abs(after - before).max()), 4),
    }


def linear(pictures: Pixels, target: Marks, features: Callable[[Pixels], Vectors]) -> Model:
    """Logistic regression, strongly regularised: there are more features than pictures."""
    from sklearn.linear_model import LogisticRegression

    found = LogisticRegression(C=1e-3, max_iter=200, class_weight="balanced")
    found.fit(features(pictures), target)
    return lambda asked: np.asarray(found.decision_function(features(asked)), np.float32)


def boosted(pictures: Pixels, target: Marks) -> Model:
    """Gradient boosting on the energy of rings of frequencies, which knows nothing of the key."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    found = HistGradientBoostingClassifier(random_state=0).fit(_rings(pictures), target)
    return lambda asked: np.asarray(found.predict_proba(_rings(asked))[:, 1], np.float32)


def network(pictures: Pixels, target: Marks, epochs: int) -> Model:
    """Four convolutions and a linear layer over what is left of the places, trained on the CPU."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers: list[nn.Module] = []
    for before, after in ((3, 12), (12, 24), (24, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(1))
    body(torch.zeros(2, 3, *pictures.shape[1:3]))
    optimizer = torch.optim.AdamW(body.parameters(), 1e-3, weight_decay=0.05)
    weight = torch.tensor(float((~target).sum() / max(target.sum(), 1)))
    loss = nn.BCEWithLogitsLoss(pos_weight=weight)
    truth = torch.from_numpy(target.astype(np.float32))
    inputs = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
    for _ in range(epochs):
        body.train()
        for rows in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            loss(body(inputs[rows].float() / 64 - 2)[:, 0], truth[rows]).backward()
            optimizer.step()

    def score(asked: Pixels) -> Vectors:
        body.eval()
        given = torch.from_numpy(np.ascontiguousarray(asked.transpose(0, 3, 1, 2)))
        with torch.no_grad():
            parts = [body(part.float() / 64 - 2)[:, 0] for part in given.split(128)]
        return torch.cat(parts).numpy()

    return score


def _shift(model: Model, plain: Pixels, marked: Pixels, malignant: Marks) -> dict[str, float]:
    before, after = model(plain), model(marked)
    return {
        "auc_unmarked": _auc(malignant, before),
        "auc_marked": _auc(malignant, after),
        "shift": round(float((after - before).mean() / before.std()), 3),
    }


def _auc(truth: Marks, scores: NDArray[Any]) -> float:
    from sklearn.metrics import roc_auc_score

    return round(float(roc_auc_score(truth, scores)), 4)


def _whitened(pictures: Pixels) -> Vectors:
    return np.stack([coefficients(luminance(one), 64)[band(64)] for one in pictures])


def _pixels(pictures: Pixels) -> Vectors:
    grey = np.stack([luminance(one) for one in pictures])[:, ::2, ::2]
    return (grey.reshape(len(grey), -1) / 50).astype(np.float32)


def _rings(pictures: Pixels) -> Vectors:
    """The logarithm of the mean energy in 32 rings of frequencies."""
    waves = basis(pictures.shape[1], 96)
    count = len(waves)
    ring = (np.hypot(*np.mgrid[:count, :count]) / 3).astype(int).ravel()
    size = np.bincount(ring)
    rows = []
    for one in pictures:
        power = (waves @ luminance(one) @ waves.T).ravel() ** 2
        rows.append(np.log(np.bincount(ring, power) / size + 0.1)[:32])
    return np.stack(rows).astype(np.float32)
