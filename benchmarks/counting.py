"""An engine that counts its calls: what shows that a step was forecast, or a text known already.

>>> engine = Counted(pipeline.engines["transformer"])
>>> engine.calls, engine.items
(20, 80)
"""

from __future__ import annotations

from collections.abc import Callable

from dermaflux.engines import Array, Arrays, Engine


class Counted:
    """Another's engine in all but this: `calls` are how often it was run, `items` for how many
    pictures or texts in all."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name, self.precision = engine.name, engine.precision
        self.calls = self.items = 0

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """See `Engine.run`."""
        self._count(inputs)
        return self.engine.run(inputs)

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        """See `Engine.bind`: each call of what comes back counts."""
        bound = self.engine.bind(constant, timesteps)

        def step(varying: Arrays) -> dict[str, Array]:
            self._count(varying)
            return bound(varying)

        return step

    def _count(self, inputs: Arrays) -> None:
        self.calls += 1
        self.items += len(next(iter(inputs.values())))
