"""Certificates for signing images: made as C2PA wants them, and checked against their key.

    >>> chain, authority, key = made(datetime.now(UTC))
    >>> checked(chain, key).algorithm
    'es256'

A self-made authority signs one certificate and its own key is forgotten at once: nobody can steal
what is not there. Without a timestamp from outside, which a closed network has not, a signature
holds as long as its certificate: hence ten years.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from dermaflux.errors import DermaFluxError

YEARS: Final = 10


class MarksError(DermaFluxError):
    """Keys or certificates for marks cannot be read, do not fit together, or have expired."""


@dataclass(frozen=True)
class Signer:
    """Who a certificate says signs, how (C2PA's `es256`, `es384`, `ps256`, `ed25519`), and when."""

    subject: str
    algorithm: str
    not_before: datetime
    not_after: datetime


def made(now: datetime) -> tuple[bytes, bytes, bytes]:
    """A new chain, its authority's certificate and the signing key, all in PEM.

    ES256, with the usages that C2PA 2's certificate profile asks of a signer.

    Raises:
        MarksError: the package `cryptography` is not installed.
    """
    x509, hashes, ec, serialization = _cryptography()
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    authority_key = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    # Who looks at a picture of another site shall see that they are two.
    site = secrets.token_hex(4)

    def named(words: str) -> Any:
        return x509.Name([
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "DermaFlux site"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"DermaFlux {words} {site}"),
        ])  # fmt: skip

    def usage(authority: bool) -> Any:
        return x509.KeyUsage(
            digital_signature=not authority, key_cert_sign=authority, crl_sign=authority,
            content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip

    def begun(subject: Any, public: Any, authority: bool) -> Any:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(named("authority"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            # Clocks of a closed network may differ by hours.
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=365 * YEARS))
            .add_extension(x509.BasicConstraints(authority, 0 if authority else None), True)
            .add_extension(usage(authority), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
        )

    top = begun(named("authority"), authority_key.public_key(), True)
    leaf = (
        begun(named("images"), key.public_key(), False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), False
        )
    )
    pem = [
        one.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        for one in (leaf, top)
    ]
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return b"".join(pem), pem[1], private


def certificates(data: bytes) -> list[Any]:
    """The certificates of a PEM file, at least one.

    Raises:
        MarksError: it holds none, or a damaged one.
    """
    x509 = _cryptography()[0]
    try:
        found: list[Any] = x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise MarksError(f"no certificates in PEM: {error}") from error
    return found


def checked(chain: bytes, key: bytes) -> Signer:
    """The signer of a chain, whose first certificate is the one of `key`.

    Raises:
        MarksError: they do not belong together, or are of a kind that C2PA does not take.
    """
    leaf = certificates(chain)[0]
    _, _, ec, serialization = _cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    try:
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise MarksError(f"the key is not one in PEM without a password: {error}") from error
    public = private.public_key()
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    encoded = [
        one.public_bytes(serialization.Encoding.DER, kind) for one in (public, leaf.public_key())
    ]
    if encoded[0] != encoded[1]:
        raise MarksError(
            "the key is not that of the first certificate; put the two that belong together "
            "there, the signing certificate first"
        )
    curves = {"secp256r1": "es256", "secp384r1": "es384"}
    if isinstance(public, rsa.RSAPublicKey):
        algorithm = "ps256"
    elif isinstance(public, ed25519.Ed25519PublicKey):
        algorithm = "ed25519"
    elif isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name in curves:
        algorithm = curves[public.curve.name]
    else:
        raise MarksError(
            "the key is of a kind that C2PA does not take; use ECDSA on P-256 or P-384, Ed25519, "
            "or RSA"
        )
    return Signer(
        leaf.subject.rfc4514_string(),
        algorithm,
        leaf.not_valid_before_utc,
        leaf.not_valid_after_utc,
    )


def _cryptography() -> tuple[Any, Any, Any, Any]:
    """x509, hashes, ec and serialization of `cryptography`.

    Raises:
        MarksError: it is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise MarksError(
            "marks need the package cryptography; install it with: pip install dermaflux[marks]"
        ) from error
    return x509, hashes, ec, serialization
