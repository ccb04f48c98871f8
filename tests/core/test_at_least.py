from __future__ import annotations

from types import SimpleNamespace

import pytest

from dermaflux.command import at_least
from dermaflux.errors import DermaFluxError


@pytest.mark.parametrize("value", [0.4, -1, float("nan"), float("inf")])
def test_what_is_below_or_no_number_is_told_by_its_option(value: float) -> None:
    with pytest.raises(DermaFluxError, match=r"--warm-up .* is out of range; use 0.5 or more"):
        at_least(SimpleNamespace(warm_up=value, free=None), {"free": 1, "warm_up": 0.5})


def test_bounds_themselves_and_what_is_not_given_are_taken() -> None:
    given = SimpleNamespace(warm_up=0.5, free=None)
    at_least(given, {"free": 1, "warm_up": 0.5})
    assert given == SimpleNamespace(warm_up=0.5, free=None)
