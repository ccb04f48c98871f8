"""The least time that a part's call can take on this machine, by what it computes and reads.

    >>> limits = Limits.measured()
    >>> floors_of(bundle, pipeline.engines, work_of(bundle, GENERATOR_PARTS, 1, 128, 128), limits)
    {"denoise": Least(seconds=0.0040, as_quantized=0.0040), "decode": ...}

The roofline (Williams et al., 2009): operations over the best rate of a large product of matrices
in the precision in use, or bytes over the bandwidth of memory, whichever is longer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks import flops
from benchmarks.flops import Work
from benchmarks.machine import last_level_cache
from benchmarks.rates import PRECISIONS, Floor, Rate, bandwidth, fastest
from dermaflux.bundle import Bundle
from dermaflux.engines import Engine
from dermaflux.errors import EngineError

_STAGE_OF: Final = {"transformer": "denoise", "vae_decoder": "decode"}
"""Part -> its stage, where they have different names."""


@dataclass(frozen=True)
class Least:
    """Seconds that a call cannot be below: all of it at the rate of its precision, and with
    products of two activations, which no file quantizes, at the best rate of floating point."""

    seconds: float
    as_quantized: float

    def share(self, spent: float, calls: float = 1) -> dict[str, float]:
        """Beside what `calls` of them took, in seconds: the floor in ms, the shares reached."""
        return {
            "floor_ms": round(1e3 * calls * self.seconds, 4),
            "reached": round(calls * self.seconds / spent, 4),
            "reached_as_quantized": round(calls * self.as_quantized / spent, 4),
        }


@dataclass(frozen=True)
class Limits:
    """The machine's: operations a second by precision and how they were reached, bytes a second
    from memory, and the bytes of its largest cache."""

    measured_rates: Mapping[str, Rate]
    bandwidth: float
    cache: int

    @classmethod
    def measured(cls) -> Limits:
        """Those of this machine; takes some ten seconds."""
        rates = {name: fastest(name) for name in PRECISIONS}
        return cls(rates, bandwidth(), last_level_cache())

    @property
    def rates(self) -> dict[str, float]:
        """Of the precisions that this machine has instructions for."""
        known = {name: one.per_second for name, one in self.measured_rates.items()}
        return {name: rate for name, rate in known.items() if rate is not None}

    def least(self, work: Work, weights: int, precision: str) -> Least:
        """Of a call that reads `weights` bytes. Precisions without a rate compute in fp32; what
        comes after a hyphen (`int8-pruned`) says what is computed, and not in what."""
        rates, precision = self.rates, precision.partition("-")[0]
        rate = rates.get(precision, rates["fp32"])
        between = max(rates["fp32"], rates.get("bf16", 0.0)) if precision == "int8" else rate
        # What the cache holds is not read again from one call to the next.
        read = weights if weights > self.cache else 0
        linear, attention = work.linear / rate, work.attention / between
        reading = Floor(0, read).seconds(rate, self.bandwidth)
        return Least(
            Floor(work.flops, read).seconds(rate, self.bandwidth), max(linear + attention, reading)
        )

    def told(self) -> dict[str, Any]:
        """For a result."""
        return {
            "rates": {name: asdict(one) for name, one in self.measured_rates.items()},
            "bandwidth_gb_s": round(self.bandwidth / 1e9, 1),
        }


def work_of(
    bundle: Bundle, parts: Sequence[str], batch: int, height: int, width: int
) -> dict[str, Work]:
    """Operations of a call of each part that can be counted here; of others stderr says why."""
    found = {}
    for name in parts:
        try:
            one = flops.of_part(bundle, name, batch, height, width)
        except EngineError as error:
            print(f"no floor of {name}: {error}", file=sys.stderr)
            continue
        if one is not None:
            found[name] = one
    return found


def floors_of(
    bundle: Bundle, engines: Mapping[str, Engine], work: Mapping[str, Work], limits: Limits
) -> dict[str, Least]:
    """By stage, for the precisions that these engines run."""
    found = {}
    for name, one in work.items():
        precision = engines[name].precision
        files = bundle.parts[name].files
        # Eager torch reads a checkpoint's weights, whose files the bundle does not know.
        file = precision if precision in files else next(iter(files))
        weights = flops.weights(bundle, name, file)
        found[_STAGE_OF.get(name, name)] = limits.least(one, weights, precision)
    return found
