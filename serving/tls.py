"""HTTPS, and clients that prove who they are by a certificate, from three settings.

    DERMAFLUX_TLS_CERT=tls.crt DERMAFLUX_TLS_KEY=tls.key            # HTTPS
    DERMAFLUX_TLS_CA=clients.crt                                     # and only such clients (mTLS)

BentoML's own default of ciphers lets TLS 1.2 agree on AES in CBC mode with SHA-1. Ours are those
with a key exchange that keeps recorded traffic secret and with authenticated encryption (Mozilla's
"intermediate" profile without finite-field Diffie-Hellman); TLS 1.3 has no others, and versions
before 1.2 have none of them, so they cannot be agreed on whatever the machine's OpenSSL allows.

A new certificate is taken at the next start; there is no list of revoked ones. Kubernetes' probes
bring no certificate, so with mTLS let them run a command, or end TLS before the service.
"""

from __future__ import annotations

import ssl
from typing import Any, Final

from serving.settings import SettingError, Settings

CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
TRAP: Final = "TLSv1"
"""BentoML's default of `ciphers`, which an operator who sets `ssl` there by himself keeps."""


def options(settings: Settings) -> dict[str, Any]:
    """BentoML's `ssl` section for these settings, empty where they name no certificate.

    Raises:
        SettingError: one of certificate and key is missing, or a file is not what it should be.
    """
    cert, key, authorities = settings.tls_cert, settings.tls_key, settings.tls_ca
    if cert is None and key is None and authorities is None:
        return {}
    if cert is None or key is None:
        missing = "DERMAFLUX_TLS_CERT" if cert is None else "DERMAFLUX_TLS_KEY"
        raise SettingError(f"{missing} is not set; HTTPS needs a certificate and its key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # BentoML hands a password over on the command line, where everybody on the machine reads it.
    pair = f"DERMAFLUX_TLS_CERT={cert} and DERMAFLUX_TLS_KEY={key}"
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"{pair} are no certificate with its key, both as PEM and the key not encrypted: "
            f"{_reason(error)}"
        ) from None
    found: dict[str, Any] = {
        "enabled": True,
        "certfile": str(cert.absolute()),
        "keyfile": str(key.absolute()),
        "version": int(ssl.PROTOCOL_TLS_SERVER),
        "ciphers": CIPHERS,
    }
    if authorities is None:
        return found
    try:
        context.load_verify_locations(authorities)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"DERMAFLUX_TLS_CA={authorities} has no certificates as PEM: {_reason(error)}"
        ) from None
    return {**found, "ca_certs": str(authorities.absolute()), "cert_reqs": int(ssl.CERT_REQUIRED)}


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
