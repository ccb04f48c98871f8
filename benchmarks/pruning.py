"""What merging patches costs a classifier, and what it gains, by how much of the work is left.

    python -m benchmarks.pruning models/mini --data datasets/isic2017,datasets/ham10000

The default of the tier `pruned` was chosen by it: the least work at which the area under the ROC
curve falls by less than 0.01 on every set. In eager torch, fp32: what the tier loses beside int8.
`python -m benchmarks.quality` compares the file of a bundle, 8 bits and all.

Each share of the work is beside the whole model on the same photographs: the area's change with a
paired 95 % interval over lesions, labels and decisions that changed, and how often the gate changed
its mind. Speeds are of batches, in turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np

from benchmarks import machine
from benchmarks.measuring import alternate, ratio
from benchmarks.quality_classifier import beside, photographs
from benchmarks.results_file import finish
from dermaflux.checkpoint import classifier_spec
from dermaflux.classifier import Classifier, Prediction
from dermaflux.command import ended, option, parsed
from dermaflux.errors import DatasetError
from dermaflux.images import decode_upload
from dermaflux.intake import Intake

_CHUNK: Final = 32
_BATCH: Final = 8
SHARES: Final = ("0.8", "0.7", "0.6", "0.55", "0.5")
_WHOLE: Final = "1"


@dataclass(frozen=True)
class Settings:
    """What to merge, and on which photographs to look."""

    checkpoint: Path = option("folder with a classifier/ that is a vision transformer")
    data: tuple[str, ...] = option("comma-separated datasets", ("datasets/isic2017",))
    shares: tuple[str, ...] = option(
        f"comma-separated, of the work that is left; default: {','.join(SHARES)}", SHARES
    )
    split: str = option("of the datasets; default: test", "test")
    most: int | None = option("photographs of each at most, evenly spread; default: all", None)
    rounds: int = option("of the speeds; default: 15", 15)
    out: Path | None = option("the result as a JSON file", None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    settings = parsed(Settings, "python -m benchmarks.pruning", "Merge patches.", arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)

    def work() -> None:
        finish("pruning", measure(settings), words, settings.out)

    return ended(work)


def measure(settings: Settings) -> dict[str, Any]:
    """Areas, decisions and speeds of every share.

    Raises:
        DatasetError: a share is no number, a dataset cannot be read, or lacks one of the labels.
        EngineError: the classifier is no vision transformer, or a share is too small.
    """
    shares = [_number(share) for share in settings.shares]
    sets = {Path(one).name: photographs(Path(one), settings.split, settings.most)
            for one in settings.data}  # fmt: skip
    environment = machine.environment()
    opened = {_WHOLE: _opened(settings.checkpoint, 1.0)}
    opened |= {f"{share:g}": _opened(settings.checkpoint, share) for share in shares}
    found: dict[str, Any] = {name: {} for name in opened}
    for data, pictures in sets.items():
        told: dict[str, list[Prediction]] = {name: [] for name in opened}
        for start in range(0, len(pictures), _CHUNK):
            some = pictures[start : start + _CHUNK]
            images = [decode_upload(one.path.read_bytes()) for one in some]
            ready = [opened[_WHOLE][0].prepare(image) for image in images]
            for name, (classifier, _) in opened.items():
                told[name] += [one.prediction for one in classifier.judge(ready)]
            print(f"{data}: {start + len(some)} of {len(pictures)} photographs", file=sys.stderr)
        gated = opened[_WHOLE][0].intake is not None
        for name in opened:
            found[name][data] = beside(told[name], told[_WHOLE], pictures, gated)
    seconds = _seconds(opened, settings.rounds)
    rows = {
        name: {
            **about,
            "speed": vars(ratio(seconds[_WHOLE], seconds[name])),
            "photographs": found[name],
        }
        for name, (_, about) in opened.items()
    }
    return {"environment": environment, "checkpoint": settings.checkpoint.name,
            "split": settings.split, "shares": rows,
            "photographs": {name: len(pictures) for name, pictures in sets.items()}}  # fmt: skip


def _number(share: str) -> float:
    try:
        return float(share)
    except ValueError:
        raise DatasetError(f"--shares needs numbers above 0, up to 1, not {share!r}") from None


def _opened(checkpoint: Path, share: float) -> tuple[Classifier, dict[str, Any]]:
    """The classifier with a share of its work left, and what that is."""
    import torch

    from dermaflux.engines.eager import EagerEngine
    from dermaflux.engines.merging import Merged, plan, unfit, work_left
    from dermaflux.engines.parts import module

    spec = classifier_spec(checkpoint)
    if spec is None:
        raise DatasetError(f"{checkpoint} has no classifier/")
    whole = module(checkpoint, "classifier")
    model: Any = whole.model
    count = 0 if unfit(model) else plan(model, share)
    merged = Merged(whole, count)
    engine = EagerEngine(
        merged, merged.inputs, merged.outputs, "fp32", torch.float32, torch.device("cpu"), Lock()
    )
    intake = None if spec.intake is None else Intake.open(spec.intake, checkpoint)
    about = {"merged": count, "work": round(work_left(model, count), 4)}
    print(json.dumps(about), file=sys.stderr)
    return Classifier(spec, engine, _CHUNK, intake=intake), about


def _seconds(
    opened: dict[str, tuple[Classifier, dict[str, Any]]], rounds: int
) -> dict[str, list[float]]:
    size = opened[_WHOLE][0].spec.input_size
    pixels = np.random.default_rng(0).standard_normal((_BATCH, *size), dtype=np.float32)

    def side(classifier: Classifier) -> Any:
        return lambda _: classifier.engine.run({"pixel_values": pixels})

    return alternate({name: side(one) for name, (one, _) in opened.items()}, rounds)


if __name__ == "__main__":
    sys.exit(main())
