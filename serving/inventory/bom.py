"""Bills of materials in CycloneDX 1.6: of the software, and of the models of a bundle.

Plain JSON, for the form is small and what reads it checks it; equal inputs give equal bytes:
sorted, numbered by a hash of the content, and without a time unless one is given.

    >>> text = written(software(packages, "0.1.0"))
    >>> json.loads(text)["specVersion"]
    '1.6'

The form: https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dermaflux.errors import DermaFluxError
from serving.audit.record import stamp
from serving.inventory.packages import Package

SPEC: Final = "1.6"
APPLICATION: Final = "pkg:generic/dermaflux"
_SPACE: Final = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")
"""RFC 4122's name space of addresses."""


def software(packages: Sequence[Package], version: str, time: str = "") -> dict[str, Any]:
    """The bill of DermaFlux and the libraries that run with it."""
    reference = f"{APPLICATION}@{version}"
    top = {
        "type": "application",
        "bom-ref": reference,
        "name": "dermaflux",
        "version": version,
        "description": "Draws synthetic skin lesions and classifies photographs of lesions. "
        "Research use only; not a medical device.",
        "licenses": licences("Apache-2.0"),
        "purl": reference,
    }
    known = {one.name: one for one in packages}
    depends = {reference: [one.purl for one in packages if one.asked]}
    depends |= {one.purl: [known[name].purl for name in one.needs] for one in packages}
    return finished(top, [_library(one) for one in packages], depends, time)


def finished(
    top: Mapping[str, Any],
    components: Sequence[Mapping[str, Any]],
    depends: Mapping[str, Sequence[str]],
    time: str = "",
) -> dict[str, Any]:
    """A whole document about `top`; `time`, if any, is ISO 8601 in UTC."""
    body = {
        "components": sorted(components, key=lambda one: str(one["bom-ref"])),
        "dependencies": [
            {"ref": one, "dependsOn": sorted(set(depends[one]))} for one in sorted(depends)
        ],
    }
    content = json.dumps([top, body], sort_keys=True)
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, content)}",
        "version": 1,
        "metadata": {**({"timestamp": time} if time else {}), "component": dict(top)},
        **body,
    }


def written(document: Mapping[str, Any]) -> str:
    """The document as it lies in a file."""
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def moment(text: str) -> str:
    """A time that was given, as documents have it: UTC, seconds.

    Raises:
        DermaFluxError: it is none.
    """
    from datetime import UTC, datetime

    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise DermaFluxError(
            f"{text!r} is no time; it needs a form such as 2026-01-31T09:00:00Z"
        ) from None
    return stamp(found if found.tzinfo else found.replace(tzinfo=UTC))[:19] + "Z"


def licences(expression: str) -> list[dict[str, Any]]:
    """`licenses` of a component: one SPDX id, or an expression."""
    if " " in expression:
        return [{"expression": expression}]
    return [{"license": {"id": expression}}]


def hashed(sha256: str) -> list[dict[str, str]]:
    """`hashes` of a component."""
    return [{"alg": "SHA-256", "content": sha256}]


def _library(one: Package) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "library",
        "bom-ref": one.purl,
        "name": one.name,
        "version": one.version,
        "description": one.summary,
        "scope": "required",
        "licenses": licences(one.licence),
        "purl": one.purl,
    }
    if one.maker:
        found["authors"] = [{"name": one.maker}]
    if one.sha256:
        found["hashes"] = hashed(one.sha256)
    links = {
        "vcs" if "github.com" in one.home else "website": one.home,
        "issue-tracker": one.issues,
    }
    found["externalReferences"] = [
        {"type": kind, "url": url} for kind, url in sorted(links.items()) if url
    ]
    return found
