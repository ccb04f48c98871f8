"""Recompute a classifier's report from its raw scores, and compare.

    python -m training.metrics models/mini/classifier/scores.csv

prints every figure as a table, and as its last line a JSON object with the figures and what differs
from the `report.json` beside the table, whose calibration and bootstrap draws are used. The status
is 1 where they differ, or where the table's own decisions are not those of its probabilities.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dermaflux.command import ended, option, parsed
from dermaflux.errors import DatasetError
from training import bootstrap, evaluation
from training.figures import Figure, table
from training.raw_scores import RawScores, decisions, probabilities

_ROUNDING: Final = 1.5e-4  # figures have four digits; the last may turn on another processor
_NEEDED: Final = ("temperature", "threshold", "abstain", "shift")


@dataclass(frozen=True)
class Settings:
    """What the command takes."""

    scores: Path = option("the scores.csv that python -m training.vit wrote")
    report: Path | None = option(
        "the report with the calibration (default: report.json beside)", None
    )
    draws: int | None = option(
        f"bootstrap draws of an interval (default: the report's own, else {bootstrap.DRAWS})", None
    )


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parsed(Settings, "python -m training.metrics", __doc__ or "", arguments)
    return ended(lambda: _work(settings))


def _work(settings: Settings) -> int:
    file = settings.report or settings.scores.parent / "report.json"
    raw = RawScores.read(settings.scores)
    calibration, stated, made_with = opened(file)
    draws = made_with if settings.draws is None else settings.draws
    if draws < 2:
        raise DatasetError(f"--draws {draws} give no interval; give 2 or more")
    found = evaluation.figures(raw, calibration, draws)
    different = [*inconsistent(raw, calibration), *differing(stated, found)]
    print(tables(found))
    for one in different:
        print(f"differs: {one}", file=sys.stderr)
    result = {"scores": str(settings.scores), "report": str(file), "pictures": len(raw),
              "equal": not different, "differs": different, "test": found}  # fmt: skip
    print(json.dumps(result, allow_nan=False))
    return 1 if different else 0


def opened(file: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The calibration and the test figures of a `report.json`, and the draws of its intervals.

    Those are in the settings of `training.evaluate`; `training.vit` has the default alone.

    Raises:
        DatasetError: it is none.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        calibration, stated = document["calibration"], document["test"]
        draws = int((document.get("settings") or {}).get("draws", bootstrap.DRAWS))
        missing = [name for name in _NEEDED if name not in calibration]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{file} is no report of a classifier ({type(error).__name__}: {error}); name the "
            "report.json that was written with the scores: --report FILE"
        ) from error
    if missing:
        raise DatasetError(f"{file} has no calibration: there is no {', '.join(missing)}")
    return calibration, stated, draws


def inconsistent(raw: RawScores, calibration: Mapping[str, Any]) -> Iterator[str]:
    """What of the table does not follow from its own logits, in words."""
    p = probabilities(raw.logits, calibration["temperature"])
    if wrong := int((~np.isclose(p, raw.probability, rtol=1e-9, equal_nan=True)).sum()):
        yield f"{wrong} probabilities are not those of their logits at the report's temperature"
    if wrong := int((decisions(raw.probability, calibration) != raw.decision).sum()):
        yield f"{wrong} decisions are not those of the report's threshold and band"


def differing(stated: Any, found: Any, where: str = "test") -> Iterator[str]:
    """Where two documents differ by more than the last digit, with both values."""
    if isinstance(stated, Mapping) and isinstance(found, Mapping):
        for name in sorted({*stated, *found}, key=str):
            if name not in stated or name not in found:
                yield f"{where}.{name}: {'only recomputed' if name in found else 'only stated'}"
            else:
                yield from differing(stated[name], found[name], f"{where}.{name}")
    elif isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        for number, pair in enumerate(zip(stated, found, strict=True)):
            yield from differing(*pair, f"{where}[{number}]")
    elif _number(stated) and _number(found):
        if not abs(stated - found) <= _ROUNDING:
            yield f"{where}: {stated} stated, {found} recomputed"
    elif stated != found:
        yield f"{where}: {stated!r} stated, {found!r} recomputed"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def tables(found: Mapping[str, Any]) -> str:
    """The figures as Markdown: a heading a source, a table for each set of its pictures."""
    text = ""
    controls = evaluation.CONTROLS
    for source, one in found.items():
        text += f"# {source}\n\n"
        for name in ("whole", "histology", *controls, *(f"histology_{c}" for c in controls)):
            if name in one:
                text += f"## {name.replace('_', ' ')}\n\n{table(_block_lines(one[name]))}\n"
    return text


def _block_lines(block: Mapping[str, Any]) -> list[Figure]:
    first = {"value": block["auc"], "interval": block["interval"], "note": block.get("note", "")}
    counts = {"malignant": block["malignant"], "lesions or patients": block["groups"]}
    entries = {"AUC": first, **block["metrics"]}
    if "model_above_it" in block:
        entries["the model's AUC above it"] = block["model_above_it"]
    sets = block.get("conformal", {})
    entries |= {f"conformal {key}": value for key, value in sets.items() if key != "alpha"}
    found = [
        _line(name, entry, block["images"], counts if entry is first else {})
        for name, entry in entries.items()
    ]
    for attribute, values in block.get("subgroups", {}).items():
        for value, group in values.items():
            beside = {"malignant": group["malignant"]}
            for key in ("sensitivity", "specificity", "abstained"):
                if key in group:
                    beside[key] = group[key]["value"]
            entry = group.get("auc", {"value": None, "interval": None, "note": group.get("note")})
            found.append(_line(f"{attribute} {value}: AUC", entry, group["images"], beside))
    return found


def _line(what: str, entry: Mapping[str, Any], n: int, beside: Mapping[str, Any]) -> Figure:
    span = entry["interval"]
    return Figure(
        key=what,
        what=what.replace("_95_", " 95 % ").replace("_", " "),
        value=entry["value"],
        n=n,
        interval=None if span is None else (span[0], span[1]),
        beside=dict(beside),
        note=entry.get("note") or "",
    )
