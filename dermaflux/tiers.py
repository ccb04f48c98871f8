"""Tiers: how much of the exact answer may be given up for speed, by one name an operator chooses.

    >>> tier("lossless").takes("fp32"), tier("lossless").takes("int8")
    (True, False)
    >>> Pipeline.open("bundles/mini", tier="cached")

| tier | of | what runs |
|---|---|---|
| `lossless` | both | the weights as they are: bf16 or fp16 on GPUs, fp32 on CPUs |
| `fp8`, `int8` | both | products in eight bits, as the export measured them |
| `cached` | generator | the fastest precision, and steps that are forecast (`dermaflux.forecast`) |
| `pruned` | classifier | int8, and pieces of the picture that say the same are merged |

Without a tier the fastest precision runs and every step is computed. A tier is about the part that
takes the time, the transformer or the classifier; other parts keep their order of speed where they
have no file of it, and `lossless` holds for all. `cached` and `pruned` do less work than was asked
for, so what they made says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dermaflux.errors import EngineError

__all__ = ["CLASSIFIER_TIERS", "TIERS", "Tier", "classifier_tier", "tier"]


@dataclass(frozen=True)
class Tier:
    """What a tier allows: `precisions` of a bundle's files, all of them where there are none.

    Among them the order of speed decides (`dermaflux.engines.order`). `forecast` has steps of the
    denoising forecast.
    """

    name: str
    precisions: tuple[str, ...] = ()
    forecast: bool = False

    def takes(self, precision: str) -> bool:
        """Whether a file of this precision may run."""
        return not self.precisions or precision in self.precisions

    def require(self, precision: str | None) -> None:
        """Nothing, unless a precision that was asked for as well contradicts the tier.

        Raises:
            EngineError: it does.
        """
        if precision is not None and not self.takes(precision):
            raise EngineError(
                f"precision {precision!r} contradicts tier {self.name!r}, which runs "
                f"{' or '.join(self.precisions)}; leave one of both out"
            )

    def of_torch(self, device: str, precision: str | None = None) -> str:
        """The precision in which torch runs a tier: what was asked for, or on `device` its own.

        bf16 on GPUs, which is how FLUX.1's weights are published; fp32 on a CPU.

        Raises:
            EngineError: torch has none of the tier, or `precision` contradicts it.
        """
        self.require(precision)
        exact = "fp32" if device.startswith("cpu") else "bf16"
        found = precision or (exact if self.takes(exact) else self.precisions[0])
        if found.startswith("int8"):
            raise EngineError(
                f"the eager engine has no int8, which tier {self.name!r} needs; use an engine that "
                "runs a bundle, or another tier"
            )
        return found


_LOSSLESS: Final = Tier("lossless", ("bf16", "fp16", "fp32"))
_FP8: Final = Tier("fp8", ("fp8",))
_INT8: Final = Tier("int8", ("int8",))
_GENERATOR: Final[Mapping[str, Tier]] = {
    one.name: one for one in (_LOSSLESS, _FP8, _INT8, Tier("cached", forecast=True))
}
_CLASSIFIER: Final[Mapping[str, Tier]] = {
    one.name: one for one in (_LOSSLESS, _INT8, _FP8, Tier("pruned", ("int8-pruned",)))
}

TIERS: Final = tuple(_GENERATOR)
"""The generator's, by name."""
CLASSIFIER_TIERS: Final = tuple(_CLASSIFIER)
"""The classifier's, by name."""


def tier(name: str) -> Tier:
    """A tier of the generator.

    Raises:
        EngineError: there is none of that name.
    """
    return _named(name, _GENERATOR)


def classifier_tier(name: str) -> Tier:
    """A tier of the classifier.

    Raises:
        EngineError: there is none of that name.
    """
    return _named(name, _CLASSIFIER)


def _named(name: str, known: Mapping[str, Tier]) -> Tier:
    if name not in known:
        raise EngineError(f"tier {name!r} is not known; use {', '.join(known)}")
    return known[name]
