"""The paper's figures of its classifiers as data, to stand beside what is measured here.

DermaFlux (arXiv 2603.16392) gives accuracies of a ViT and a ResNeXt as a drawn grid, and ROC curves
of five models. The numbers are digitised from the figures, ±0.0003. They cannot be compared one by
one with ours: see `CAVEATS`.

    >>> ACCURACY["ViT"][2500][RATIOS.index(1.75)]
    0.7783
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

NOTE: Final = "digitised from the figure, ±0.0003"
RATIOS: Final = (0.0, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0, 4.0)
"""Synthetic pictures for each real one."""

ACCURACY: Final[Mapping[str, Mapping[int, tuple[float, ...]]]] = {
    "ViT": {
        2500: (0.7205, 0.7641, 0.7694, 0.7615, 0.7783, 0.7622, 0.7741, 0.7666),
        5000: (0.715, 0.7318, 0.7447, 0.7423, 0.7570, 0.7414, 0.7546, 0.7369),
        7500: (0.7141, 0.7344, 0.7366, 0.7334, 0.7200, 0.7217, 0.7294, 0.7323),
        10000: (0.6919, 0.6983, 0.6987, 0.6920, 0.7182, 0.7049, 0.7089, 0.7049),
    },
    "ResNeXt": {
        2500: (0.6106, 0.6468, 0.6508, 0.6454, 0.6456, 0.6439, 0.6461, 0.6425),
        5000: (0.6291, 0.6579, 0.6582, 0.655, 0.6576, 0.657, 0.6561, 0.6540),
        7500: (0.6340, 0.6686, 0.6568, 0.6554, 0.6590, 0.6567, 0.6574, 0.6617),
        10000: (0.6444, 0.6665, 0.6642, 0.6655, 0.6609, 0.6653, 0.6537, 0.6712),
    },
}
"""Mean accuracy over five seeds by model, number of real pictures, and ratio (`RATIOS`)."""

HIDDEN: Final = (("ViT", 5000, 0.0), ("ResNeXt", 5000, 1.5), ("ResNeXt", 5000, 2.0))
"""Cells whose marker is partly hidden by another's: digitised with less certainty."""

ROC: Final[Mapping[str, Mapping[str, float]]] = {
    "DermaFlux-ViT": {"auc": 0.859, "tpr@.05": 0.35, "tpr@.10": 0.54, "tpr@.20": 0.76,
                      "tpr@.30": 0.85, "fpr@.80": 0.24, "fpr@.90": 0.37, "fpr@.95": 0.49},
    "MAKE": {"auc": 0.786, "tpr@.05": 0.33, "tpr@.10": 0.48, "tpr@.20": 0.64,
             "tpr@.30": 0.74, "fpr@.80": 0.40, "fpr@.90": 0.62, "fpr@.95": 0.81},
    "DermLIP-PanDerm": {"auc": 0.765, "tpr@.05": 0.30, "tpr@.10": 0.43, "tpr@.20": 0.59,
                        "tpr@.30": 0.70, "fpr@.80": 0.44, "fpr@.90": 0.64, "fpr@.95": 0.78},
    "DermLIP-ViT": {"auc": 0.720, "tpr@.05": 0.29, "tpr@.10": 0.40, "tpr@.20": 0.55,
                    "tpr@.30": 0.63, "fpr@.80": 0.56, "fpr@.90": 0.77, "fpr@.95": 0.88},
    "BiomedCLIP": {"auc": 0.693, "tpr@.05": 0.16, "tpr@.10": 0.27, "tpr@.20": 0.44,
                   "tpr@.30": 0.58, "fpr@.80": 0.54, "fpr@.90": 0.71, "fpr@.95": 0.84},
}  # fmt: skip
"""The ROC figure: AUC from its legend; `tpr@x` sensitivity at a false-positive rate of x, `fpr@x`
the false-positive rate at a sensitivity of x, both read off the curves."""

CAVEATS: Final = (
    "The paper's test set, its size and share of malignant lesions, and its overlap with what the "
    "generator saw are not known from the material we have; nor are its rates, epochs, "
    "augmentation, class balance and choice of the model. Only the protocol is followed here.",
    "Its networks are pretrained on ImageNet; without such weights ours begin at random.",
    "Its smallest number of real pictures is 2,500; ours are other and smaller numbers.",
    "Its ViT loses accuracy as real pictures are added (72.1 to 69.2 %), the opposite of what is "
    "usual: a shift of the test, the balance of the classes or over-fitting may be behind it.",
    "Its gains do not grow steadily with the ratio; the 78.04 % of its abstract is above the "
    "five-seed mean of that cell in the figure (77.83 %), so perhaps a single run's.",
    "It gives no intervals, calibration, subgroups, external test or control of what the generator "
    "has seen.",
)
