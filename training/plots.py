"""Pictures of a classifier's report: the ROC curve and the reliability of its probabilities.

    >>> save(folder / "plots", raw, figures, calibration)
    [PosixPath('plots/roc_isic_2017_challenge.png'), PosixPath('plots/reliability_...png')]

Two PNG files a source, 1200 pixels wide, drawn from the raw scores; their numbers are those of the
report. The colours can be told apart by people who are colour-blind (Okabe and Ito, 2008), and
curves differ by their strokes as well.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dermaflux import files
from training import metrics, roc
from training.evaluation import CONFIRMED, CONTROLS
from training.figures import Floats
from training.raw_scores import RawScores, probabilities
from training.roc import Labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE: Final = "#0072B2"
_RED: Final = "#D55E00"
_GREEN: Final = "#009E73"
_GREY: Final = "#6e6e6e"
_WIDE: Final = 6.0  # inches at 200 dots each: 1200 pixels, 11 point letters 31 pixels high
_DOTS: Final = 200
_STROKES: Final = {
    "border_only": ("border alone", _GREY, "--"),
    "lesion_masked": ("lesion painted over", _GREEN, ":"),
}
_STYLE: Final[Any] = {
    "font.size": 11, "axes.titlesize": 12, "axes.labelsize": 12, "legend.fontsize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans",
}  # fmt: skip


def save(
    folder: Path, raw: RawScores, figures: Mapping[str, Any], calibration: Mapping[str, Any]
) -> list[Path]:
    """Draw each source's test pictures of `raw` into `folder`; the files written, in order.

    `figures` are `evaluation.figures` of the same scores. A source without both classes has no ROC
    curve and gets its reliability alone. PNG files of earlier sources in `folder` are removed.

    Raises:
        OSError: the folder cannot be written.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for source, name in zip(figures, names(figures), strict=True):
        rows = raw.where((raw.source == source) & (raw.split == "test"))
        with matplotlib.rc_context(_STYLE):
            for kind, draw in (("roc", _roc), ("reliability", _reliability)):
                picture = draw(source, rows, figures[source], calibration)
                if picture is not None:
                    written.append(folder / f"{kind}_{name}.png")
                    _write(picture, written[-1])
    for kind in ("roc", "reliability"):
        for old in set(folder.glob(f"{kind}_*.png")) - set(written):
            old.unlink()
    return written


def names(sources: Iterable[str]) -> list[str]:
    """A short file name for each source, all different."""
    found: list[str] = []
    for source in sources:
        words = re.sub(r"[^a-z0-9]+", "_", re.split(r"[(,;]", source.lower())[0]).strip("_")
        name = words[:40] or "source"
        tried = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
        found.append(next(one for one in tried if one not in found))
    return found


