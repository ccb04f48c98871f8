"""Who is calling, and what they may do.

With keys (`DERMAFLUX_KEYS`, see `serving.keyring`) every route but the probes, the page and the
document wants one, in `Authorization: Bearer` or `X-API-Key`, and its roles decide. Without keys
the service answers its own machine alone, or everybody where `DERMAFLUX_OPEN=1` says so, and a key
that comes all the same is not looked at. `DERMAFLUX_ANONYMOUS_ROLES` are what such callers may do:
free text is not among them by default, for the wording of `lesion` cannot name a person.

    generate    draw lesions by their attributes
    classify    have photographs classified
    free-text   describe what is drawn in words of one's own
    admin       read the metrics, and more of the queue and the model card

A wrong key tells its sender nothing but that. Guessing is hopeless with 256 bits, so failures are
bounded per address for the sake of the log alone, and never keep out a key that is right: else
whoever shares the address of a hospital's proxy could lock out everybody behind it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from starlette.requests import Request

from dermaflux.errors import DermaFluxError
from serving.addresses import Failures, names_this_machine, network, outside
from serving.keyring import ANONYMOUS, Keyring, Role
from serving.replies import Refusal
from serving.settings import Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

PASSED_ON: Final = ("forwarded", "via", "x-forwarded-for", "x-real-ip")
"""Headers that a proxy adds; not every proxy does, so behind one there should be keys."""
MAX_KEY: Final = 200
"""Characters; ours have 53. What is longer is not hashed."""


class ClosedDoorError(DermaFluxError):
    """The service would listen on an address of a network without asking for keys."""


@dataclass(frozen=True)
class Caller:
    """Who sent a request: the id of a key, or nobody known at an address."""

    name: str
    roles: frozenset[Role]
    address: str = ""
    keyed: bool = False
    """Whether keys are asked for here at all; without, nothing is kept from anybody let in."""

    @property
    def lane(self) -> str:
        """What shares one turn in the queue: all requests of a key, or of an unknown network."""
        return self.name if self.name != ANONYMOUS else f"{ANONYMOUS} {network(self.address)}"

    def may(self, role: Role) -> bool:
        """Whether this caller has `role`; `admin` is for everybody where there are no keys."""
        return role in self.roles or (role == "admin" and not self.keyed)


class Access:
    """Turns a request's headers and address into its caller."""

    def __init__(
        self,
        settings: Settings,
        keyring: Keyring | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keyring = keyring
        self._open = settings.open
        self._anonymous = cast(frozenset[Role], frozenset(settings.anonymous_roles))
        self._failures = Failures(clock)

    @classmethod
    def of(cls, settings: Settings) -> Access:
        """Read the keys that the settings name.

        Raises:
            KeysError: the file or the variable is wrong.
        """
        return cls(settings, keyring_of(settings))

    def caller(self, request: Request) -> Caller:
        """Who sent the request.

        Raises:
            Refusal: 401, no key or a wrong one, or a stranger where there are no keys; 429, too
                many wrong ones.
        """
        address = request.client.host if request.client else ""
        if self._keyring is None:
            return self._stranger(request, address)
        given = _given(request)
        if not given:
            raise _unauthorized(
                "Send a key, as `Authorization: Bearer KEY` or `X-API-Key: KEY`; whoever runs this "
                "service gives them out."
            )
        for key in given:
            entry = self._keyring.find(key)
            if entry is not None:
                return Caller(entry.id, frozenset(entry.roles), address, keyed=True)
        wait = self._failures.count(network(address))
        if wait:
            raise Refusal(
                429,
                "busy",
                "Too many wrong keys came from this address.",
                headers={"Retry-After": str(wait)},
            )
        logger.warning("a wrong key from %s", address or "an unknown address")
        raise _unauthorized("The key is not known, has expired or was revoked.", wrong=True)

    def _stranger(self, request: Request, address: str) -> Caller:
        """A caller where there are no keys."""
        # Over a network, not in process as in tests; by another name than this machine's own.
        renamed = network(address) and not names_this_machine(request.headers.get("host", ""))
        # A proxy on this machine hands on strangers as if they were of it.
        passed_on = any(name in request.headers for name in PASSED_ON)
        if not self._open and (outside(address) or renamed or passed_on):
            raise _unauthorized(
                "This service has no keys, so it answers its own machine alone, as localhost and "
                "through no proxy. Its "
                "operator can make some with `python -m serving.keys new`, or let everybody in."
            )
        if request.method == "POST" and request.headers.get("sec-fetch-site") == "cross-site":
            raise Refusal(403, "forbidden", "Pages of other sites may not use this service.")
        return Caller(ANONYMOUS, self._anonymous, address)


class Admission:
    """Leaves the caller, or why there is none, in the request's state. Plain ASGI."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            try:
                request.state.caller = self._access.caller(request)
            except Refusal as error:
                request.state.refused = error
        await self._app(scope, receive, send)


def caller_of(request: Request) -> Caller:
    """The caller that `Admission` found.

    Raises:
        Refusal: 401 or 429, there is none.
    """
    if not hasattr(request.state, "caller"):
        raise cast(Refusal, request.state.refused)
    return cast(Caller, request.state.caller)


def require(request: Request, role: Role) -> Caller:
    """The caller, who may do what `role` is for.

    Raises:
        Refusal: 401 there is none, 403 it may not.
    """
    caller = caller_of(request)
    if not caller.may(role):
        whose = "This key" if caller.keyed else "A caller without a key"
        challenge = f'Bearer realm="DermaFlux", error="insufficient_scope", scope="{role}"'
        raise Refusal(
            403,
            "forbidden",
            f"{whose} may not do that; the role {role} is needed.",
            headers={"WWW-Authenticate": challenge},
        )
    return caller


def keyring_of(settings: Settings) -> Keyring | None:
    """The keys that the settings name, None where they name none.

    Raises:
        KeysError: the file or the variable is wrong.
    """
    if settings.keys is None and not settings.keys_inline:
        return None
    return Keyring(settings.keys, settings.keys_inline)


def refuse_open_door(settings: Settings, host: str | None) -> None:
    """Nothing, unless strangers would be answered that nobody meant to let in.

    `host` is the address to listen on, None where it is not known: callers from elsewhere are then
    refused one by one (401).

    Raises:
        ClosedDoorError: it is no address of this machine alone, there are no keys, and
            `DERMAFLUX_OPEN` does not say that this is meant.
        KeysError: the keys are wrong.
    """
    if keyring_of(settings) is not None or settings.open or host is None or not outside(host):
        return
    raise ClosedDoorError(
        f"the service would listen on {host} without keys, so whoever reaches this machine could "
        "use it. Listen on this machine alone with --host 127.0.0.1, or make keys with "
        "`python -m serving.keys new --id NAME --roles generate,classify --file keys.jsonl` and "
        "name the file in DERMAFLUX_KEYS, or say DERMAFLUX_OPEN=1 if that is meant"
    )


def _given(request: Request) -> list[str]:
    """The keys of a request, as both headers may carry one: a proxy may have set the other."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = [token.strip()] if scheme.lower() == "bearer" else []
    given.append(request.headers.get("x-api-key", "").strip())
    return [key[:MAX_KEY] for key in dict.fromkeys(given) if key]


def _unauthorized(message: str, *, wrong: bool = False) -> Refusal:
    challenge = 'Bearer realm="DermaFlux"' + (', error="invalid_token"' if wrong else "")
    return Refusal(401, "unauthorized", message, headers={"WWW-Authenticate": challenge})
