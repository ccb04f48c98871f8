from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermaflux import attributes
from training import data, measure

HEADER = (
    "image,mask,label,diagnosis,split,group,asymmetry_word,border_word,color_words,size_word,"
    "source,license\n"
)
WORDS = "symmetric,regular border,dark brown,medium in the field"


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve dark discs of growing size in wandering places, with their masks."""
    folder = tmp_path_factory.mktemp("masked")
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:128, :128]
    lines = [HEADER]
    for number in range(12):
        row, column = random.uniform(52, 76, 2)
        mask = np.hypot(rows - row, columns - column) < 28 + number
        pixels = np.where(mask[..., None], (92, 55, 40), (226, 188, 168))
        pixels = np.clip(pixels + random.normal(0, 4, pixels.shape), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{number}_mask.png")
        split = "train" if number < 6 else "test"
        lines.append(
            f"{number}.png,{number}_mask.png,benign,nevus,{split},{number},{WORDS},drawn,CC0-1.0\n"
        )
    (folder / "metadata.csv").write_text("".join(lines))
    return folder


def test_the_command(masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "measures.json"
    assert measure.main(["--data", str(masked), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["pictures"] == 6
    assert result["dice"]["mean"] > 0.9
    assert result["dice"]["nothing_found"] == 0
    assert result["segmented_against_masks"]["rank_correlation"]["diameter"] > 0.9
    told = result["masks_against_dataset_words"]["words"]
    assert told == dict.fromkeys(("size", "asymmetry", "border", "colors", "colors_all"), 1.0)


def test_words_that_the_dataset_got_wrong_are_seen(masked: Path, tmp_path: Path) -> None:
    for file in masked.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    table = (
        (masked / "metadata.csv").read_text().replace("medium in the field", "small in the field")
    )
    (tmp_path / "metadata.csv").write_text(table)
    words = measure.run(measure.Measure(tmp_path))["masks_against_dataset_words"]["words"]
    assert words["size"] == 0
    assert words["colors"] == 1


def test_models_are_fitted_to_masks(masked: Path) -> None:
    result = measure.run(measure.Measure(masked, split="train", fit=True))
    assert len(result["first"]) == len(attributes.FIRST)
    assert len(result["second"]) == len(attributes.SECOND)
    sample = data.read(masked, "test")[0]
    view = attributes.look(data.load_images([sample], 128)[0])
    chance = attributes.probability(attributes.first_features(view), result["first"])
    chance = attributes.probability(attributes.second_features(view, chance), result["second"])
    mask = data.load_mask(sample, attributes.SIDE)
    assert mask is not None
    assert attributes.dice(attributes.region(view, chance), mask) > 0.9
    kept = [step["lesions_kept"] for step in result["certainty"]]
    assert kept == sorted(kept, reverse=True)


def test_bare_skin_is_clear_of_the_lesion() -> None:
    image = np.zeros((100, 100, 3), dtype=np.uint8)
    for turns in range(4):
        mask = np.zeros((100, 100), dtype=bool)
        mask[60:90, 20:80] = True
        mask = np.rot90(mask, turns)
        marked = image.copy()
        marked[mask] = 255
        square = measure.bare_skin(marked, mask)
        assert square is not None
        assert square.shape == (57, 57, 3)
        assert not square.any()
    assert measure.bare_skin(image, np.ones((100, 100), dtype=bool)) is None
    assert measure.bare_skin(image, np.zeros((100, 100), dtype=bool)) is None


def test_rank_correlation() -> None:
    assert measure.rank_correlation([(1, 1), (2, 4), (3, 9)]) == pytest.approx(1)
    assert measure.rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)
    assert measure.rank_correlation([(1, 3), (1, 2)]) is None
    assert measure.rank_correlation([]) is None


def test_a_dataset_without_masks(dataset: Path) -> None:
    with pytest.raises(data.DatasetError, match="no masks in split 'test'"):
        measure.run(measure.Measure(dataset))
    assert measure.main(["--data", str(dataset)]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "31"], "use 32 to 1024"),
        (["--size", "1025"], "use 32 to 1024"),
        (["--out", "{folder}"], "cannot be written"),
        (["--out", "{folder}/none/x.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_measured_or_kept_is_refused_before(
    masked: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(measure, "run", lambda _: pytest.fail("measured"))
    arguments = ["--data", str(masked), *(o.format(folder=masked) for o in options)]
    assert measure.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_fit_to_empty_masks_is_refused() -> None:
    images = np.zeros((2, 64, 64, 3), np.uint8)
    with pytest.raises(data.DatasetError, match="masks are all empty"):
        measure.fit(images, [np.zeros((64, 64), bool)] * 2)
