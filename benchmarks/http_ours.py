"""Our side over HTTP: the service with one precision or tier, or with several beside each other.

Each is a service of its own that is started and asked in its turn, and a classifier in a process of
its own beside it. Nothing asked for is one: what the service takes by itself, named plainly.

    >>> [one.side for one in kinds(settings, bundle)]     # --precision int8 --tier pruned
    ['dermaflux, int8', 'dermaflux, tier pruned']
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from benchmarks.http_sides import HOST, PORT, Side
from dermaflux.bundle import Bundle
from dermaflux.classifier import PRUNED
from dermaflux.engines import choose
from dermaflux.tiers import classifier_tier

OURS: Final = "dermaflux"
IN_PROCESS: Final = "in process"


class Asked(Protocol):
    """What is needed of the command's settings."""

    @property
    def bundle(self) -> Path: ...
    @property
    def engine(self) -> str | None: ...
    @property
    def precision(self) -> tuple[str, ...]: ...
    @property
    def tier(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Kind:
    """One of ours: what was asked for, and what runs because of it (engine and precision)."""

    bundle: Path
    engine: str | None
    precision: str | None
    tier: str | None
    runs: str

    @property
    def name(self) -> str:
        """What was asked for; empty if nothing was."""
        return f"tier {self.tier}" if self.tier is not None else self.precision or ""

    @property
    def side(self) -> str:
        return f"{OURS}, {self.name}" if self.name else OURS

    @property
    def alone(self) -> str:
        """Its side without a service."""
        return f"{IN_PROCESS}, {self.name}" if self.name else IN_PROCESS

    @property
    def lossy(self) -> bool:
        """Whether it does less work than the model has, and its answers say so."""
        return self.runs.endswith(f"-{PRUNED}")

    @property
    def goal(self) -> str:
        """Before the words of a goal that it is held to."""
        return "".join((self.name, " (lossy)" * self.lossy, ": " * bool(self.name)))

    def service(self) -> Side:
        """Our service as its users start it."""
        given = {
            "ENGINE": self.engine, "PRECISION": self.precision, "CLASSIFIER_TIER": self.tier,
        }  # fmt: skip
        return Side(
            f"{OURS}, {self.runs}",
            (sys.executable, "-m", "bentoml", "serve", "serving.service:DermaFlux",
             "--host", HOST, "--port", PORT),
            {
                "DERMAFLUX_BUNDLE": str(self.bundle),
                "BENTOML_DO_NOT_TRACK": "true",
                **{f"DERMAFLUX_{key}": word for key, word in given.items() if word is not None},
            },
            "/readyz",
        )  # fmt: skip

    def words(self) -> list[str]:
        """Its options on the command line of `benchmarks.classify_rate`."""
        given = {
            "--bundle": str(self.bundle), "--engine": self.engine, "--precision": self.precision,
            "--tier": self.tier,
        }  # fmt: skip
        return [one for key, word in given.items() if word is not None for one in (key, word)]


def kinds(asked: Asked, bundle: Bundle) -> Sequence[Kind]:
    """What was asked for, precisions first; or the one that the service takes by itself.

    Raises:
        EngineError: the bundle or this machine has none of a precision or tier.
    """
    wanted: list[tuple[str | None, str | None]] = [
        *((precision, None) for precision in asked.precision),
        *((None, tier) for tier in asked.tier),
    ]
    found = []
    for precision, tier in wanted or [(None, None)]:
        level = None if tier is None else classifier_tier(tier)
        choice = choose(bundle, "classifier", asked.engine, precision, tier=level)
        runs = f"{choice.engine} {choice.precision}"
        found.append(Kind(asked.bundle, asked.engine, precision, tier, runs))
    return found
