"""A trained classifier's figures on any labelled real pictures, before its threshold is trusted.

    python -m training.evaluate models/mini/classifier --data own --out runs/own
    python -m training.evaluate bundles/mini --precision int8 --data own --split all \\
        --seen runs/mini/seen.npz --leave-out --threshold-for 0.95 --out runs/own_int8

CLASSIFIER is a folder that `training.vit` wrote, or a bundle, whose engines and gate are used.
Pictures go through it as the service takes them, with its own temperature, threshold, band and
conformal limits. Writes `scores.csv`, `plots/` and, last, `report.json`, from which
`python -m training.metrics` recomputes every figure. With `--seen` (an index of what the classifier
learnt from, or that dataset) pictures that it has seen are refused, and with `--leave-out` left
out, with all others of their patient or lesion. `--threshold-for` suggests a threshold of these
pictures' own; it changes nothing in the classifier.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from dermaflux import files, thumbnails
from dermaflux.command import ended
from dermaflux.dataset import SPLITS
from dermaflux.engines import EAGER, ENGINES
from dermaflux.errors import DatasetError
from dermaflux.prompt import LABELS
from training import bootstrap, conformal, data, evaluation, judging, leaks, local_threshold
from training.judging import Judge, Reasons
from training.mixing import SYNTHETIC
from training.raw_scores import RawScores
from training.scores import PLOTS, SCORES

ALL: Final = "all"


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and how; saved in the report."""

    classifier: Path
    data: tuple[Path, ...]
    out: Path
    split: str = "test"
    seen: tuple[Path, ...] = ()
    leave_out: bool = False
    report: Path | None = None
    engine: str | None = None
    precision: str | None = None
    threshold_for: float | None = None
    conformal_from: str | None = None
    draws: int = bootstrap.DRAWS
    threads: int = 2


def run(settings: Settings) -> dict[str, Any]:
    """Score, measure and write; returns the content of `report.json`.

    Raises:
        DatasetError: there is nothing to test, pictures were seen, or something cannot be read.
        BundleError, EngineError: as in `judging.from_bundle`.
    """
    _writable(settings.out)
    samples = chosen(settings.data, settings.split)
    judge = opened(settings)
    tested, left = unseen(samples, settings)
    document: dict[str, Any] = {
        "classifier": judge.about,
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "left_out": left,
        "pictures": len(tested),
    }
    if not settings.seen:
        document["note"] = "nobody looked whether the classifier has seen these pictures: --seen"
    parts: list[RawScores] = []
    if settings.conformal_from is not None:
        held, judge = fitted(judge, settings)
        parts.append(held)
    raw, refused = judging.scored(judge, tested, "test", shown=_bar)
    figures = evaluation.figures(raw, judge.calibration, settings.draws)
    document |= {"calibration": judge.calibration, "test": figures}
    if judge.gated:
        document["gate"] = gate(raw, refused)
        document["accepted"] = accepted(raw, refused, judge.calibration, settings.draws)
    if settings.threshold_for is not None:
        document["suggestion"] = suggestion(raw, settings.threshold_for, settings.draws)
    from training import plots

    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "report.json").unlink(missing_ok=True)
    RawScores.joined([raw, *parts]).write(settings.out / SCORES)
    plots.save(settings.out / PLOTS, raw, figures, judge.calibration)
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    files.write(settings.out / "report.json", text.encode())
    return document


def opened(settings: Settings) -> Judge:
    """The classifier of a bundle or of a folder.

    Raises:
        DatasetError: it is neither, or an engine is asked for that only bundles have.
    """
    given = settings.classifier, settings.report, settings.threads
    if (settings.classifier / "bundle.json").is_file():
        return judging.from_bundle(*given, settings.engine, settings.precision)
    if settings.engine or settings.precision:
        raise DatasetError(
            f"{settings.classifier} is no bundle, and runs in torch and fp32 alone; --engine and "
            "--precision are of bundles"
        )
    return judging.from_folder(*given)


def chosen(folders: Iterable[Path], split: str) -> list[data.Sample]:
    """The real, labelled pictures of a split, or of all.

    Raises:
        DatasetError: there are none, some are generated, or a file is given twice.
    """
    read = [one for folder in folders for one in data.read(folder)]
    samples = [one for one in read if split in (ALL, one.split)]
    if not samples:
        there = Counter(one.split for one in read)
        counted = ", ".join(f"{name} {count}" for name, count in there.items())
        raise DatasetError(f"no sample in split {split!r} (there are {counted}); give --split all")
    if made := [one for one in samples if one.confirmed == SYNTHETIC]:
        raise DatasetError(
            f"{made[0].file} and {len(made) - 1} more are generated pictures; a test is of real "
            "ones"
        )
    files_ = Counter(one.file.resolve() for one in samples)
    if twice := [file for file, count in files_.items() if count > 1]:
        raise DatasetError(f"{twice[0]} and {len(twice) - 1} more are given twice; give each once")
    return samples


