"""What an operator may set: one frozen dataclass, read from `DERMAFLUX_*` variables at start-up.

Environment variables, since that is what containers and service files hand over. Nothing is read
at import, an unknown or senseless value stops the start with a sentence, and what is in force is
shown by `GET /v1/model`.

    DERMAFLUX_BUNDLE=bundles/mini DERMAFLUX_WAITING=4 bentoml serve serving.service:DermaFlux
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dermaflux.errors import DermaFluxError
from dermaflux.tiers import CLASSIFIER_TIERS, TIERS
from serving.audit.log import FSYNC
from serving.keyring import ROLES

PREFIX = "DERMAFLUX_"
LOG_FORMS = ("text", "json")


class SettingError(DermaFluxError):
    """A `DERMAFLUX_*` variable is unknown or out of range."""


@dataclass(frozen=True)
class Settings:
    """One field per variable: `deadline_seconds` is `DERMAFLUX_DEADLINE_SECONDS`."""

    bundle: Path | None = field(
        default=None,
        metadata={"help": "bundle folder; bundles/mini beside the working folder if not given"},
    )
    engine: str | None = field(
        default=None, metadata={"help": "force one engine, such as onnxruntime-cpu"}
    )
    precision: str | None = field(
        default=None, metadata={"help": "force one precision, such as fp32"}
    )
    tier: str | None = field(
        default=None,
        metadata={
            "help": "what drawing may give up for speed: lossless, fp8, int8, or cached, which "
            "forecasts steps; the fastest precision, every step computed, if not given",
            "of": TIERS,
        },
    )
    classifier_tier: str | None = field(
        default=None,
        metadata={
            "help": "the same of the classifier: lossless, int8, fp8, or pruned, which looks at "
            "fewer pieces of the photograph; the fastest precision if not given",
            "of": CLASSIFIER_TIERS,
        },
    )
    threads: int | None = field(
        default=None, metadata={"help": "threads per engine; all cores if not given", "min": 1}
    )
    deadline_seconds: float = field(
        default=120.0,
        metadata={"help": "longest time a request may take, its wait included", "min": 1},
    )
    waiting: int = field(
        default=8,
        metadata={
            "help": "images that may wait behind those that are drawn; more get 429",
            "min": 0,
        },
    )
    batch: int | None = field(
        default=None,
        metadata={
            "help": "images that are drawn together; measured right after the start if not given; "
            "1 is one after the other",
            "min": 1,
        },
    )
    open_requests: int = field(
        default=64,
        metadata={"help": "requests whose reply is being made; more get 429", "min": 1},
    )
    max_upload_bytes: int = field(
        default=20_000_000, metadata={"help": "largest upload to classify", "min": 1_000}
    )
    max_batch_files: int = field(
        default=32, metadata={"help": "files of one form to classify", "min": 1}
    )
    max_batch_bytes: int = field(
        default=100_000_000,
        metadata={"help": "largest form of several files to classify", "min": 1_000},
    )
    photographs: int = field(
        default=128,
        metadata={
            "help": "photographs in work or waiting to be classified; more get 429",
            "min": 1,
        },
    )
    max_json_bytes: int = field(
        default=64_000, metadata={"help": "largest JSON request", "min": 1_000}
    )
    max_images: int = field(
        default=8, metadata={"help": "most images that one request may ask for", "min": 1}
    )
    golden: bool = field(
        default=True,
        metadata={
            "help": "1: take requests only once the bundle's golden image came out right; "
            "0: do not compare, and say so in the model card"
        },
    )
    keys: Path | None = field(
        default=None,
        metadata={
            "help": "file of API keys, made by python -m serving.keys; re-read as it changes"
        },
    )
    keys_inline: str | None = field(
        default=None, metadata={"help": "lines of such a file, for containers without one"}
    )
    open: bool = field(
        default=False,
        metadata={"help": "1: without keys, answer not this machine alone but whoever reaches it"},
    )
    anonymous_roles: tuple[str, ...] = field(
        default=("generate", "classify"),
        metadata={"help": "what callers without a key may do where there are no keys", "of": ROLES},
    )
    metrics_open: bool = field(
        default=False, metadata={"help": "1: /metrics for everybody, though there are keys"}
    )
    tls_cert: Path | None = field(
        default=None, metadata={"help": "PEM file of the certificate and its chain: serve HTTPS"}
    )
    tls_key: Path | None = field(
        default=None, metadata={"help": "PEM file of the certificate's private key, not encrypted"}
    )
    tls_ca: Path | None = field(
        default=None,
        metadata={
            "help": "PEM file of authorities: take only clients with a certificate of theirs"
        },
    )
    log: str = field(
        default="text", metadata={"help": "form of the log, a line a record", "of": LOG_FORMS}
    )
    otel_endpoint: str | None = field(
        default=None,
        metadata={"help": "address that takes OTLP traces over HTTP, such as .../v1/traces"},
    )
    policy: str = field(
        default="research",
        metadata={"help": "private, research, commercial or a YAML file: licences that may serve"},
    )
    classifier: bool = field(
        default=True, metadata={"help": "0: leave the bundle's classifier out; nothing loads it"}
    )
    audit: Path | None = field(
        default=None, metadata={"help": "folder of the audit log, begun where there is none"}
    )
    audit_key: Path | None = field(
        default=None,
        metadata={"help": "file of the key that seals the audit log; on another volume than it"},
    )
    audit_required: bool = field(
        default=True,
        metadata={"help": "1: what cannot be recorded is not answered (503); 0: it is told later"},
    )
    audit_fsync: str = field(
        default="second",
        metadata={
            "help": "when the audit log waits for the disk: each answer, once a second at "
            "most, or never",
            "of": FSYNC,
        },
    )
    audit_addresses: bool = field(
        default=False, metadata={"help": "1: addresses of callers stand in the audit log too"}
    )
    marks: Path | None = field(
        default=None,
        metadata={
            "help": "folder of the keys that sign images and of the registry of their pixels; "
            "keys are made where there are none"
        },
    )
    watermark: bool = field(
        default=False,
        metadata={
            "help": "1: an invisible watermark too. Not for pictures to train on: a classifier "
            "can learn it instead of the lesion"
        },
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the variables; those left out or empty keep their default.

        Raises:
            SettingError: a variable with our prefix is unknown, or its value is not one it takes.
        """
        known = {PREFIX + item.name.upper(): item for item in fields(cls)}
        unknown = sorted(
            name for name in environment if name.startswith(PREFIX) and name not in known
        )
        if unknown:
            raise SettingError(f"{unknown[0]} is not a setting; use {', '.join(sorted(known))}")
        values: dict[str, object] = {}
        for variable, item in known.items():
            text = environment.get(variable, "").strip()
            if not text:
                continue
            values[item.name] = _value(variable, text, str(item.type), item.metadata)
        return cls(**values)  # type: ignore[arg-type]


def _value(variable: str, text: str, kind: str, metadata: Mapping[str, Any]) -> object:
    """The value of a field of this type (as it is written in the class) from its text."""
    if kind.startswith("Path"):
        return Path(text)
    if kind == "bool":
        return _switch(variable, text)
    if kind.startswith(("int", "float")):
        return _number(variable, text, metadata["min"], whole=kind.startswith("int"))
    if kind.startswith("tuple"):
        return _names(variable, text, metadata["of"])
    if "of" in metadata and text not in metadata["of"]:
        raise SettingError(f"{variable} is {text!r}; it needs {' or '.join(metadata['of'])}")
    return text


def _names(variable: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    given = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in given:
        if name not in known:
            raise SettingError(f"{variable} has {name!r}; it takes {', '.join(known)}")
    return given


def _switch(variable: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise SettingError(f"{variable} is {text!r}; it needs 0 or 1")
    return text == "1"


def _number(variable: str, text: str, least: float, *, whole: bool) -> float:
    kind = "a whole number" if whole else "a number"
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise SettingError(f"{variable} is {text!r}; it needs {kind}") from None
    if not least <= value < 1e12:  # also false for NaN
        raise SettingError(f"{variable} is {text}; it needs {kind} of at least {least}")
    return value
