"""One layer's low-rank change, `delta W = alpha / rank * up @ down` (LoRA, arXiv 2106.09685).

>>> factors = Factors(down=torch.randn(64, 3072), up=torch.randn(3072, 64), alpha=64.0)
>>> factors.rank, factors.scale
(64, 1.0)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dermaflux.errors import DermaFluxError


class AdapterError(DermaFluxError):
    """An adapter file is missing, damaged, of another kind, or does not fit its base."""


@dataclass(frozen=True)
class Factors:
    """`down` is [rank, in], `up` is [out, rank]."""

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        assert self.down.dim() == self.up.dim() == 2, (self.down.shape, self.up.shape)
        assert self.down.shape[0] == self.up.shape[1] > 0, (self.down.shape, self.up.shape)

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """What is added to the layer's weight: float32 [out, in]."""
        return self.scale * (self.up.float() @ self.down.float())