def unseen(
    samples: Sequence[data.Sample], settings: Settings
) -> tuple[list[data.Sample], dict[str, Any]]:
    """The samples that the classifier has not seen, and which were left out, for the report.

    Raises:
        DatasetError: some were seen and may not be left out, or none is left.
    """
    if not settings.seen:
        if settings.leave_out:
            raise DatasetError("--leave-out is of pictures that were seen; give --seen")
        return list(samples), {"pictures": 0, "seen": []}
    known = [leaks.seen(path, threads=settings.threads) for path in settings.seen]
    seen, test = thumbnails.joined(known), leaks.index(samples, settings.threads)
    if not settings.leave_out:
        remedy = "test without them: --leave-out"
        leaks.refuse(test, seen, "the classifier", settings.threads, remedy=remedy)
    found = leaks.find(test, seen, settings.threads)
    names = {leak.test for leak in found}
    groups = {(one.source, one.group) for one in samples if str(one.file) in names}
    kept = [one for one in samples if (one.source, one.group) not in groups]
    if not kept:
        raise DatasetError(f"the classifier has seen all {len(samples)} pictures: no test is left")
    pairs = [[leak.test, leak.seen, leaks.reason(leak)] for leak in found]
    return kept, {"pictures": len(samples) - len(kept), "seen": pairs}


def fitted(judge: Judge, settings: Settings) -> tuple[RawScores, Judge]:
    """The scores of `conformal_from`, and a judge with conformal limits that are set by them.

    Raises:
        DatasetError: that split is tested too, or has no picture.
    """
    split = str(settings.conformal_from)
    if settings.split in (ALL, split):
        raise DatasetError(f"--conformal-from {split} is tested too; a test needs others")
    samples = chosen(settings.data, split)
    held, _ = judging.scored(judge, samples, split, controls=False, shown=_bar)
    limits = conformal.fit(held.probability, held.label) | {"fitted_to": f"split {split}"}
    return held, replace(judge, calibration=judge.calibration | {"conformal": limits})


def gate(raw: RawScores, refused: Sequence[Reasons]) -> dict[str, Any]:
    """How many of the lesions the gate would not have judged, by source and label, and why.

    The figures of `test` are over all pictures, refused or not, `accepted` over the others.
    """
    any_of = np.array([bool(reasons) for reasons in refused])
    found: dict[str, Any] = {}
    for source in np.unique(raw.source).tolist():
        rows = raw.source == source
        codes = Counter(r.code for row in np.flatnonzero(rows).tolist() for r in refused[row])
        found[source] = {
            "images": int(rows.sum()),
            "refused": evaluation.share(any_of[rows]),
            **{
                name: evaluation.share(any_of[rows & (raw.label == number)])
                for number, name in enumerate(LABELS)
            },
            "by": dict(codes.most_common()),
        }
    return found


def accepted(
    raw: RawScores, refused: Sequence[Reasons], calibration: Mapping[str, Any], draws: int
) -> dict[str, Any]:
    """The figures over the pictures that the gate let pass: of the answers that the service gives;
    a source of which none passed is not there."""
    passed = np.array([not reasons for reasons in refused])
    return evaluation.figures(raw.where(passed), calibration, draws)


def suggestion(raw: RawScores, wanted: float, draws: int) -> dict[str, Any]:
    """A threshold of all pictures, and one of each source where there are several."""
    sources = np.unique(raw.source).tolist()
    found: dict[str, Any] = {"all": local_threshold.suggested(raw, wanted, draws)}
    if len(sources) > 1:
        found["by_source"] = {
            source: local_threshold.suggested(raw.where(raw.source == source), wanted, draws)
            for source in sources
        }
    return found


def _writable(out: Path) -> None:
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise DatasetError(f"--out {out}: {folder} is a file; give a folder")
    if (out / "model.safetensors").exists():
        raise DatasetError(f"--out {out} holds a classifier, whose report stays; give another one")


def _bar(parts: Iterable[Any]) -> Iterable[Any]:
    from tqdm import tqdm

    shown: Iterable[Any] = tqdm(parts, desc="scoring", leave=False, file=sys.stderr)
    return shown


def _share(text: str) -> float:
    value = data.positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share above 0, up to 1")
    return value


def _draws(text: str) -> int:
    value = data.count(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text} draws give no interval; give 2 or more")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("classifier", type=Path, help="a folder that training.vit wrote, or a bundle")
    add("--data", type=Path, action="append", required=True, help="a dataset; repeatable")
    add("--out", type=Path, required=True, help="folder of report.json, scores.csv and plots/")
    add("--split", choices=(*SPLITS, ALL), default="test", help="default: %(default)s")
    add("--seen", type=Path, action="append", default=[],
        help="what the classifier learnt from: an index, or a dataset; repeatable")  # fmt: skip
    add("--leave-out", action="store_true", help="test without pictures that were seen")
    add("--report", type=Path, help="report.json with shift and conformal limits (of a folder: "
        "the one in it)")  # fmt: skip
    add("--engine", choices=[one for one in ENGINES if one != EAGER], help="of a bundle")
    add("--precision", help="of a bundle: fp32, int8, ...")
    add("--threshold-for", type=_share, metavar="SENSITIVITY",
        help="suggest a threshold that keeps this share of the malignant pictures")  # fmt: skip
    add("--conformal-from", choices=SPLITS, metavar="SPLIT",
        help="set conformal limits by this split of the same datasets")  # fmt: skip
    add("--draws", type=_draws, default=bootstrap.DRAWS, help="bootstrap draws of an interval")
    add("--threads", type=data.count, default=2)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    lists = {name: tuple(options[name]) for name in ("data", "seen")}
    settings = Settings(**options | lists)

    def work() -> None:
        document = run(settings)
        told = {"out": str(settings.out), "pictures": document["pictures"],
                "left_out": document["left_out"]["pictures"],
                "test": evaluation.brief(document["test"])}  # fmt: skip
        told |= {name: document[name] for name in ("gate", "suggestion") if name in document}
        if "accepted" in document:
            told["accepted"] = evaluation.brief(document["accepted"])
        print(json.dumps(told, allow_nan=False))

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
