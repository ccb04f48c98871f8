"""Prompts in the wording that the model was trained on: seeded, endless, never two lists alike.

Calibration and parity look at what the model will be asked, so they ask for lesions, not for cats.

    >>> captions(2, seed=0)
    ['dermoscopic image of a benign lesion, nevus, symmetric, ...', ...]
"""

from __future__ import annotations

import random
from typing import Final

from dermaflux.errors import BundleError
from dermaflux.prompt import DIAGNOSES, LABELS, VOCABULARY, Lesion, caption

MAX_SEED: Final = 1_000_000
"""Of a list of requests: each takes a million seeds of images for itself."""


def require_seed(seed: int) -> None:
    """Check the seed of a list of requests.

    Raises:
        BundleError: it is out of range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise BundleError(f"--seed {seed} is out of range; use 0 to {MAX_SEED}")


def captions(count: int, seed: int) -> list[str]:
    """`count` captions of random lesions; labels take turns, every attribute may be left out."""
    source = random.Random(seed)
    return [caption(_lesion(source, LABELS[item % len(LABELS)])) for item in range(count)]


def _lesion(source: random.Random, label: str) -> Lesion:
    def perhaps(name: str) -> str | None:
        return source.choice((*VOCABULARY[name], None))

    def some(name: str, most: int) -> tuple[str, ...]:
        return tuple(source.sample(VOCABULARY[name], source.randint(0, most)))

    fitting = [name for name, implied in DIAGNOSES.items() if implied in (label, None)]
    return Lesion(
        label=label,
        diagnosis=source.choice((*fitting, None)),
        asymmetry=perhaps("asymmetry"),
        border=perhaps("border"),
        colors=some("colors", 3),
        size=perhaps("size"),
        structures=some("structures", 2),
    )
