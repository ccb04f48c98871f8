"""What of a bundle can be measured side by side: engines, precisions and tiers that run here.

    >>> for variant in listed(bundle, Path("models/mini"), tiers=("cached",)):
    ...     print(variant.name)
    eager
    eager, tier lossless
    onnxruntime-cpu fp32
    openvino-cpu fp32
    openvino-cpu int8
    tier cached

Each can be opened in this process (`pipeline`) or asked for by the options of a command (`words`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dermaflux.bundle import Bundle
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import EAGER, OPENVINO, ORT, ORT_CUDA, ORT_TENSORRT, TENSORRT, Choice
from dermaflux.engines import choose as chosen
from dermaflux.errors import BundleError, EngineError
from dermaflux.hardware import look
from dermaflux.pipeline import Pipeline

_CPU: Final = (ORT, OPENVINO)
_GPU: Final = (ORT_CUDA, ORT_TENSORRT, TENSORRT)


@dataclass(frozen=True)
class Variant:
    """One way to run a bundle: an engine and a precision, or a tier, which chooses both. Torch
    without a tier is diffusers' own forward; with one it is the product's."""

    engine: str | None = None
    precision: str | None = None
    tier: str | None = None

    @property
    def name(self) -> str:
        engine = " ".join(word for word in (self.engine, self.precision) if word is not None)
        tier = None if self.tier is None else f"tier {self.tier}"
        return ", ".join(word for word in (engine, tier) if word)

    def pipeline(
        self, bundle: Bundle, checkpoint: Path | None = None, threads: int | None = None
    ) -> Pipeline:
        """Opened in this process; `eager` runs the checkpoint with the bundle's settings.

        Raises:
            DermaFluxError: it cannot be had.
        """
        # Given only where it is asked for: a tier chooses what an engine's name would contradict.
        more: dict[str, Any] = {} if self.tier is None else {"tier": self.tier}
        return Pipeline.open(
            bundle,
            engine=self.engine,
            precision=self.precision,
            checkpoint=checkpoint if self.engine == EAGER else None,
            threads=threads,
            **more,
        )

    def words(self, bundle: Bundle, checkpoint: Path | None, threads: int | None) -> list[str]:
        """The options of `python -m dermaflux generate` that mean the same."""
        given = {"--bundle": bundle.path, "--engine": self.engine, "--precision": self.precision,
                 "--tier": self.tier, "--threads": threads}  # fmt: skip
        if self.engine == EAGER:
            given["--checkpoint"] = checkpoint
        return [str(word) for pair in given.items() if pair[1] is not None for word in pair]


def listed(
    bundle: Bundle, checkpoint: Path | None = None, tiers: Sequence[str] = ()
) -> list[Variant]:
    """All that can run here; where there is a checkpoint, eager first; tiers last.

    A precision that has no engine here is left out, and a line on stderr says why.

    Raises:
        BundleError: the checkpoint is of another model than the bundle.
    """
    found: list[Variant] = []
    if checkpoint is not None:
        same_model(bundle, checkpoint)
        found += [Variant(EAGER), Variant(EAGER, tier="lossless")]
    for engine in (*_CPU, *(_GPU if look().gpus else ())):
        for precision in bundle.parts["transformer"].files:
            if _choice(bundle, "transformer", engine, precision) is not None:
                found.append(Variant(engine, precision))
    return found + [Variant(tier=tier) for tier in tiers]


def classifiers(bundle: Bundle) -> list[Choice]:
    """Every engine and precision of the bundle's classifier that can run here.

    Raises:
        BundleError: the bundle has no classifier.
    """
    if bundle.classifier is None:
        raise BundleError(
            f"the bundle {bundle.name} has no classifier; add one to the checkpoint (classifier/) "
            "and export again"
        )
    found = (
        _choice(bundle, "classifier", engine, precision)
        for engine in (*_CPU, *(_GPU if look().gpus else ()))
        for precision in bundle.parts["classifier"].files
    )
    return [one for one in found if one is not None]


def same_model(bundle: Bundle, checkpoint: Path) -> None:
    """Refuse a checkpoint whose generator has other settings: it would be another model's time.

    Raises:
        BundleError: with what differs, or no checkpoint is there.
    """
    theirs = vars(Checkpoint.open(checkpoint).model)
    differ = [
        f"{name} {theirs[name]} there, {value} in the bundle"
        for name, value in vars(bundle.model).items()
        if theirs[name] != value
    ]
    if differ:
        raise BundleError(
            f"{checkpoint} is of another model than {bundle.path}: {'; '.join(differ)}. Name the "
            "checkpoint that the bundle was exported from"
        )


def variants(
    bundle: Bundle, checkpoint: Path | None, threads: int | None, tiers: Sequence[str] = ()
) -> dict[str, Pipeline]:
    """`listed`, opened, by name. All are in memory at once.

    Raises:
        DermaFluxError: see `listed` and `Variant.pipeline`.
    """
    return {
        one.name: one.pipeline(bundle, checkpoint, threads)
        for one in listed(bundle, checkpoint, tiers)
    }


def _choice(bundle: Bundle, part: str, engine: str, precision: str) -> Choice | None:
    try:
        choice = chosen(bundle, part, engine, precision)
    except EngineError as error:
        print(f"left out {part} on {engine} in {precision}: {error}", file=sys.stderr)
        return None
    return choice if choice.precision == precision else None
