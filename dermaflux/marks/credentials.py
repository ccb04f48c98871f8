"""Signed provenance: a C2PA manifest in PNG, JPEG and WebP, made and read without a network.

It says that a trained model made the picture (IPTC's `trainedAlgorithmicMedia`), with which bundle
and request, and the SHA-256 of the exact pixels before any mark. It has no thumbnail, so that it
takes 3.6 kB and not 33. The prompt is not in it, only a keyed hash: captions come from few words,
so a plain hash could be found by trying them all.

    >>> credentials = Credentials(Keys.open(folder))
    >>> data = credentials.sign(encode(pixels, record), "png", {"bundle": ...})
    >>> credentials.read(data).state
    'valid'

The Rust library behind `c2pa` is loaded when the first picture is signed or read (60 ms).
"""

from __future__ import annotations

import importlib
import io
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from dermaflux import __version__
from dermaflux.images import SOURCE_TYPE, Form
from dermaflux.marks.certificates import MarksError
from dermaflux.marks.keys import Keys

State = Literal["absent", "valid", "edited", "broken"]

RECORD: Final = "dermaflux.generation"
"""Label of our assertion."""
REMOTE: Final = "Remote"
"""The problem of a file that has no manifest, and names an address of one, which is not asked."""

_SETTINGS: Final[Mapping[str, Any]] = {
    "version": 1,
    "builder": {"thumbnail": {"enabled": False}},
    # What is signed is read back by our tests, not each time.
    "verify": {
        "verify_after_sign": False,
        # A picture may name an address for its manifest: whoever sends it must not make us ask.
        "remote_manifest_fetch": False,
        "ocsp_fetch": False,
    },
    "core": {"allowed_network_hosts": []},
}
_UNTRUSTED: Final = "signingCredential.untrusted"
_CHANGED: Final = "assertion.dataHash.mismatch"


@dataclass(frozen=True)
class Manifest:
    """What a picture's manifest says, and how much of it holds.

    `state` is `absent`; `valid`; `edited`, where the manifest is as it was signed but the file
    around it is another: changed since, or one that the manifest was copied into; or `broken`,
    where it cannot be read, was changed itself, or has expired. `trusted` is whether the signer is
    among the anchors: without it anybody may have signed. `record` is our assertion as it was
    signed; `problems` are C2PA's codes.
    """

    state: State
    trusted: bool = False
    signer: str | None = None
    source_type: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def believed(self) -> bool:
        """Whether what it says was said by a trusted signer, be it of another file."""
        return self.trusted and self.state in ("valid", "edited")

    @property
    def synthetic(self) -> bool:
        """Whether it says that a trained model made the picture."""
        return self.source_type == SOURCE_TYPE


