"""Engines that take turns in memory, for a device that does not hold all of a model's parts.

    >>> engines = InTurns(load, [("text_encoder", "text_encoder_2"), ("transformer",)])
    >>> engines["text_encoder"]     # loads this one
    >>> engines["transformer"]      # frees the encoders, then loads this one

A mapping like any other of engines; what is asked for decides who stays. Freed is what nobody else
holds: whoever wants two stages one after the other drops the first's engine before the second.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from dermaflux.bundle import GENERATOR_PARTS, Bundle
from dermaflux.engines import Choice, Engine, choose
from dermaflux.hardware import Machine, look
from dermaflux.memory import Plan, plan
from dermaflux.tiers import Tier


class InTurns(Mapping[str, Engine]):
    """Part -> engine, of one group at a time. `turn` is held by a caller who goes through groups:
    two at once would load for each other, and both models would be in memory.

    Raises:
        EngineError: at a part's turn, its engine cannot be had.
    """

    def __init__(self, load: Callable[[str], Engine], groups: Sequence[Sequence[str]]) -> None:
        self.turn = threading.RLock()
        self._load = load
        self._groups = [tuple(group) for group in groups]
        self._resident: dict[str, Engine] = {}

    def __getitem__(self, part: str) -> Engine:
        with self.turn:
            if part not in self._resident:
                self._make_room(part)
                self._resident[part] = self._load(part)
            return self._resident[part]

    def __iter__(self) -> Iterator[str]:
        return (part for group in self._groups for part in group)

    def __len__(self) -> int:
        return sum(len(group) for group in self._groups)

    def __contains__(self, part: object) -> bool:
        # The one that a mapping brings along would load the part to find out.
        return any(part in group for group in self._groups)

    @property
    def resident(self) -> tuple[str, ...]:
        """Parts that are in memory now."""
        return tuple(self._resident)

    def _make_room(self, part: str) -> None:
        group = next((g for g in self._groups if part in g), None)
        if group is None:
            raise KeyError(part)
        if not self._resident.keys() <= set(group):
            self._resident.clear()
            # Engines hold themselves in circles, and device memory is freed with the last of them.
            gc.collect()


def planned(
    bundle: Bundle,
    engine: str | None = None,
    precision: str | None = None,
    *,
    device: str | None = None,
    in_turns: bool | None = None,
    height: int | None = None,
    width: int | None = None,
    machine: Machine | None = None,
    tier: Tier | None = None,
) -> tuple[dict[str, Choice], Plan]:
    """What runs each part of a generator, and who is in memory when; nothing is loaded.

    Raises:
        EngineError: an engine cannot be had, or the parts do not fit; see `choose` and `plan`.
    """
    here = machine or look()
    choices = {
        part: choose(bundle, part, engine, precision, here, device=device, tier=tier)
        for part in GENERATOR_PARTS
    }
    return choices, plan(bundle, choices, here, height=height, width=width, in_turns=in_turns)


def opened(load: Callable[[str], Engine], plan: Plan) -> Mapping[str, Engine]:
    """The engines of a plan: all of them now, or each at its turn."""
    if plan.in_turns:
        return InTurns(load, plan.groups)
    # One opens a graph mostly on one core, so the others open theirs meanwhile.
    with ThreadPoolExecutor(len(GENERATOR_PARTS)) as pool:
        opening = {part: pool.submit(load, part) for part in GENERATOR_PARTS}
    return {part: engine.result() for part, engine in opening.items()}
