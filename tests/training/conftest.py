"""A small dataset of drawn blobs on skin, in the project's own layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SPLITS = ("train",) * 8 + ("val",) * 6 + ("test",) * 6


def _blob(radius: float, shade: int, seed: int, side: int = 128) -> Image.Image:
    """A disc on skin, both mottled, so that no two are one picture."""
    rows, columns = np.mgrid[:side, :side]
    inside = np.hypot(rows - side / 2, columns - side / 2) < radius
    pixels = np.full((side, side, 3), (226, 188, 168), dtype=np.float64)
    pixels[inside] = (shade, shade // 2, shade // 3)
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8)
    mottled = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    pixels += (mottled[..., None].astype(np.float64) - 128) / 2
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    rows = []
    for number, split in enumerate(SPLITS):
        malignant = number % 2 == 1
        name = f"{number:03}.png"
        _blob(40 if malignant else 16, 60 if malignant else 140, number).save(folder / name)
        rows.append(
            {
                "file_name": name,
                "label": "malignant" if malignant else "benign",
                "size": "large" if malignant else "small",
                "colors": ["dark brown"],
                "split": split,
                "group": name,
                "source": "drawn",
                "licence": "CC0-1.0",
            }
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines)
    return folder
