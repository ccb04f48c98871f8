"""Every error that DermaFlux raises for its user; programming mistakes stay assertions.

A message says what was wrong, the value found, the value needed, and what to do next.

    DermaFluxError
    ├── BundleError      a bundle folder is missing, incomplete, damaged or of another version
    ├── DatasetError     a dataset folder or one of its rows cannot be read
    ├── EngineError      no engine can run a part, or a forced one is not installed
    ├── RequestError     a request's field is out of range or contradictory (has `.field`)
    ├── LicenceError     licences forbid what is to be done (in `dermaflux.licence`)
    ├── ImageError       an uploaded picture is not one we accept
    └── Cancelled        the caller asked to stop; nothing is wrong
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DermaFluxError(Exception):
    """Base of all errors meant for the user; `exit_status` is that of a command it ends."""

    exit_status = 2


class BundleError(DermaFluxError):
    """A bundle folder is missing, incomplete, damaged, or of another schema version."""


class DatasetError(DermaFluxError):
    """A dataset folder or one of its rows cannot be read."""


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


@contextmanager
def translated(kind: type[DermaFluxError], words: str) -> Iterator[None]:
    """Whatever a library raises inside is `kind` outside: `words`, and what the library said.

    For libraries whose exceptions have no common base of their own, as ONNX Runtime's and
    OpenVINO's. Our own errors pass as they are.
    """
    try:
        yield
    except DermaFluxError:
        raise
    except Exception as error:
        raise kind(f"{words}: {error}") from error
