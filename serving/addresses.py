"""What an address says of its sender, and how often a sender failed, in memory that stays small."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

FAILURES: Final = 10
"""Of one network that are told as such and logged; then it has to wait."""
REGAIN_SECONDS: Final = 6.0
"""After which one of them is forgotten."""
NETWORKS: Final = 1024
"""Remembered at most; the one that failed least recently goes first."""


def outside(address: str) -> bool:
    """Whether it is an address of another machine; what is none came over no network."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return not (mapped or found).is_loopback


def names_this_machine(host: str) -> bool:
    """Whether a `Host` header, with its port or without, is a name that only this machine has.

    A page of somebody else's can have a name of its own resolved to 127.0.0.1 (DNS rebinding), and
    is then taken by the browser for ours; it cannot make the browser call it localhost.
    """
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name.rstrip(".") == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def network(address: str) -> str:
    """What one sender cannot change at will: an IPv4 address, or the first 64 bits of an IPv6."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(found, ipaddress.IPv6Address):
        prefix = ipaddress.IPv6Network((int(found) >> 64 << 64, 64))
        return str(found.ipv4_mapped or prefix)
    return str(found)


class Failures:
    """Failures by network: a bucket that leaks for each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def count(self, whose: str) -> int:
        """Count one more of `whose`; 0, or whole seconds to wait where they are too many."""
        now = self._clock()
        level, last = self._seen.pop(whose, (0.0, now))
        level = max(0.0, level - (now - last) / REGAIN_SECONDS)
        full = level + 1 > FAILURES
        # Those beyond do not count, or a sender that goes on would never be told again.
        self._seen[whose] = (level if full else level + 1, now)
        if len(self._seen) > NETWORKS:
            self._seen.popitem(last=False)
        return math.ceil((level + 1 - FAILURES) * REGAIN_SECONDS) if full else 0

    def __len__(self) -> int:
        return len(self._seen)
