"""Prompts to measure with: seeded captions in the wording that models are trained on.

>>> captions(2, seed=0)
['dermoscopic image of a benign lesion, nevus, ...', 'dermoscopic image of a malignant ...']
"""

from __future__ import annotations

import random

from dermaflux.prompt import DIAGNOSES, LABELS, VOCABULARY, Lesion, caption


def captions(count: int, seed: int = 0) -> list[str]:
    """`count` captions, the same every time; labels take turns, attributes may be left out."""
    source = random.Random(seed)
    return [caption(_lesion(source, LABELS[number % len(LABELS)])) for number in range(count)]


def _lesion(source: random.Random, label: str) -> Lesion:
    fitting = [name for name, implied in DIAGNOSES.items() if implied in (label, None)]
    single = {
        name: source.choice((*VOCABULARY[name], None)) for name in ("asymmetry", "border", "size")
    }
    return Lesion(
        label=label,
        diagnosis=source.choice((*fitting, None)),
        colors=tuple(source.sample(VOCABULARY["colors"], source.randint(0, 3))),
        structures=tuple(source.sample(VOCABULARY["structures"], source.randint(0, 2))),
        **single,
    )
