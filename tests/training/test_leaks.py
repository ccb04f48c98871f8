from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermaflux.errors import DatasetError
from dermaflux.prompt import Lesion
from training import leaks
from training.data import Sample


def sample(folder: Path, name: str, split: str, group: str, seed: int) -> Sample:
    """A mottled picture; those of one seed are the same."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
    image.convert("RGB").save(folder / name)
    return Sample(folder / name, Lesion("benign"), split, group, "clinic", "CC0-1.0", name=name)


def test_all_of_a_leaked_lesion_is_left_out_of_training(tmp_path: Path) -> None:
    samples = [
        sample(tmp_path, "test.png", "test", "test.png", 0),
        sample(tmp_path, "copy.png", "train", "lesion 1", 0),
        sample(tmp_path, "beside.png", "val", "lesion 1", 1),
        replace(sample(tmp_path, "far.png", "train", "lesion 1", 2), source="elsewhere"),
        sample(tmp_path, "other.png", "train", "other.png", 3),
    ]
    with pytest.raises(DatasetError, match="1 of 1 test pictures were seen"):
        leaks.apart(samples, False)
    kept = [one.file.name for one in leaks.apart(samples, True)]
    assert kept == ["test.png", "far.png", "other.png"]


def test_a_file_name_is_no_lesion(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, two = (sample(tmp_path / name, "1.png", "train", "1.png", 0) for name in ("a", "b"))
    assert leaks.kin([one, two], {str(one.file)}) == {str(one.file)}
    assert leaks.kin([one, two], set()) == set()
