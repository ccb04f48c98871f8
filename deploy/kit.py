"""The air-gap kit: one folder with all that a machine without a network needs to serve a bundle.

    python -m deploy.kit bundles/mini --out dist/kit                # what `make kit` runs
    python -m deploy.kit bundles/mini --out dist/kit --sign site.key
    python -m deploy.kit bundles/lesions --out dist/kit-cuda --extras serving,batch,gpu

    wheels/ requirements.txt     every library, pinned by version and hash
    bento/ bundle/               what `bentoml build` packed, and the models it serves
    install.sh verify.sh         into a folder of its own, with the network off; is all unharmed?
    deploy/                      Dockerfile, compose, Kubernetes, systemd, Podman
    docs/ NOTICE LICENSE *.cdx.json soup.md kit.json
    SHA256SUMS                   of every file above; with --sign also SHA256SUMS.sig

Run it in a checkout with its environment, on the platform and Python that it is for: wheels are of
one platform. Of all commands only this one asks the package index, and not with `--wheels` of an
earlier kit. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packaging.utils import parse_wheel_filename

from deploy.cards import cards
from deploy.sizes import sizes
from dermaflux import files
from dermaflux.bundle import Bundle
from dermaflux.command import ended, option, parsed
from dermaflux.doctor import damaged, files_of
from dermaflux.errors import BundleError, DermaFluxError
from serving.inventory.notice import notice
from serving.inventory.packages import EXTRAS, shipped

ROOT: Final = Path(__file__).resolve().parents[1]
SUMS: Final = "SHA256SUMS"
SIGNATURE: Final = f"{SUMS}.sig"
PACKED: Final = ("dermaflux", "serving")
DOCUMENTS: Final = ("hospital", "service.md", "provenance.md", "classifier.md", "mini_report.md")
NEVER: Final = shutil.ignore_patterns("__pycache__", "*.py[cod]", "secrets", ".env")


class KitError(DermaFluxError):
    """The kit cannot be made: an index, BentoML or OpenSSL refused."""


@dataclass(frozen=True)
class Settings:
    """What the command takes."""

    bundle: Path = option("the bundle that it serves")
    out: Path = option("folder, which is replaced", Path("dist/kit"))
    extras: tuple[str, ...] = option(f"of pyproject.toml; default: {','.join(EXTRAS)}", EXTRAS)
    reports: Path | None = option("the bundle's checkpoint, for figures of the model cards", None)
    evaluation: Path | None = option("Markdown with figures by subgroup, for the same", None)
    wheels: Path | None = option("take wheels from this folder and ask no index", None)
    sign: Path | None = option("PEM file of a private key (RSA or EC) that signs the sums", None)


def make(settings: Settings) -> dict[str, Any]:
    """Make the kit beside its place and move it there once it is whole; what is in it.

    Raises:
        BundleError: the bundle is damaged.
        InventoryError: a library says no licence, or is not installed here.
        KitError: a tool failed, with its words.
    """
    bundle = Bundle.open(settings.bundle)
    wrong = damaged(bundle, files_of(bundle))
    if wrong:
        raise BundleError(f"not what was exported in {bundle.path}, by sha256: {', '.join(wrong)}")
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.out.parent, prefix=".kit.") as temporary:
        kit = Path(temporary) / "kit"
        kit.mkdir()
        collect(settings.extras, settings.wheels, kit / "wheels")
        (kit / "requirements.txt").write_text(locked(kit / "wheels"))
        shutil.copytree(bundle.path, kit / "bundle")
        papers(bundle, settings.extras, kit)
        figures = settings.reports or kit  # where there is none, the cards say so
        for name, text in cards(bundle, figures, settings.evaluation).items():
            (kit / "docs/hospital" / name).write_text(text)
        pack(kit)
        told = {
            "name": "dermaflux",
            "version": version(),
            "bundle": bundle.id,
            "bundle_name": bundle.name,
            "extras": list(settings.extras),
            "python": ".".join(map(str, sys.version_info[:2])),
            "machine": f"{platform.system()} {platform.machine()}".lower(),
            "bytes": sizes(kit),
        }
        (kit / "kit.json").write_text(json.dumps(told, indent=1) + "\n")
        readable(kit)
        (kit / SUMS).write_text(sums(kit))
        if settings.sign is not None:
            sign(kit / SUMS, settings.sign, kit / SIGNATURE)
        if settings.out.exists():
            os.replace(settings.out, Path(temporary) / "before")
        os.replace(kit, settings.out)
    return {"kit": str(settings.out), "signed": settings.sign is not None, **told}


def version() -> str:
    """That of pyproject.toml."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def asked(extras: Sequence[str]) -> list[str]:
    """Requirements of pyproject.toml with these extras, its own extras among them resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, waiting = list(project["dependencies"]), list(extras)
    while waiting:
        name = waiting.pop()
        if name not in project["optional-dependencies"]:
            raise KitError(f"pyproject.toml has no extra {name!r}")
        for text in project["optional-dependencies"][name]:
            if text.startswith("dermaflux["):
                waiting += text[len("dermaflux[") : -1].split(",")
            else:
                found.append(text)
    return sorted(set(found))


def collect(extras: Sequence[str], have: Path | None, wheels: Path) -> None:
    """Every library as a wheel, in the versions of constraints.txt."""
    where = ["--no-index", "--find-links", str(have)] if have else []
    run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--only-binary", ":all:", "--constraint", str(ROOT / "constraints.txt")),
        *("--dest", str(wheels), *where, *asked(extras)),
    )


def locked(wheels: Path) -> str:
    """What pip's `--require-hashes` takes: each wheel's name, version and hash."""
    lines = []
    for file in sorted(wheels.glob("*.whl")):
        name, number, _, _ = parse_wheel_filename(file.name)
        lines.append(f"{name}=={number} --hash=sha256:{_sha256(file)}\n")
    return "".join(sorted(lines))


def papers(bundle: Bundle, extras: Sequence[str], kit: Path) -> None:
    """Bills of materials, the SOUP list, NOTICE, and the documents."""
    command = [str(bundle.path), "--out", str(kit), "--wheels", str(kit / "wheels")]
    run(sys.executable, "-m", "serving.inventory", *command, "--extras", ",".join(extras))
    text = notice("bundle", bundle.provenance, shipped(ROOT, extras))
    files.write(kit / "NOTICE", text.encode())
    for name in ("LICENSE", "constraints.txt", "CHANGELOG.md"):
        shutil.copy(ROOT / name, kit)
    shutil.copytree(ROOT / "deploy", kit / "deploy", ignore=NEVER)
    for name in ("install.sh", "verify.sh"):
        os.replace(kit / "deploy" / name, kit / name)
    for name in DOCUMENTS:
        source = ROOT / "docs" / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        (kit / "docs").mkdir(exist_ok=True)
        copy(source, kit / "docs" / name)


def pack(kit: Path) -> None:
    """The Bento, without a bundle: that lies beside it, and can be exchanged alone."""
    # Not beside the kit: BentoML refuses folders whose path has a hidden one.
    with tempfile.TemporaryDirectory() as temporary:
        project, home = Path(temporary) / "project", Path(temporary) / "home"
        project.mkdir()
        for name in PACKED:
            shutil.copytree(ROOT / name, project / name, ignore=NEVER)
        for name in ("bentofile.yaml", ".bentoignore", "LICENSE", "constraints.txt"):
            shutil.copy(ROOT / name, project)
        shutil.copy(kit / "NOTICE", project)
        run(
            *(sys.executable, "-m", "bentoml", "build", "--version", version()),
            folder=project,
            BENTOML_HOME=str(home),
            BENTOML_DO_NOT_TRACK="true",
        )
        shutil.copytree(home / "bentos" / "dermaflux" / version(), kit / "bento")


def readable(kit: Path) -> None:
    """Modes of its own, not those of whoever made it: a user that is only a number reads it."""
    kit.chmod(0o755)
    for file in kit.rglob("*"):
        runs = file.is_dir() or file.suffix == ".sh"
        file.chmod(0o755 if runs else 0o644)


def sums(kit: Path) -> str:
    """Lines as `sha256sum --check` takes them, of every file but the sums and their signature."""
    return "".join(f"{_sha256(kit / name)}  {name}\n" for name in listed(kit))


def listed(kit: Path) -> Iterator[str]:
    """Every file, in the order of its path's bytes."""
    found = [file.relative_to(kit).as_posix() for file in kit.rglob("*") if file.is_file()]
    return (name for name in sorted(found, key=os.fsencode) if name not in (SUMS, SIGNATURE))


def sign(text: Path, key: Path, signature: Path) -> None:
    """A detached signature, as `openssl dgst -sha256 -verify` takes it."""
    run("openssl", "dgst", "-sha256", "-sign", str(key), "-out", str(signature), str(text))


def run(*command: str, folder: Path = ROOT, **environment: str) -> None:
    """Run a tool.

    Raises:
        KitError: it failed; its last words.
    """
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise KitError(f"{command[0]} is not installed") from None
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise KitError(f"{' '.join(command[:5])} … ended with {done.returncode}:\n{last}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a kit."""
    settings = parsed(Settings, "python -m deploy.kit", "Make an air-gap kit.", arguments)
    return ended(lambda: print(json.dumps(make(settings))))


if __name__ == "__main__":
    sys.exit(main())
