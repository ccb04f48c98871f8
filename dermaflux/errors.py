"""Every error that DermaFlux raises for its user; programming mistakes stay assertions.

A message says what was wrong, the value found, the value needed, and what to do next.

    DermaFluxError
    ├── BundleError      a bundle folder is missing, incomplete, damaged or of another version
    ├── EngineError      no engine can run a part, or a forced one is not installed
    ├── RequestError     a request's field is out of range or contradictory (has `.field`)
    ├── ImageError       an uploaded picture is not one we accept
    └── Cancelled        the caller asked to stop; nothing is wrong
"""

from __future__ import annotations


class DermaFluxError(Exception):
    """Base of all errors meant for the user."""


class BundleError(DermaFluxError):
    """A bundle folder is missing, incomplete, damaged, or of another schema version."""


class EngineError(DermaFluxError):
    """No engine can run a part here, or the engine that was forced cannot."""


class RequestError(DermaFluxError, ValueError):
    """A request's field is wrong. `field` is its dotted name as the caller wrote it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ImageError(DermaFluxError, ValueError):
    """A picture cannot be accepted: wrong format, damaged, too small or too large."""


class Cancelled(DermaFluxError):
    """Raised out of a generation whose caller asked to stop."""
