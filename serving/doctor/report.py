"""Everything that has to be right before a hospital is served, in one report.

    >>> report(settings, Path("bundles/mini")).healthy
    True

The core's doctor tells whether the bundle is whole, which engines run it and whether it fits in
memory; here stand licences under the site's policy, keys and certificates, the audit log, the
machine, and packages that settings ask for. Nothing is changed, no engine is loaded, no address is
asked.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from dermaflux import doctor
from dermaflux.bundle import Bundle
from dermaflux.errors import BundleError
from dermaflux.licence import USES, LicenceError
from dermaflux.policy import Policy, judge_bundle
from serving.audit import ending
from serving.audit.secret import AuditError, Secrets
from serving.doctor import access, machine
from serving.doctor.finding import FAIL, NOTE, OK, Finding, planned
from serving.settings import Settings

DEFAULT_POLICY: Final = "research"
_NEEDED: Final = {"bentoml": "bentoml", "pydantic": "pydantic", "starlette": "starlette"}
PYTHON: Final = ((3, 11), (3, 13))
"""From, and before, as pyproject.toml has it."""


@dataclass(frozen=True)
class Report:
    """All findings. `core` is the report of `dermaflux.doctor`, where it was asked for."""

    bundle: str
    id: str | None
    findings: tuple[Finding, ...]
    core: doctor.Report | None = None

    @property
    def healthy(self) -> bool:
        """Whether nothing failed."""
        return all(one.state != FAIL for one in self.findings)

    def __str__(self) -> str:
        width = max((len(one.about) for one in self.findings), default=0) + 2
        return "\n".join(
            f"{one.state:<5}{one.about:<{width}}{one.words}" + f". Do: {one.mend}" * bool(one.mend)
            for one in self.findings
        )

    def counts(self) -> dict[str, int]:
        """How many findings have each state."""
        return {s: sum(one.state == s for one in self.findings) for s in (OK, NOTE, FAIL)}

    def as_json(self) -> dict[str, Any]:
        """Plain values; `healthy` among them. It names files and folders, and no secret."""
        return {
            "bundle": self.bundle,
            "id": self.id,
            "healthy": self.healthy,
            **self.counts(),
            "findings": [asdict(one) for one in self.findings],
            "core": self.core.as_json() if self.core else None,
        }


def report(
    settings: Settings,
    bundle: Path | Bundle,
    *,
    core: bool = True,
    golden: bool = False,
    addresses: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
    now: datetime | None = None,
) -> Report:
    """Look at everything. What is wrong is a finding, not an exception.

    `core` reads every file of the bundle, for its sha256: leave it out where a running service
    answers. `golden` also draws the golden image. `addresses` are HOST:PORT that have to be free.
    """
    variables = os.environ if environment is None else environment
    moment = now or access.utc()
    path = bundle.path if isinstance(bundle, Bundle) else bundle
    found: list[Finding] = []
    looked = None
    if core:
        looked = doctor.examine(
            path,
            settings.engine,
            settings.precision,
            golden=golden,
            tier=settings.tier,
            classifier_tier=settings.classifier_tier,
        )
        found += [Finding(f.about, f.state, f.words) for f in looked.findings]
    opened = bundle if isinstance(bundle, Bundle) else None
    try:
        opened = opened or Bundle.open(path)
    except BundleError as error:
        found += [] if core else [Finding("bundle", FAIL, str(error))]
    found += policy(settings, opened)
    found += access.api_keys(settings, moment)
    found += access.https(settings, moment)
    found += access.signing(settings, moment)
    found += audit(settings, moment)
    found += machine.ports(addresses)
    found += machine.disks(settings, variables)
    found += machine.clock(machine.moment(opened.created) if opened else None, moment)
    found += machine.threads(settings, variables)
    found += machine.process()
    found += packages(settings)
    return Report(str(path), opened.id if opened else None, tuple(found), looked)


def policy(settings: Settings, bundle: Bundle | None) -> list[Finding]:
    """The bundle's licences under the site's policy, with or without its classifier; of the policy
    alone whether there is such a one."""
    named = str(planned(settings, "policy") or DEFAULT_POLICY)
    served = planned(settings, "classifier") is not False
    try:
        rules = Policy.of(named)
        if bundle is None:
            return []
        verdict = judge_bundle(bundle, rules, classifier=served)
    except LicenceError as error:
        mend = f"set DERMAFLUX_POLICY to one of {', '.join(USES)}, or to a file that is there"
        return [Finding("policy", FAIL, str(error), mend)]
    if verdict.allowed:
        terms = verdict.terms or "no terms but naming whom it names"
        return [Finding("policy", OK, f"{named} lets it pass, under {terms}")]
    return [Finding("policy", FAIL, f"{named}: {one}", one.remedy) for one in verdict.refusals]


def audit(settings: Settings, now: datetime) -> list[Finding]:
    """The audit log's end: whole, sealed with the key that is there, not dated in the future."""
    folder, key = planned(settings, "audit"), planned(settings, "audit_key")
    if not isinstance(folder, Path):
        return [Finding("audit", NOTE, "there is no audit log")]
    if not isinstance(key, Path):
        words = f"the audit log {folder} needs a key"
        return [Finding("audit", FAIL, words, "set DERMAFLUX_AUDIT_KEY to a file elsewhere")]
    check = f"python -m serving.audit verify {folder} --key {key}"
    try:
        listed = ending.files_of(folder) if folder.is_dir() else []
        known = bool(listed) or (folder / ending.HEAD).exists()
        if key.exists():
            try:
                Secrets.open(key)
            except AuditError as error:
                return [Finding("audit key", FAIL, str(error), f"cp -p BACKUP_OF_THE_KEY {key}")]
        if not known:
            return [Finding("audit", OK, f"{folder} is begun when the service starts")]
        secrets = Secrets.open(key)
        head = ending.read_head(folder, secrets)
        if not listed:
            words = f"{folder} has no file of lines, and had {head.n if head else 0}"
            return [Finding("audit", FAIL, words, "take the files from the backup")]
        end = ending.last_line(listed[-1], secrets)
        dated = machine.moment(end.time)
    except (AuditError, OSError) as error:
        return [Finding("audit", FAIL, str(error), check)]
    found = []
    if folder.resolve() in key.resolve().parents:
        words = f"the key {key} lies in the log's own folder: who has both can write it anew"
        mend = "mv it to another volume, and set DERMAFLUX_AUDIT_KEY"
        found.append(Finding("audit", NOTE, words, mend))
    if head is None and end.n:
        words = f"{folder} has no {ending.HEAD}: lines may have been cut off its end"
        found.append(Finding("audit", FAIL, words, f"{check} --anchors LOG_OF_THE_SERVICE"))
    if head is not None and head.n > end.n > 0:
        words = f"{folder} ends at line {end.n} and had {head.n}: it was cut off"
        found.append(Finding("audit", FAIL, words, check))
    if end.torn:
        words = "a kill left half a line, which the next start keeps aside and notes"
        found.append(Finding("audit", NOTE, words))
    if dated is not None and dated > now:
        words = f"the last line is dated {dated:%Y-%m-%d %H:%M} UTC, which is to come"
        found.append(Finding("clock", FAIL, words, "date -u, and set the clock"))
    return found or [Finding("audit", OK, f"{folder} has {end.n} lines; to read all: {check}")]


def packages(settings: Settings) -> list[Finding]:
    """Python and what the settings need beside it."""
    found = []
    if not PYTHON[0] <= sys.version_info[:2] < PYTHON[1]:
        version = ".".join(map(str, sys.version_info[:2]))
        found.append(Finding("python", FAIL, f"{version} is not one of 3.11 and 3.12"))
    wanted = dict(_NEEDED)
    if settings.otel_endpoint:
        wanted["opentelemetry.exporter.otlp.proto.http"] = "opentelemetry-exporter-otlp-proto-http"
    if str(planned(settings, "policy") or "").endswith((".yaml", ".yml")):
        wanted["yaml"] = "PyYAML"
    for module, package in wanted.items():
        if not _there(module):
            words = f"{package} is not installed, and is needed"
            mend = f"pip install --constraint constraints.txt {package}"
            found.append(Finding("packages", FAIL, words, mend))
    return found or [Finding("packages", OK, "all that the settings ask for is installed")]


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False
