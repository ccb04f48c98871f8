"""The libraries that run with DermaFlux: in which version, under which licence, needed by whom.

From `pyproject.toml`, what it asks for and what that asks for in turn, in the versions that
`constraints.txt` pins; what they say of themselves is read from the installed packages. So this
runs in a checkout with its environment, before anything is packed.

    >>> found = shipped(Path("."), ("serving", "batch", "cpu"))
    >>> found[0].name, found[0].version, found[0].licence
    ('a2wsgi', '1.10.10', 'Apache-2.0')
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, Final, cast

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from dermaflux.errors import DermaFluxError

EXTRAS: Final = ("serving", "batch", "cpu")
"""What `bentofile.yaml` packs."""
REVIEWED: Final = Path(__file__).with_name("reviewed.toml")
_SPDX: Final = re.compile(r"[A-Za-z0-9.+-]+( (AND|OR|WITH) [A-Za-z0-9.+-]+)*")
_WORDS: Final = {
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "mit license": "MIT",
    "3-clause bsd license": "BSD-3-Clause",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
}
"""What metadata says in words. "BSD License" is not here, for there are several."""
_ISSUES: Final = ("issues", "issue tracker", "bug tracker", "bug reports", "tracker", "bugs")
_HOMES: Final = ("source", "source code", "repository", "github", "homepage", "home")
_REGISTRY: Final = "pypi.org"
"""A page of a registry tells nothing that the name does not."""


class InventoryError(DermaFluxError):
    """What is shipped cannot be told: a package is missing, unpinned, or says no licence."""


@dataclass(frozen=True)
class Package:
    """`licence` is an SPDX expression; `needs` are names of what it asks for; `asked` says that
    DermaFlux itself asks for it; `sha256` is of its wheel, where that is there."""

    name: str
    version: str
    licence: str
    summary: str
    home: str
    issues: str
    maker: str
    needs: tuple[str, ...]
    asked: bool
    sha256: str = ""

    @property
    def purl(self) -> str:
        """The package's address in every bill of materials."""
        return f"pkg:pypi/{self.name}@{self.version}"


def shipped(
    root: Path, extras: Sequence[str] = EXTRAS, wheels: Path | None = None
) -> list[Package]:
    """All packages that `root/pyproject.toml` asks for with these extras, sorted by name.

    `wheels` is a folder of wheels, whose sha256 are taken.

    Raises:
        InventoryError: a package is not installed, not in `constraints.txt`, installed in another
            version, or of no licence that is known; with what to do.
    """
    pinned = _pinned(root / "constraints.txt")
    asked = _asked(root / "pyproject.toml", extras)
    needs = _closure(asked)
    hashes = _hashes(wheels) if wheels else {}
    reviewed = read_reviewed()["licences"]
    direct = {canonicalize_name(one.name) for one in asked}
    found = []
    for name in sorted(needs):
        distribution = _distribution(name)
        version = pinned.get(name)
        if version is None:
            raise InventoryError(
                f"constraints.txt has no {name}; add {name}=={distribution.version}"
            )
        if version != distribution.version:
            raise InventoryError(
                f"{name} {distribution.version} is installed, constraints.txt has {version}; "
                "install with: make setup"
            )
        metadata = cast(Message, distribution.metadata)  # its own type lacks `get`
        urls = _urls(metadata)
        home = next((urls[label] for label in _HOMES if label in urls), "")
        found.append(
            Package(
                name=name,
                version=version,
                licence=_licence(name, metadata, reviewed),
                summary=" ".join(str(metadata.get("Summary") or "").split()),
                home=home,
                issues=next((urls[label] for label in _ISSUES if label in urls), _guess(home)),
                maker=_maker(metadata),
                needs=tuple(sorted(needs[name])),
                asked=name in direct,
                sha256=hashes.get((name, version), ""),
            )
        )
    return found


def read_reviewed() -> dict[str, Any]:
    """The content of `reviewed.toml`: licences, uses, data."""
    return tomllib.loads(REVIEWED.read_text("utf-8"))


