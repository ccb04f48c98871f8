"""The figures of the watermark: that they are measured, summed up and gone on with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.watermark import main
from benchmarks.watermark_figures import Alarms, marked, pieces, survival
from benchmarks.watermark_shortcut import learnt, told_apart
from dermaflux import dataset
from dermaflux.bundle import Bundle
from dermaflux.marks.watermark import Watermark
from tests.core.test_marks_watermark import picture

PICTURES = [picture(128, 128, seed) for seed in range(4)]


def test_marks_are_counted_and_unmarked_pictures_are_not() -> None:
    after, told = marked(PICTURES)
    assert told["pictures"] == 4
    assert 40 <= told["psnr_db"]["worst"] <= told["psnr_db"]["median"] <= 47
    assert survival(after)["JPEG 50"]["present"] == 1.0
    assert pieces(after)["90% of each side"] == 1.0
    before = survival(PICTURES)
    assert {one["present"] for one in before.values()} == {0.0}


def test_parts_of_alarms_add_up() -> None:
    whole = Alarms.of(PICTURES, keys=5, cut=2)
    first, second = Alarms.of(PICTURES[:2], 5, cut=2), Alarms.of(PICTURES[2:], 5, cut=0)
    told = (first + second).told()
    assert told == whole.told()
    assert (told["pictures"], told["pieces"], told["alarms"]) == (4, 2, 0)
    assert told["scores_under_other_keys"]["scores"] == 20
    assert Alarms.of(marked(PICTURES[:1])[0], 1, cut=0).told()["alarms"] == 1


def test_a_shortcut_is_seen_where_there_is_one() -> None:
    plain = np.stack([picture(64, 64, seed) for seed in range(48)])
    loud = np.clip(plain + 40.0, 0, 255).astype(np.uint8)
    test = np.arange(48) % 3 == 0
    malignant = np.arange(48) % 2 == 0
    found = told_apart(plain, loud, test, epochs=1)
    assert found["linear, on pixels"] > 0.9
    told = learnt(plain, loud, malignant, test, epochs=1)
    shift = {arm: told[arm]["linear, on pixels"]["shift"] for arm in told}
    assert shift["half of the malignant"] > 3 * abs(shift["no picture"])


def test_the_command_goes_on_where_it_stopped(tiny_bundle: Bundle, tmp_path: Path, capsys) -> None:
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    records = []
    for number in range(8):
        name = f"images/{number}.png"
        Image.fromarray(picture(128, 128, number)).save(data / name)
        label = "malignant" if number // 2 % 2 else "benign"
        split = "test" if number % 2 else "train"
        records.append(dataset.Record(name, label, split=split, group=name))
    dataset.write(data, records)
    out = tmp_path / "result.json"
    command = ["--data", str(data), f"--bundle={tiny_bundle.path}", f"--out={out}"]
    command += ["--pictures=1", "--cut=1", "--keys=2", "--epochs=1"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(out.read_text()) == found
    assert found["unmarked real"]["pictures"] == 8
    told = {"told_apart_auc", "told_apart_auc_with_a_key_a_picture", "learnt"}
    assert set(found["shortcut"]) == {"pictures", "bundles_classifier"} | told
    # Stopped before its last part, it takes the others as they are.
    asked = found["asked"]
    left = {"asked": asked, "drawn": {"kept": True}} | {
        name: {} for name in ("shortcut", "unmarked drawn", "speed")
    }
    cut = asdict(Alarms.of(PICTURES[:1], 2, cut=1))
    left |= {"unmarked real, cut": cut}
    left |= {f"real, {side} px": {} for side in (128, 256, 512)}
    out.write_text(json.dumps(left))
    assert main(command) == 0
    again = json.loads(out.read_text())
    assert again["drawn"] == {"kept": True}
    assert again["unmarked real"] == found["unmarked real"]
    out.write_text(json.dumps(left | {"asked": asked | {"keys": 3}}))
    assert main(command) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--pictures=0", "--unmarked=0", "--epochs=-1"])
def test_counts_out_of_range_are_refused(option: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--data", "none", option])
    assert option.split("=")[0] in capsys.readouterr().err


def test_the_key_of_the_benchmark_is_not_a_sites() -> None:
    assert not Watermark(b"a site's").find(marked(PICTURES[:1])[0][0]).present
