"""Bundle <-> `bundle.json`: the one contract between the export and everything that runs.

A bundle is a folder: graphs per part and precision, tokenizers, scheduler, and `bundle.json`, which
says all that a runtime must know of them. `bundle.json` is written last, so present means
complete, and it is opened strictly: a bundle that opens is one that runs.

    >>> bundle = Bundle.open("bundles/mini")        # sizes checked; verify=True checks every byte
    >>> bundle.parts["transformer"].files["fp32"].engines
    ('onnxruntime-cpu', 'openvino-cpu')
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from dermaflux import files
from dermaflux.errors import BundleError
from dermaflux.flow import Schedule
from dermaflux.manifest import (
    DTYPES,
    ClassifierParity,
    ClassifierSpec,
    Data,
    Defaults,
    File,
    Golden,
    ImageParity,
    IntakeSpec,
    Licence,
    Limits,
    ModelSpec,
    Parity,
    Part,
    PartParity,
    Tensor,
    check_values,
)
from dermaflux.strict import read

__all__ = [
    "Bundle",
    "ClassifierParity",
    "ClassifierSpec",
    "Data",
    "Defaults",
    "File",
    "Golden",
    "ImageParity",
    "IntakeSpec",
    "Licence",
    "Limits",
    "ModelSpec",
    "Parity",
    "Part",
    "PartParity",
    "Tensor",
    "sha256",
    "write_manifest",
]

SCHEMA: Final = 2
MANIFEST: Final = "bundle.json"
TOKENIZERS: Final = ("tokenizer", "tokenizer_2")
GENERATOR_PARTS: Final = ("text_encoder", "text_encoder_2", "transformer", "vae_decoder")
"""Parts that every bundle has, in the order they run."""
PARTS: Final = (*GENERATOR_PARTS, "vae_encoder", "classifier")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: the content of `bundle.json`, and `path` and `id` of the folder.

    `id` is the first 16 hex digits of the sha256 of `bundle.json`, which holds the sha256 of every
    graph and of all other `files` (tokenizers, configs, the golden image), so it names weights,
    precision files and settings together.
    """

    path: Path
    id: str
    schema: int
    name: str
    created: str
    made_by: str
    parts: Mapping[str, Part]
    files: tuple[Data, ...]
    model: ModelSpec
    scheduler: Mapping[str, Any]
    defaults: Defaults
    limits: Limits
    wording: str
    classifier: ClassifierSpec | None
    parity: Parity
    golden: Golden | None
    provenance: Mapping[str, Any]
    licences: tuple[Licence, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False) -> Bundle:
        """Open a bundle's folder; `verify` reads every file and compares its sha256.

        Raises:
            BundleError: no bundle there, another schema, a key unknown, missing or of another
                type, a file missing, of another size or (with `verify`) of other content, or a
                path that leaves the folder. It ends in the command that makes the bundle anew.
        """
        folder = Path(path)
        try:
            bundle = cls._parse(folder, _read_manifest(folder))
            bundle._check_files(verify)
        except BundleError as error:
            raise BundleError(f"{error}. {_remedy(folder)}") from error
        return bundle

    def file(self, relative: str) -> Path:
        """Where a path of the manifest lies.

        Raises:
            BundleError: it is absolute or leaves the folder.
        """
        pure = PurePosixPath(relative)
        if not relative or pure.is_absolute() or ".." in pure.parts or "\\" in relative:
            raise BundleError(f"the path {relative!r} leaves the bundle's folder")
        return self.path / pure

    @classmethod
    def _parse(cls, folder: Path, text: bytes) -> Bundle:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} is not JSON ({error})") from error
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise BundleError(f"{MANIFEST} has schema {schema!r}, this version reads {SCHEMA}")
        identity = hashlib.sha256(text).hexdigest()[:16]
        bundle = read(cls, content, MANIFEST, path=folder, id=identity)
        bundle._check_content()
        try:
            json.dumps(content, allow_nan=False)
        except ValueError:
            # Python reads and writes NaN; a browser that is sent the provenance does not.
            raise BundleError(f"{MANIFEST} has a number that is not finite") from None
        return bundle

    def _check_content(self) -> None:
        for name in self.parts:
            if name not in PARTS:
                raise BundleError(f"{MANIFEST}.parts has an unknown part {name!r}")
        needed = (*GENERATOR_PARTS, *(["classifier"] if self.classifier else []))
        for name in needed:
            if name not in self.parts:
                raise BundleError(f"{MANIFEST}.parts has no part {name!r}")
        for name, part in self.parts.items():
            if not part.files:
                raise BundleError(f"{MANIFEST}.parts.{name}.files is empty")
            for tensor in (*part.inputs, *part.outputs):
                if tensor.dtype not in DTYPES:
                    raise BundleError(
                        f"{MANIFEST}.parts.{name}: tensor {tensor.name} is {tensor.dtype}; "
                        f"graphs take {' and '.join(DTYPES)} only"
                    )
        if self.classifier and self.classifier.intake:
            given = [tensor.name for tensor in self.parts["classifier"].outputs]
            if "features" not in given:
                raise BundleError(
                    f"{MANIFEST}.classifier.intake needs the output features of the classifier, "
                    f"which gives {', '.join(given)}"
                )
        check_values(self.model, self.defaults, self.limits, self.classifier)
        Schedule.from_config(self.scheduler)

    def _check_files(self, verify: bool) -> None:
        for data in (*self._graphs(), *self.files):
            found = self.file(data.path)
            if not found.is_file():
                raise BundleError(f"{data.path} is missing")
            if found.stat().st_size != data.bytes:
                raise BundleError(
                    f"{data.path} has {found.stat().st_size} bytes, {MANIFEST} says {data.bytes}"
                )
            if verify and sha256(found) != data.sha256:
                raise BundleError(f"{data.path} is not what was exported: its sha256 differs")
        listed = {data.path for data in self.files}
        others = [f"{tokenizer}/tokenizer.json" for tokenizer in TOKENIZERS]
        if self.classifier and self.classifier.intake:
            others.append(self.classifier.intake.file)
        for relative in (*others, *([self.golden.image] if self.golden else [])):
            self.file(relative)
            if relative not in listed:
                raise BundleError(f"{MANIFEST}.files has no {relative}, which a bundle needs")

    def _graphs(self) -> Iterator[Data]:
        for part in self.parts.values():
            for file in part.files.values():
                yield Data(file.path, file.bytes, file.sha256)
                yield from file.data


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> Bundle:
    """Write `bundle.json` from plain JSON values, whole or not at all, and open it.

    The last act of an export. What cannot be opened is not written.

    Raises:
        BundleError: the manifest is not of the form above, or its files are not there.
    """
    text = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    Bundle._parse(folder, text)._check_files(verify=False)
    files.write(folder / MANIFEST, text)
    return Bundle.open(folder)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_manifest(folder: Path) -> bytes:
    if not folder.is_dir():
        raise BundleError(f"there is no bundle at {folder}")
    try:
        return (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{folder} has no {MANIFEST}: the export did not finish") from None
    except OSError as error:
        raise BundleError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from error


def _remedy(folder: Path) -> str:
    return f"Make it with: python -m export CHECKPOINT --out {folder}"
