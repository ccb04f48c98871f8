"""All figures of a classifier from its raw scores: what `report.json` holds under `test`.

Nothing here needs the model or a picture, so that whoever has `scores.csv` can redo every number:

    >>> figures(RawScores.read(Path("scores.csv")), calibration)["ISIC 2017"]["whole"]["auc"]
    0.8612

Each source stands for itself. Where a source says how its labels are known, all figures are given
for the histology-confirmed pictures as well, and all beside two controls that tell lesion from
camera: a score of the border alone, and one of pictures whose lesion is painted over. A figure that
cannot be measured is None and says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from training import bootstrap, conformal, metrics, subgroups
from training.figures import Floats
from training.raw_scores import RawScores, probabilities
from training.roc import Labels

CONTROLS: Final = ("border_only", "lesion_masked")
CONFIRMED: Final = "histo"
_RANKING: Final = ("auc", "pauc", "sensitivity_at_95_specificity", "specificity_at_95_sensitivity")


def figures(
    raw: RawScores, calibration: Mapping[str, Any], draws: int = bootstrap.DRAWS
) -> dict[str, Any]:
    """The figures of each source's test pictures, by source; rows of other splits do not count."""
    raw = raw.where(raw.split == "test")
    return {
        source: _source(raw.where(raw.source == source), calibration, draws)
        for source in np.unique(raw.source).tolist()
    }


def _source(raw: RawScores, calibration: Mapping[str, Any], draws: int) -> dict[str, Any]:
    labels, p = raw.label, raw.probability
    known = bool(np.isfinite(p).all())
    called = p >= calibration["threshold"]
    before = probabilities(raw.logits - [0, calibration["shift"]], 1.0)
    found: dict[str, Any] = {
        "whole": _block(raw, calibration, draws),
        "sensitivity": share(called[labels == 1]) if known else None,
        "specificity": share(~called[labels == 0]) if known else None,
        "answered": share(raw.decision != "abstain") if known else None,
        "calibration_error_uncalibrated": _once(metrics.calibration_error(before, labels)),
        "calibration_error": _once(metrics.calibration_error(p, labels)),
    }
    subsets = {"": raw}
    if np.any(raw.confirmed != ""):
        subsets["histology_"] = raw.where(raw.confirmed == CONFIRMED)
        found["histology"] = _block(subsets["histology_"], calibration, draws)
    for prefix, chosen in subsets.items():
        for control in CONTROLS:
            usable = chosen.where(~np.isnan(getattr(chosen, control)))
            score = getattr(usable, control)
            found[prefix + control] = ranked(score, usable.label, usable.group, draws)
            found[prefix + control] |= _margin(usable, control, draws)
    return found


def ranked(
    scores: Floats, labels: Labels, groups: NDArray[Any], draws: int = bootstrap.DRAWS
) -> dict[str, Any]:
    """Counts, AUC with its interval, and under `metrics` what else a ranking gives."""
    found = _counted(labels, groups)
    if note := unranked(scores, labels):
        rest = bootstrap.nothing(_RANKING[1:], note)
        return {"auc": None, "interval": None, **found, "note": note, "metrics": rest}
    entries = bootstrap.measured(lambda w: metrics.ranking(scores, labels, w), groups, draws)
    return _headed(entries, found)


def unranked(scores: Floats, labels: Labels) -> str:
    """Why scores have no AUC; empty where they have one."""
    if not len(scores):
        return "no images"
    if bad := int((~np.isfinite(scores)).sum()):
        return f"{bad} of {len(scores)} scores are no numbers"
    if len(np.unique(labels)) < 2:
        return "images of one class only: no AUC"
    if np.ptp(scores) == 0:
        return "all scores are equal: they rank nothing"
    return ""


def _block(raw: RawScores, calibration: Mapping[str, Any], draws: int) -> dict[str, Any]:
    """Every figure of these pictures."""
    labels, p = raw.label, raw.probability
    found = _counted(labels, raw.group)
    note = unranked(p, labels)
    if not len(raw) or not np.isfinite(p).all():
        return {"auc": None, "interval": None, **found, "note": note, "metrics": {}}
    called = p >= calibration["threshold"]
    answered = (raw.decision != "abstain").astype(np.float64)
    fitted = calibration.get("conformal")
    inside = None if fitted is None else conformal.sets(p, fitted)

    def statistics(weights: Floats | None) -> dict[str, Floats]:
        some = answered[None] if weights is None else weights * answered
        given = {} if note else metrics.ranking(p, labels, weights)
        given |= metrics.decided(called, labels, weights)
        given |= metrics.expected(p, labels, weights)
        given |= {
            "answered": metrics.mean(answered, weights),
            "sensitivity_answered": metrics.sensitivity(called, labels, some),
            "specificity_answered": metrics.specificity(called, labels, some),
        }
        return given if inside is None else given | conformal.figures(inside, labels, weights)

    entries = bootstrap.measured(statistics, raw.group, draws)
    if note:
        entries = bootstrap.nothing(_RANKING, note) | entries
    sets = {name: entries.pop(name) for name in conformal.NAMES if name in entries}
    headed = _headed(entries, found)
    if fitted is not None:
        headed["conformal"] = {"alpha": fitted["alpha"], **sets}
    return headed | {"subgroups": subgroups.figures(raw, calibration, draws)}


def _margin(raw: RawScores, control: str, draws: int) -> dict[str, Any]:
    """By how much the model's AUC is above the control's on the same pictures."""
    scores = getattr(raw, control)
    if unranked(scores, raw.label) or unranked(raw.probability, raw.label):
        return {}
    of = (metrics.auc, raw.probability, scores, raw.label, raw.group, draws)
    return {"model_above_it": bootstrap.difference(*of)}


def _counted(labels: Labels, groups: NDArray[Any]) -> dict[str, Any]:
    counts = {"images": len(labels), "malignant": int(labels.sum())}
    return counts | {"groups": len(np.unique(groups))}


def _headed(entries: dict[str, dict[str, Any]], counts: dict[str, Any]) -> dict[str, Any]:
    """The AUC first, on a level with the counts."""
    auc = entries.pop("auc")
    note = {"note": auc["note"]} if "note" in auc else {}
    return {"auc": auc["value"], "interval": auc["interval"], **counts, **note, "metrics": entries}


def share(chosen: NDArray[np.bool_]) -> float | None:
    """How many of [N] are true, to four digits; None of nothing."""
    return round(float(chosen.mean()), 4) if len(chosen) else None


def _once(values: Floats) -> float | None:
    return bootstrap.rounded(float(values[0])) if np.isfinite(values[0]) else None


def brief(found: Mapping[str, Any]) -> dict[str, Any]:
    """The few figures of each source that a command prints; `report.json` has them all."""
    heads = ("whole", "histology", *CONTROLS, *(f"histology_{name}" for name in CONTROLS))
    return {
        source: {
            name: {key: value[key] for key in ("auc", "interval", "images", "malignant", "note")
                   if key in value} if name in heads else value
            for name, value in one.items()
        }
        for source, one in found.items()
    }  # fmt: skip