def _roc(
    source: str, raw: RawScores, found: Mapping[str, Any], calibration: Mapping[str, Any]
) -> Figure | None:
    from matplotlib.figure import Figure

    curves = [("whole", "all pictures", raw, raw.probability, _BLUE, "-")]
    if "histology" in found:
        some = raw.where(raw.confirmed == CONFIRMED)
        said = "histology-confirmed"
        curves.append(("histology", said, some, some.probability, _RED, "-."))
    for control in CONTROLS:
        some = raw.where(~np.isnan(getattr(raw, control)))
        said, colour, stroke = _STROKES[control]
        curves.append((control, said, some, getattr(some, control), colour, stroke))
    if found["whole"]["auc"] is None:
        return None
    figure = Figure(figsize=(_WIDE, _WIDE * 1.08), dpi=_DOTS, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#bdbdbd", linewidth=0.8)
    for key, said, rows, scores, colour, stroke in curves:
        entry = found[key]
        if entry["auc"] is None:
            continue
        curve = roc.roc(scores, rows.label)
        counted = f"n = {entry['images']} ({entry['malignant']} malignant)"
        label = f"{said}: AUC {_span(entry['auc'], entry['interval'])}, {counted}"
        axes.plot(curve.fpr[0], curve.tpr[0], stroke, color=colour, linewidth=1.8, label=label)
        if key in ("whole", "histology"):
            _mark_threshold(axes, rows, calibration["threshold"], colour, key == "whole")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set_xlabel("1 - specificity: benign called malignant")
    axes.set_ylabel("sensitivity: malignant called malignant")
    axes.set_title(_title("ROC curve", source))
    axes.grid(color="#e6e6e6", linewidth=0.6)
    figure.legend(loc="outside lower left", frameon=False)
    return figure


def _mark_threshold(
    axes: Axes, rows: RawScores, threshold: float, colour: str, named: bool
) -> None:
    called = rows.probability >= threshold
    sensitivity = float(metrics.sensitivity(called, rows.label)[0])
    specificity = float(metrics.specificity(called, rows.label)[0])
    said = (
        f"threshold {threshold:.3g}: sensitivity {sensitivity:.2f}, specificity {specificity:.2f}"
    )
    marker = "o" if named else "D"
    axes.plot(
        [1 - specificity], [sensitivity], marker, color=colour, markeredgecolor="white",
        markersize=9, label=said, zorder=5, clip_on=False,
    )  # fmt: skip


def _reliability(
    source: str, raw: RawScores, found: Mapping[str, Any], calibration: Mapping[str, Any]
) -> Figure | None:
    from matplotlib.figure import Figure

    after = raw.probability
    before = probabilities(raw.logits - [0, calibration["shift"]], 1.0)
    if not len(raw) or not np.isfinite([after, before]).all():
        return None
    figure = Figure(figsize=(_WIDE, _WIDE * 1.2), dpi=_DOTS, layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color="#bdbdbd", linewidth=0.8)
    low, high = calibration["abstain"]
    for one in (axes, below):
        named = ("abstains", f"threshold {calibration['threshold']:.3g}")
        band, line = named if one is axes else (None, None)
        one.axvspan(low, high, color="#56B4E9", alpha=0.2, linewidth=0, label=band)
        one.axvline(
            calibration["threshold"], color=_GREEN, linestyle="--", linewidth=1.4, label=line
        )
    errors = found["calibration_error_uncalibrated"], found["calibration_error"]
    _points(axes, before, raw.label, _GREY, "s", f"before calibration: error {errors[0]:.3f}")
    brier = found["whole"]["metrics"]["brier"]
    said = f"after: error {errors[1]:.3f}, Brier score {_span(brier['value'], brier['interval'])}"
    _points(axes, after, raw.label, _BLUE, "o", said)
    some = raw.confirmed == CONFIRMED
    if some.any() and not some.all():
        error = found["histology"]["metrics"]["calibration_error"]["value"]
        said = f"after, {some.sum()} histology-confirmed: error {error:.3f}"
        _points(axes, after[some], raw.label[some], _RED, "D", said)
    whole = found["whole"]
    auc = f"AUC {_span(whole['auc'], whole['interval'])}"
    edges = np.linspace(0, 1, 41)
    shown = [(0, "benign", _BLUE), (1, "malignant", _RED)]
    for label, name, colour in shown:
        chosen = after[raw.label == label]
        below.hist(
            chosen, edges.tolist(), histtype="step", linewidth=1.5, color=colour,
            label=f"{name}, n = {len(chosen)}", linestyle="-" if label else "--",
        )  # fmt: skip
    below.set_yscale("symlog", linthresh=1)
    below.yaxis.set_major_formatter("{x:g}")
    below.set(xlabel="probability of malignant", ylabel="pictures", xlim=(0, 1))
    # Room above the tallest bar, for the legend.
    below.set_ylim(0, 30 * below.get_ylim()[1])
    below.legend(frameon=False, loc="upper right", ncols=2)
    axes.set(ylim=(-0.02, 1.02), ylabel="share that is malignant")
    counted = f"{auc}, n = {len(raw)} ({whole['malignant']} malignant)"
    axes.set_title(f"{_title('Reliability of the probability', source)}\n{counted}")
    axes.grid(color="#e6e6e6", linewidth=0.6)
    lines, labels = axes.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower left", frameon=False)
    return figure


def _points(
    axes: Axes, probability: Floats, labels: Labels, colour: str, marker: str, said: str
) -> None:
    """Each bin of the calibration error, with the Wilson interval (1927) of its share."""
    inside = metrics.binned(probability)
    rows = [inside == one for one in np.unique(inside)]
    count = np.array([chosen.sum() for chosen in rows])
    centre = np.array([probability[chosen].mean() for chosen in rows])
    share = np.array([labels[chosen].mean() for chosen in rows])
    z = 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    spread = np.clip([share - middle + half, middle + half - share], 0, None)
    axes.errorbar(
        centre, share, spread, fmt=f"{marker}-", color=colour, linewidth=1.2, markersize=5,
        elinewidth=0.8, capsize=2, label=said,
    )  # fmt: skip


def _span(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


def _title(kind: str, source: str, most: int = 52) -> str:
    short = source if len(source) <= most else source[: most - 1].rstrip(" ,(") + "…"
    # A dollar sign would begin a formula.
    return f"{kind}, test split\n{short}".replace("$", r"\$")


def _write(figure: Figure, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(drawn, format="png", metadata={"Software": None})
    files.write(file, drawn.getvalue())