def version_of(root: Path) -> str:
    """The version of DermaFlux that `root/pyproject.toml` states."""
    return str(tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"])


def _asked(file: Path, extras: Sequence[str]) -> list[Requirement]:
    try:
        project = tomllib.loads(file.read_text("utf-8"))["project"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise InventoryError(f"{file} tells no requirements: {error}; run in a checkout") from None
    waiting, texts, seen = [*extras], list(project["dependencies"]), set()
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        try:
            listed = project["optional-dependencies"][extra]
        except KeyError:
            raise InventoryError(f"{file} has no extra {extra!r}") from None
        for text in listed:
            requirement = Requirement(text)
            if canonicalize_name(requirement.name) == canonicalize_name(project["name"]):
                waiting += requirement.extras
            else:
                texts.append(text)
    return [one for one in map(Requirement, texts) if one.marker is None or one.marker.evaluate()]


def _closure(asked: Iterable[Requirement]) -> dict[str, set[str]]:
    """Every package that is asked for, and what it asks for itself, on this platform."""
    needs: dict[str, set[str]] = {}
    taken: dict[str, frozenset[str]] = {}
    waiting = [(canonicalize_name(one.name), frozenset(one.extras)) for one in asked]
    while waiting:
        name, extras = waiting.pop()
        known = taken.get(name)
        if known is not None and extras <= known:
            continue
        taken[name] = extras | (known or frozenset())
        inner = needs.setdefault(name, set())
        for text in _distribution(name).requires or ():
            one = Requirement(text)
            marks = [{"extra": extra} for extra in ("", *sorted(taken[name]))]
            if one.marker is None or any(one.marker.evaluate(mark) for mark in marks):
                inner.add(canonicalize_name(one.name))
                waiting.append((canonicalize_name(one.name), frozenset(one.extras)))
    return needs


def _distribution(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise InventoryError(f"{name} is not installed; install it with: make setup") from None


def _pinned(file: Path) -> dict[str, str]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise InventoryError(
            f"{file} cannot be read: {error.strerror}; run in a checkout"
        ) from None
    pairs = [line.split("==", 1) for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name.strip()): version.strip() for name, version in pairs}


def _licence(name: str, metadata: Message, reviewed: Mapping[str, str]) -> str:
    """An SPDX expression: as reviewed, as stated, or from the words that packages use."""
    if name in reviewed:
        return reviewed[name]
    stated = metadata.get("License-Expression")
    if stated:
        return str(stated)
    plain = str(metadata.get("License") or "").strip()
    classifiers = [
        line.rsplit(" :: ", 1)[-1]
        for line in metadata.get_all("Classifier") or ()
        if line.startswith("License ::")
    ]
    for text in (plain.rsplit(" :: ", 1)[-1], *classifiers):
        if text.casefold() in _WORDS:
            return _WORDS[text.casefold()]
    if plain not in ("", "BSD") and _SPDX.fullmatch(plain):
        return plain
    said = plain[:40] or ", ".join(classifiers) or "nothing"
    raise InventoryError(
        f"{name} does not say its licence precisely ({said}); read the licence file in the package "
        f"and add it to {REVIEWED.name}"
    )


def _urls(metadata: Message) -> dict[str, str]:
    stated = metadata.get_all("Project-URL") or ()
    pairs = [text.split(",", 1) for text in stated]
    found = {label.strip().casefold(): url.strip() for label, url in pairs}
    if metadata.get("Home-page"):
        found.setdefault("home", str(metadata["Home-page"]).strip())
    return {label: url for label, url in sorted(found.items()) if _REGISTRY not in url}


def _guess(home: str) -> str:
    """Where a project on GitHub keeps its issues."""
    found = re.match(r"https://github\.com/[\w.-]+/[\w.-]+", home)
    return f"{found[0].removesuffix('.git')}/issues" if found else ""


def _maker(metadata: Message) -> str:
    """Author or maintainer, without the address."""
    for key in ("Author", "Author-email", "Maintainer", "Maintainer-email"):
        text = re.sub(r"\s*<[^>]*>", "", str(metadata.get(key) or "")).replace('"', "").strip()
        names = [" ".join(name.split()) for name in text.split(",")]
        if text and "@" not in text:
            return ", ".join(names[:3]) + " et al." * (len(names) > 3)
    return ""


def _hashes(folder: Path) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for file in sorted(folder.glob("*.whl")):
        try:
            name, version, _, _ = parse_wheel_filename(file.name)
        except InvalidWheelFilename as error:
            raise InventoryError(f"{file} is no wheel: {error}") from None
        with file.open("rb") as stream:
            found[name, str(version)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found
