"""What the service keeps beside its answers: audit log and marks, as the settings name them.

Both are opened before any worker starts, so that a folder that takes no files stops the start with
a sentence, and again in the process that answers. The classifier's process has neither.

    >>> check(settings, bundle)                         # raises what is wrong, leaves nothing open
    >>> records = Records.open(settings, bundle.id)
    >>> records.audit.append(Event(route="/v1/generate", outcome="done", status=200))
    >>> records.close()
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self, cast

from starlette.requests import Request

from dermaflux.bundle import Bundle
from dermaflux.licence import LicenceError
from dermaflux.marks import Marker
from dermaflux.policy import Policy, judge_bundle
from serving.audit.log import AuditLog, Fsync, Rules
from serving.audit.middleware import RETRY_SECONDS, recorded
from serving.audit.record import MAX_RESULTS
from serving.audit.secret import AuditError
from serving.replies import Refusal
from serving.settings import SettingError, Settings

UNRECORDED: Final = (
    "What is done here has to be recorded, and cannot be at the moment; come back later."
)


@dataclass(frozen=True)
class Records:
    """The open audit log and the marker; None where the settings name no folder for it."""

    audit: AuditLog | None = None
    marker: Marker | None = None

    @classmethod
    def open(cls, settings: Settings, bundle: str) -> Self:
        """Open both for a bundle's id; what is not there yet is made.

        Raises:
            SettingError: one setting lacks another.
            MarksError, RegistryError: keys do not do, or their folder takes no files.
            AuditError: the log cannot be written, or is not as it was left.
        """
        if settings.audit is not None and settings.audit_key is None:
            raise SettingError(
                "DERMAFLUX_AUDIT needs DERMAFLUX_AUDIT_KEY: a file on another volume than the log, "
                "such as /etc/dermaflux/audit.key, made where there is none"
            )
        if settings.watermark and settings.marks is None:
            raise SettingError(
                "DERMAFLUX_WATERMARK needs DERMAFLUX_MARKS: the folder of the watermark's key"
            )
        marker = None
        if settings.marks is not None:
            marker = Marker.open(settings.marks, bundle, watermark=settings.watermark)
            marker.registry.add()  # of no hash: whether it takes any
        audit = None
        if settings.audit is not None and settings.audit_key is not None:
            fsync = cast(Fsync, settings.audit_fsync)
            rules = Rules(required=settings.audit_required, fsync=fsync)
            audit = AuditLog.open(settings.audit, settings.audit_key, rules)
        return cls(audit, marker)

    def close(self) -> None:
        """Flush the audit log and let it go."""
        if self.audit is not None:
            self.audit.close()


def check(settings: Settings, bundle: Bundle) -> None:
    """Nothing, where the policy lets the bundle serve and all that is to be kept can be kept.

    Raises:
        LicenceError: the policy forbids the bundle, by ingredient, with what can be done.
        SettingError, MarksError, RegistryError, AuditError: see `Records.open`.
    """
    policy = Policy.of(settings.policy)
    verdict = judge_bundle(bundle, policy, classifier=settings.classifier)
    try:
        verdict.require()
    except LicenceError as error:
        if verdict.allowed_without_classifier:
            raise LicenceError(f"{error}. DERMAFLUX_CLASSIFIER=0 leaves it out") from None
        raise
    Records.open(settings, bundle.id).close()


async def note(request: Request, results: Sequence[str]) -> None:
    """Leave what came out, sha256 in hex, for the line of this request; more than fit into one
    are recorded at once, before.

    Raises:
        Refusal: 503, it cannot be recorded and has to be.
    """
    rest = list(results)
    while len(rest) > MAX_RESULTS:
        await record(request, rest[:MAX_RESULTS])
        rest = rest[MAX_RESULTS:]
    request.state.results = rest


async def failed(request: Request, code: str) -> None:
    """Record why a stream ends without the rest of its results."""
    # The stream has ended as it is; the log tells by itself what it could not take.
    with contextlib.suppress(AuditError):
        await recorded(request, code, [])


async def record(request: Request, results: Sequence[str], outcome: str = "done") -> None:
    """Record results now, before they are sent in a stream.

    Raises:
        Refusal: 503, it cannot be recorded and has to be: they must not be sent.
    """
    try:
        await recorded(request, outcome, results)
    except AuditError:
        headers = {"Retry-After": RETRY_SECONDS}
        raise Refusal(503, "not_ready", UNRECORDED, headers=headers) from None
