"""Model cards of a bundle, as Markdown: what it is for and not for, of what, how well, for whom.

    python -m deploy.cards bundles/mini                               # docs/hospital/*-card.md
    python -m deploy.cards bundles/lesions --reports checkpoints/lesions \\
        --evaluation runs/evaluate/lesions.md --out cards

Intended use and limits are those of the bill of models (`serving.inventory.models`), so the two
cannot differ. Figures come from the reports that trainings leave in a checkpoint (`report.json`),
subgroups from the section "Subgroups" of an evaluation. A report of other weights is refused: its
threshold, temperature and band have to be those of the bundle. What a checkpoint has no report of,
the card says is not known. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dermaflux import files
from dermaflux.bundle import Bundle
from dermaflux.command import ended, option, parsed
from dermaflux.errors import DermaFluxError
from dermaflux.policy import stated
from dermaflux.rules import CLASSIFIER, GENERATOR
from serving.inventory.models import models

OWN: Final = "## This bundle"
"""Where begins what another export of the same weights has otherwise."""
NOT_FOR: Final = {
    GENERATOR: (
        "no picture to diagnose by, to teach diagnosis with, or to show as a patient's",
        "to train classifiers with only beside real pictures, measured on real ones",
    ),
    CLASSIFIER: (
        "no diagnosis, no triage, no use on patients; it is no medical device",
        "no photographs of other things than one lesion in the middle, and none of the small, "
        "blurred or dark kind that its gate is there to refuse",
    ),
}
SKIN: Final = (
    "**Skin tone.** There are no figures by skin tone: of skin other than that of the test "
    "pictures nothing is known."
)
_TABLE: Final = re.compile(r"^\|.*\|$")


class CardError(DermaFluxError):
    """A report or an evaluation is not of the weights in the bundle, or cannot be read."""


@dataclass(frozen=True)
class Settings:
    """What the command takes."""

    bundle: Path = option("the bundle")
    reports: Path = option("the checkpoint, for its reports", Path("models/mini"))
    evaluation: Path | None = option(
        "Markdown with a section Subgroups", Path("docs/classifier.md")
    )
    out: Path = option("folder", Path("docs/hospital"))


def cards(bundle: Bundle, reports: Path, evaluation: Path | None) -> dict[str, str]:
    """The cards of a bundle by file name.

    Raises:
        CardError: reports of other weights.
    """
    bill = {
        str(one["bom-ref"]).rpartition("/")[2]: one
        for one in models(bundle)["components"]
        if str(one["bom-ref"]).startswith("model:")
    }
    made = {}
    for part in bill:
        lines = [*_head(bundle, part, bill[part]), *_made_of(bundle, part)]
        if part == GENERATOR:
            lines += _drawn(bundle, reports / "report.json")
        else:
            lines += _judged(bundle, reports / CLASSIFIER / "report.json", evaluation)
        made[f"{part}-card.md"] = "\n".join([*lines, *_own(bundle, bill[part])]) + "\n"
    return made


def _head(bundle: Bundle, part: str, model: dict[str, Any]) -> Iterator[str]:
    told = model["modelCard"]
    considered, parameters = told["considerations"], told["modelParameters"]
    yield f"# Model card: the {part} of {bundle.name}"
    yield ""
    yield "Made by `python -m deploy.cards` (`deploy/cards.py`, `tests/deploy/test_cards.py`)."
    yield "**Research use only. Not a medical device.**"
    yield ""
    yield "## For what"
    yield ""
    yield f"It {considered['useCases'][0]}. For {considered['users'][0]}."
    yield ""
    for side in ("inputs", "outputs"):
        yield f"- {side}: {', '.join(one['format'] for one in parameters[side])}"
    yield ""
    yield "## Not for"
    yield ""
    for text in (*NOT_FOR[part], *considered["technicalLimitations"]):
        yield f"- {text}"
    yield ""
    yield "## Risks"
    yield ""
    for one in considered["ethicalConsiderations"]:
        yield f"- {one['name']}: {one['mitigationStrategy']}"
    yield ""


def _made_of(bundle: Bundle, part: str) -> Iterator[str]:
    yield "## Made of"
    yield ""
    yield "| what | kind | licence | whom to name |"
    yield "|---|---|---|---|"
    for one in stated(bundle.provenance, bundle.licences):
        if one.component == part:
            given = one.ingredient
            cells = (given.name, given.kind, given.licence or "unknown", given.attribution)
            yield f"| {' | '.join(cell or '-' for cell in cells)} |"
    yield ""


def _drawn(bundle: Bundle, file: Path) -> Iterator[str]:
    yield "## How well"
    yield ""
    report = _read(file)
    if report is None:
        yield "Not known: its checkpoint has no report."
        yield ""
        return
    yield "| figure | value (95 % interval) | of | goal |"
    yield "|---|---|---|---|"
    for one in report["figures"]:
        goal = one["goal"] or "-"
        if one["met"] is not None:
            goal += ", met" if one["met"] else ", **missed**"
        yield f"| {one['what']} | {_value(one['value'], one['interval'])} | {one['n']} | {goal} |"
    yield ""
    yield (
        "**Subgroups.** Sex, age and skin tone are not asked for, and what is drawn is not "
        "measured by them: it draws skin as its training pictures show it."
    )
    yield ""


def _judged(bundle: Bundle, file: Path, evaluation: Path | None) -> Iterator[str]:
    spec = bundle.classifier
    assert spec is not None, "asked for where there is one"
    yield "## How well"
    yield ""
    report = _read(file)
    if report is None:
        yield "Not known: its checkpoint has no report."
        yield ""
        return
    calibration = report["calibration"]
    there = (calibration["temperature"], calibration["threshold"], tuple(calibration["abstain"]))
    here = (spec.temperature, spec.threshold, tuple(spec.abstain))
    if there != here:
        raise CardError(
            f"{file} is of other weights: temperature, threshold and band are {there}, in the "
            f"bundle {here}; name the checkpoint that was exported with --reports"
        )
    yield (
        f"Threshold {spec.threshold:g}: from there on it says {spec.classes[1]}. Between "
        f"{spec.abstain[0]:g} and {spec.abstain[1]:g} it abstains."
    )
    yield ""
    yield "| test pictures of | AUC (95 % interval) | sensitivity | specificity | answered | of |"
    yield "|---|---|---|---|---|---|"
    for source, one in report["test"].items():
        whole = one["whole"]
        cells = [f"{one[name]:.2f}" for name in ("sensitivity", "specificity", "answered")]
        auc = _value(whole["auc"], whole["interval"])
        yield f"| {source} | {auc} | {' | '.join(cells)} | {whole['images']} |"
        if "histology" in one:
            inner = one["histology"]
            auc = _value(inner["auc"], inner["interval"])
            yield f"| of these, histology-confirmed | {auc} | - | - | - | {inner['images']} |"
    yield ""
    yield from _subgroups(spec.threshold, evaluation)
    yield SKIN
    yield ""


def _subgroups(threshold: float, evaluation: Path | None) -> Iterator[str]:
    yield "## For whom how well"
    yield ""
    if evaluation is None:
        yield "Not known: there is no evaluation by subgroup."
        yield ""
        return
    text = evaluation.read_text("utf-8")
    if f"{threshold:g}" not in text:
        raise CardError(f"{evaluation} does not name the bundle's threshold, {threshold:g}")
    section = text.partition("## Subgroups\n")[2].partition("\n## ")[0]
    lines = section.strip().splitlines()
    if not any(map(_TABLE.fullmatch, lines)):
        raise CardError(f"{evaluation} has no section Subgroups with a table")
    last = max(number for number, line in enumerate(lines) if _TABLE.fullmatch(line))
    yield from lines[: last + 1]
    yield ""


def _own(bundle: Bundle, model: dict[str, Any]) -> Iterator[str]:
    yield OWN
    yield ""
    yield f"`{bundle.id}`, made by {bundle.made_by}, {bundle.created}."
    yield ""
    yield "| figure of the export | value | of |"
    yield "|---|---|---|"
    for one in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]:
        yield f"| {one['type']} | {one['value']} | {one['slice']} |"


def _value(value: float, interval: Sequence[float] | None) -> str:
    if interval is None:
        return f"{value:.3g}"
    return f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CardError(f"{file} is no report: {error}") from None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the cards."""
    settings = parsed(Settings, "python -m deploy.cards", "Model cards of a bundle.", arguments)

    def work() -> None:
        made = cards(Bundle.open(settings.bundle), settings.reports, settings.evaluation)
        settings.out.mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            files.write(settings.out / name, text.encode())
        print(json.dumps({"out": str(settings.out), "files": sorted(made)}))

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
