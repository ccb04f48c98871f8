"""Model cards: of the bundle and no other, with what was missed and what is not known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deploy.cards import OWN, CardError, cards, main
from dermaflux.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
HOSPITAL = ROOT / "docs/hospital"
EVALUATION = ROOT / "docs/classifier.md"


@pytest.fixture
def reports(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """Reports of the tiny bundle's weights, if it had any."""
    spec = tiny_bundle.classifier
    assert spec is not None
    for name in ("report.json", "classifier/report.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "models/mini" / name, tmp_path / name)
    file = tmp_path / "classifier/report.json"
    report = json.loads(file.read_text())
    report["calibration"] |= {
        "temperature": spec.temperature,
        "threshold": spec.threshold,
        "abstain": list(spec.abstain),
    }
    file.write_text(json.dumps(report))
    return tmp_path


def test_every_model_has_a_card_with_use_limits_and_figures(
    tiny_bundle: Bundle, reports: Path
) -> None:
    made = cards(tiny_bundle, reports, None)
    assert set(made) == {"generator-card.md", "classifier-card.md"}
    for text in made.values():
        for title in ("## For what", "## Not for", "## Risks", "## Made of", "## How well", OWN):
            assert title in text
        assert "Not a medical device" in text
        assert tiny_bundle.id in text
        assert "skin" in text.partition("## How well")[2]
    assert "**missed**" in made["generator-card.md"]
    assert "there is no evaluation by subgroup" in made["classifier-card.md"]


def test_what_has_no_report_is_told(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for text in cards(tiny_bundle, tmp_path, None).values():
        assert "Not known: its checkpoint has no report." in text


def test_reports_of_other_weights_are_refused(tiny_bundle: Bundle, reports: Path) -> None:
    shutil.copy(ROOT / "models/mini/classifier/report.json", reports / "classifier")
    with pytest.raises(CardError, match="of other weights"):
        cards(tiny_bundle, reports, None)


def test_evaluations_of_other_weights_are_refused(
    tiny_bundle: Bundle, reports: Path, tmp_path: Path
) -> None:
    spec = tiny_bundle.classifier
    assert spec is not None
    other = tmp_path / "other.md"
    other.write_text("threshold 0.987654\n\n## Subgroups\n\n| a |\n|---|\n")
    with pytest.raises(CardError, match="threshold"):
        cards(tiny_bundle, reports, other)
    other.write_text(f"threshold {spec.threshold:g}\n")
    with pytest.raises(CardError, match="no section"):
        cards(tiny_bundle, reports, other)
    other.write_text(f"threshold {spec.threshold:g}\n\n## Subgroups\n\n| old |\n|---|\n\nmore\n")
    text = cards(tiny_bundle, reports, other)["classifier-card.md"]
    assert "| old |" in text
    assert "more" not in text


def test_what_is_committed_is_of_the_weights_here() -> None:
    """All but what an export measured; compared with the reports in the checkpoint."""
    report = json.loads((ROOT / "models/mini/classifier/report.json").read_text())
    text = (HOSPITAL / "classifier-card.md").read_text()
    assert f"Threshold {report['calibration']['threshold']:g}:" in text
    for one in report["test"].values():
        assert f"| {one['whole']['auc']:.2f} (" in text
    subgroups = EVALUATION.read_text().partition("## Subgroups\n")[2].strip().splitlines()
    assert {line for line in subgroups if line.startswith("|")} <= set(text.splitlines())
    drawn = (HOSPITAL / "generator-card.md").read_text()
    figures = json.loads((ROOT / "models/mini/report.json").read_text())["figures"]
    assert all(f"| {one['what']} |" in drawn for one in figures)
    assert drawn.count("**missed**") == sum(one["met"] is False for one in figures)


def test_the_command(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_bundle.path), "--reports", str(tmp_path), "--out", str(tmp_path / "cards")]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [
        "classifier-card.md",
        "generator-card.md",
    ]
    assert (tmp_path / "cards/generator-card.md").is_file()
