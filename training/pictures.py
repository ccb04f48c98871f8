"""Pictures and masks in memory, each read once, whatever is trained on them.

    >>> cache = Pictures()
    >>> cache.images(samples, 144).shape
    (2117, 144, 144, 3)
    >>> cache.images(samples[:250], 144)       # nothing is read again

An experiment gives one cache to all its runs, which take other subsets of the same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training import data


class Pictures:
    """What was read, by file and size. `size` x `size` x 3 bytes a picture, plus the mask's."""

    def __init__(self, threads: int = 2) -> None:
        self._threads = threads
        self._images: dict[tuple[Path, int], NDArray[np.uint8]] = {}
        self._masks: dict[tuple[Path, int], NDArray[np.bool_] | None] = {}

    def images(self, samples: Sequence[data.Sample], size: int) -> NDArray[np.uint8]:
        """The pictures of `samples`, [N, size, size, 3], as `data.load_images` makes them.

        Raises:
            DatasetError: a file is missing or no picture; the message names it.
        """
        missing = {s.file: s for s in samples if (s.file, size) not in self._images}
        if missing:
            read = data.load_images(list(missing.values()), size, self._threads)
            self._images |= {(f, size): image for f, image in zip(missing, read, strict=True)}
        if not samples:
            return np.zeros((0, size, size, 3), np.uint8)
        return np.stack([self._images[sample.file, size] for sample in samples])

    def mask(self, sample: data.Sample, size: int) -> NDArray[np.bool_] | None:
        """The lesion's mask, [size, size], or None where the sample has none.

        Raises:
            DatasetError: the file is missing or no picture.
        """
        if sample.mask is None:
            return None
        key = (sample.mask, size)
        if key not in self._masks:
            self._masks[key] = data.load_mask(sample, size)
        return self._masks[key]