class Credentials:
    """Signs with a site's keys and reads with its anchors; without keys it only reads."""

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys = keys
        self._lock = threading.Lock()
        self._signer: Any = None
        self._context: Any = None

    def sign(self, data: bytes, form: Form, record: Mapping[str, Any]) -> bytes:
        """The file with a manifest that carries `record`, plain JSON values.

        Raises:
            MarksError: the certificate does not do, or has expired.
        """
        keys = self._keys
        assert keys is not None, "only reads"
        now, signer = datetime.now(UTC), keys.signer
        if not signer.not_before <= now < signer.not_after:
            raise MarksError(
                f"the certificate {signer.subject} is valid from {signer.not_before:%Y-%m-%d} to "
                f"{signer.not_after:%Y-%m-%d}, and it is {now:%Y-%m-%d}: set the clock, or put "
                "another certificate there"
            )
        manifest = {
            "claim_generator_info": [{"name": "DermaFlux", "version": __version__}],
            "assertions": [
                {
                    "label": "c2pa.actions.v2",
                    "data": {
                        "actions": [
                            {
                                "action": "c2pa.created",
                                "digitalSourceType": SOURCE_TYPE,
                                "when": f"{now:%Y-%m-%dT%H:%M:%SZ}",
                                "softwareAgent": {"name": "DermaFlux", "version": __version__},
                            }
                        ]
                    },
                },
                {"label": RECORD, "data": dict(record)},
            ],
        }
        out = io.BytesIO()
        c2pa, context = self._library()
        # A signer is one handle of the library's; signing takes a millisecond.
        with self._lock:
            try:
                if self._signer is None:
                    info = c2pa.C2paSignerInfo(
                        signer.algorithm.encode(), keys.chain, keys.key, None
                    )
                    self._signer = c2pa.Signer.from_info(info)
                builder = c2pa.Builder(json.dumps(manifest), context=context)
                builder.sign(self._signer, _media(form), io.BytesIO(data), out)
            except c2pa.C2paError as error:
                raise MarksError(
                    f"C2PA does not sign with the certificate {signer.subject}: {error}"
                ) from error
        return out.getvalue()

    def read(self, data: bytes, form: str | None = None) -> Manifest:
        """The manifest of a file, and what holds of it. Nothing in a file makes this fail.

        `form` is `png`, `jpeg` or `webp`; if it is not given it is taken from the first bytes.
        """
        c2pa, context = self._library()
        try:
            with c2pa.Reader(
                _media(form or _form(data)), io.BytesIO(data), context=context
            ) as reader:
                told = json.loads(reader.json())
        except c2pa.C2paError as error:
            words = str(error)
            if isinstance(error, c2pa.C2paError.ManifestNotFound):
                return Manifest("absent")
            code = words.split(":")[0][:80]
            return Manifest("absent" if code == REMOTE else "broken", problems=(code,))
        return _read(told)

    def _library(self) -> tuple[Any, Any]:
        try:
            c2pa = importlib.import_module("c2pa")
        except ImportError as error:
            raise MarksError(
                "marks need the package c2pa-python; install it with: pip install dermaflux[marks]"
            ) from error
        with self._lock:
            if self._context is None:
                settings = dict(_SETTINGS)
                if self._keys is not None:
                    settings["trust"] = {"trust_anchors": self._keys.anchors.decode("ascii")}
                self._context = c2pa.Context.from_dict(settings)
        return c2pa, self._context


def _media(form: str) -> str:
    return f"image/{form}"


def _form(data: bytes) -> str:
    if data.startswith(b"\xff\xd8"):
        return "jpeg"
    return "webp" if data[:4] == b"RIFF" else "png"


def _read(told: Mapping[str, Any]) -> Manifest:
    """From the library's report, whose form is its own: what is missing is taken as not shown."""
    active = told.get("manifests", {}).get(told.get("active_manifest"), {})
    results = told.get("validation_results", {}).get("activeManifest", {})
    passed = _codes(results.get("success"))
    failed = [code for code in _codes(results.get("failure")) if code != _UNTRUSTED]
    assertions = {one.get("label"): one.get("data", {}) for one in active.get("assertions", [])}
    actions = [
        action
        for label in ("c2pa.actions.v2", "c2pa.actions")
        for action in assertions.get(label, {}).get("actions", [])
    ]
    if told.get("validation_state") in ("Valid", "Trusted"):
        state: State = "valid"
    else:
        edited = set(failed) == {_CHANGED} and "claimSignature.validated" in passed
        state = "edited" if edited else "broken"
    record = assertions.get(RECORD, {})
    signature = active.get("signature_info") or {}
    names = (signature.get("common_name"), signature.get("issuer"))
    return Manifest(
        state,
        trusted="signingCredential.trusted" in passed,
        signer=", ".join(str(name) for name in names if name)[:200] or None,
        source_type=next(
            (str(one["digitalSourceType"]) for one in actions if one.get("digitalSourceType")), None
        ),
        record=record if isinstance(record, dict) else {},
        problems=tuple(dict.fromkeys(failed)),
    )


def _codes(entries: Sequence[Mapping[str, Any]] | None) -> list[str]:
    return [str(one.get("code")) for one in entries or ()]
