"""Who gets in, and by what: API keys, certificates, the keys that sign and seal.

>>> api_keys(settings, now)
[Finding(about='keys', state='note', words='the key ward3 expires in 12 days', mend='...')]
"""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from serving import keyring, tls
from serving.doctor.finding import FAIL, NOTE, OK, Finding, planned, private
from serving.keyring import KeysError
from serving.settings import SettingError, Settings

SOON: Final = timedelta(days=30)
"""What expires within it is told: a hospital's certificate takes weeks to come."""
WEAK_RSA: Final = 2048
"""Bits below which an RSA key is told (NIST SP 800-57: 112 bits of security)."""
KEYS: Final = "keys"
"""The folder of keys within that of the marks."""


def api_keys(settings: Settings, now: datetime) -> list[Finding]:
    """The keys' file: readable, its owner's alone, with keys that are valid now and tomorrow."""
    if settings.keys is None and not settings.keys_inline:
        if settings.open:
            words = "there are no keys, and whoever reaches the service may use it"
            return [Finding("keys", NOTE, words, _new("NAME"))]
        words = "there are no keys: the service answers its own machine alone"
        return [Finding("keys", NOTE, words, _new("NAME"))]
    found, entries = [], []
    try:
        if settings.keys is not None:
            found += private("keys", settings.keys, group=True)
            entries += keyring.read(settings.keys)[0]
        if settings.keys_inline:
            entries += keyring.parse(settings.keys_inline, "DERMAFLUX_KEYS_INLINE")
    except KeysError as error:
        return [*found, Finding("keys", FAIL, str(error))]
    valid = [entry for entry in entries if entry.valid(now)]
    for entry in valid:
        if entry.expires is not None and entry.expires - now < SOON:
            days = (entry.expires - now).days
            words = f"the key {entry.id} expires in {days} days"
            found.append(Finding("keys", NOTE, words, _new(entry.id, ",".join(entry.roles))))
    if not valid:
        return [*found, Finding("keys", FAIL, "no key is valid any more", _new("NAME"))]
    roles = {role: sum(role in entry.roles for entry in valid) for role in keyring.ROLES}
    if not roles["admin"]:
        words = "nobody has the role admin, which reads metrics and this report"
        found.append(Finding("keys", NOTE, words, _new("NAME", "admin")))
    told = ", ".join(f"{role} {count}" for role, count in roles.items())
    return [*found, Finding("keys", OK, f"{len(valid)} of {len(entries)} are valid: {told}")]


def https(settings: Settings, now: datetime) -> list[Finding]:
    """The certificate: with its key, taken by OpenSSL, valid now and for a month."""
    try:
        options = tls.options(settings)
    except SettingError as error:
        named = " ".join(str(one) for one in (settings.tls_cert, settings.tls_key) if one)
        return [Finding("tls", FAIL, str(error), f"ls -l {named}")]
    if not options:
        words = "no HTTPS: what is sent can be read on its way, unless a proxy ends TLS before"
        return [Finding("tls", NOTE, words, "set DERMAFLUX_TLS_CERT and DERMAFLUX_TLS_KEY")]
    assert settings.tls_cert is not None, "there are no options without"
    assert settings.tls_key is not None, "there are no options without"
    found = private("tls", settings.tls_key)
    found += certificates("tls", settings.tls_cert, now)
    if settings.tls_ca is not None:
        found += certificates("tls", settings.tls_ca, now)
    return found


def certificates(about: str, file: Path, now: datetime) -> list[Finding]:
    """When the certificates of a PEM file end, and whether their keys are long enough."""
    if importlib.util.find_spec("cryptography") is None:
        words = f"{file} was not read: cryptography is not installed"
        return [Finding(about, NOTE, words, "pip install cryptography")]
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    try:
        chain = x509.load_pem_x509_certificates(file.read_bytes())
    except (OSError, ValueError) as error:
        return [Finding(about, FAIL, f"{file} has no certificate as PEM: {error}")]
    found = []
    for one in chain:
        name = one.subject.rfc4514_string() or f"number {one.serial_number:x}"
        begin, end = one.not_valid_before_utc, one.not_valid_after_utc
        words = f"{file.name}, {name}: valid to {end:%Y-%m-%d}"
        renew = f"put a new certificate into {file} and start the service again"
        if now > end:
            found.append(Finding(about, FAIL, f"{words}, which is over", renew))
        elif now < begin:
            words = f"{file.name}, {name}: valid from {begin:%Y-%m-%d} on, which is to come"
            found.append(Finding(about, FAIL, words, "date -u; if the clock is right, wait"))
        elif end - now < SOON:
            found.append(Finding(about, NOTE, f"{words}, in {(end - now).days} days", renew))
        else:
            found.append(Finding(about, OK, words))
        key = one.public_key()
        if isinstance(key, RSAPublicKey) and key.key_size < WEAK_RSA:
            words = f"{file.name}, {name}: RSA of {key.key_size} bits is weak; {WEAK_RSA} at least"
            found.append(Finding(about, FAIL, words, renew))
    return found


def signing(settings: Settings, now: datetime) -> list[Finding]:
    """The keys with which pictures are signed and the audit log is sealed, where there are any."""
    found: list[Finding] = []
    marks, seal = planned(settings, "marks"), planned(settings, "audit_key")
    if isinstance(marks, Path):
        from dermaflux.marks import keys

        for one in keys.findings(marks / KEYS, now):
            words, _, mend = one.words.partition(". Use: ")
            if one.state == FAIL:
                mend = f"ls -l {marks / KEYS}, and put there what is missing or has ended"
            found.append(Finding("marks", one.state, words, mend))
    if isinstance(seal, Path) and seal.exists():
        wrong = private("audit key", seal)
        words = f"{seal} is its owner's alone; keep a copy elsewhere"
        found += wrong or [Finding("audit key", OK, words)]
    return found


def _new(name: str, roles: str = ",".join(keyring.ROLES)) -> str:
    return f"python -m serving.keys new --id {name} --roles {roles} --file keys.jsonl"


def utc() -> datetime:
    """Now, with its time zone."""
    return datetime.now(UTC)
