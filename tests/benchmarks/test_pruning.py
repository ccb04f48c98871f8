"""Merging measured on a tiny classifier: the whole beside itself is no change."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from benchmarks.pruning import main
from tests.export.test_pruned import deeper


def test_every_share_is_beside_the_whole(tiny_checkpoint, tmp_path, capsys):
    checkpoint = deeper(tiny_checkpoint, tmp_path / "vit", "vit_tiny_patch16_224")
    data = tmp_path / "lesions"
    (data / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    rows = []
    for number in range(12):
        pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(data / f"images/{number}.png")
        label = "malignant" if number % 3 else "benign"
        rows.append({"file_name": f"images/{number}.png", "label": label, "split": "test",
                     "group": str(number), "source": "none", "licence": "CC0-1.0",
                     "attribution": "nobody"})  # fmt: skip
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(checkpoint), "--data", str(data), "--shares", "0.7,0.5", "--rounds", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out.json")]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == json.loads((tmp_path / "out.json").read_text())
    assert list(told["shares"]) == ["1", "0.7", "0.5"]
    whole = told["shares"]["1"]["photographs"]["lesions"]
    assert (whole["auc_change"], whole["labels_changed"]) == (0, 0)
    for share in ("0.7", "0.5"):
        row = told["shares"][share]
        assert row["work"] <= float(share)
        assert row["merged"] > 0
        assert row["photographs"]["lesions"]["probability_change_most"] > 0
    assert main([*arguments[:3], "--shares", "much"]) == 2
    assert "--shares needs numbers" in capsys.readouterr().err
