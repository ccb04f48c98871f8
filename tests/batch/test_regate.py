from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermaflux import dataset
from dermaflux.dataset import Record
from serving.batch.regate import main


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    folder = tmp_path / "drawn"
    records = []
    for number in range(6):
        name = f"images/0000/{number:07d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / name)
        measured = {"probability": 0.05 + number / 10, "decision": "benign", "found": number != 5,
                    "size": "small", "shares": {}}  # fmt: skip
        label = ("benign", "malignant")[number % 2]
        records.append(Record(file_name=name, label=label, more={"measured": measured}))
    (folder / "manifest.json").write_text(json.dumps({"job": {"gate": None}, "ingredients": [1]}))
    dataset.write(folder, records)
    return folder


def test_recorded_numbers_are_judged_anew(drawn: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "g.yaml").write_text("agreement: 0.2\nattributes: [lesion]\n")
    out = tmp_path / "out"
    assert main([str(drawn), "--gate", str(tmp_path / "g.yaml"), "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    # Malignant 1 has a probability of 0.1, and 5 shows no lesion.
    assert found["kept_by_label"] == {"benign": 3, "malignant": 1}
    assert found["rejected_by_label"] == {"malignant": 2}
    records = dataset.read(out)
    assert [one.file_name[-5] for one in records] == ["0", "2", "3", "4"]
    assert all((out / one.file_name).read_bytes() == (drawn / one.file_name).read_bytes()
               for one in records)  # fmt: skip
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["job"]["gate"]["agreement"] == 0.2
    assert manifest["regated_from"] == {"folder": "drawn", "gate": None}
    assert manifest["ingredients"] == [1]


def test_what_cannot_be_judged_is_refused(drawn: Path, tmp_path: Path, capsys) -> None:
    gate = tmp_path / "g.yaml"
    records = dataset.read(drawn)
    gate.write_text("agreement: 0.99\n")
    arguments = [str(drawn), "--gate", str(gate), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "nothing passes" in capsys.readouterr().err
    gate.write_text("agreement: 0.0\n")
    dataset.write(drawn, [Record(file_name=one.file_name, label=one.label) for one in records])
    assert main(arguments) == 2
    assert "probability was not measured" in capsys.readouterr().err
    broken = {"probability": 0.5, "decision": "benign", "found": True, "shares": None}
    dataset.write(drawn, [replace(one, more={"measured": broken}) for one in records])
    assert main(arguments) == 2
    assert "shares was not measured (it is None)" in capsys.readouterr().err
    (drawn / "manifest.json").unlink()
    assert main(arguments) == 2
    assert "manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([str(drawn), "--gate", str(gate), "--out", str(drawn)]) == 2
    assert "not empty" in capsys.readouterr().err
