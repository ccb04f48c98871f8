"""A table of scales: what every layer's input channels were seen with, on which model.

Made by `export.calibrate` wherever the model fits, read by the export wherever the disk does. One
npz file: the array `part/layer` holds the largest magnitude of each input channel, from which both
the range of the whole input and SmoothQuant's factors follow; the text `about` holds the rest.

    >>> table = Scales.open(Path("mini.scales.npz"))
    >>> table.require(Path("models/mini"), "transformer")
    >>> table.parts["transformer"]["transformer_blocks.0.attn.to_q"].shape
    (256,)
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dermaflux import files
from dermaflux.errors import BundleError
from dermaflux.strict import read
from export.quantized import Channels
from export.source import folder_of

VERSION: Final = 1
_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 65536


# What numpy, zipfile and zlib raise for files that are cut, flipped or something else.
_UNREADABLE: Final = (
    *(OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, RecursionError),
    *(NotImplementedError, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class _About:
    """The text of a table; see `Scales`."""

    models: Mapping[str, str]
    request_set: str
    asked: int
    done: int


@dataclass(frozen=True)
class Scales:
    """Ranges of parts; `models` names the weights that they were measured on, `done` counts the
    `asked` requests that they were measured over, and `request_set` names those."""

    parts: Mapping[str, Channels]
    models: Mapping[str, str]
    request_set: str
    asked: int
    done: int

    @classmethod
    def open(cls, path: Path) -> Scales:
        """Read a table.

        Raises:
            BundleError: it is not there, is no table, is of another version, or is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                arrays = {name: content[name] for name in content.files}
            told = json.loads(str(arrays.pop("about")))
            version = told.pop("version")
        except FileNotFoundError:
            raise BundleError(f"there is no table of scales at {path}; {_remedy(path)}") from None
        except _UNREADABLE as error:
            raise BundleError(f"{path} is no table of scales ({error}); {_remedy(path)}") from error
        if version != VERSION:
            raise BundleError(
                f"{path} has version {version}, this version reads {VERSION}; {_remedy(path)}"
            )
        about = read(_About, told, f"{path}: about")
        parts: dict[str, dict[str, NDArray[np.float32]]] = {}
        for name, array in arrays.items():
            part, _, layer = name.partition("/")
            if array.dtype != np.float32 or array.ndim != 1 or not array.size or not layer:
                raise BundleError(f"{path}: {name} holds no ranges; {_remedy(path)}")
            if not np.isfinite(array).all() or (array < 0).any():
                raise BundleError(f"{path}: {name} holds no ranges; {_remedy(path)}")
            parts.setdefault(part, {})[layer] = array
        return cls(parts=parts, **vars(about))

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all; equal tables are equal files."""
        about = {
            "version": VERSION,
            "models": dict(self.models),
            "request_set": self.request_set,
            "asked": self.asked,
            "done": self.done,
        }
        arrays: dict[str, Any] = {
            f"{part}/{layer}": numbers
            for part, found in sorted(self.parts.items())
            for layer, numbers in sorted(found.items())
        }
        stream = io.BytesIO()
        np.savez_compressed(stream, about=np.array(json.dumps(about, sort_keys=True)), **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, stream.getvalue())

    def require(self, checkpoint: Path, part: str) -> Channels:
        """The ranges of a part, if they were measured on these weights and to the end.

        Raises:
            BundleError: they were not.
        """
        if self.done < self.asked:
            raise BundleError(
                f"the table of scales is of {self.done} of {self.asked} requests: the calibration "
                f"was stopped; go on with it: {command(checkpoint)}"
            )
        if part not in self.parts:
            raise BundleError(f"the table of scales has no {part}; {_again(checkpoint)}")
        if self.models.get(part) != fingerprint(checkpoint, part):
            raise BundleError(
                f"the table of scales was measured on other weights of {part} than those of "
                f"{checkpoint}; {_again(checkpoint)}"
            )
        return self.parts[part]


def fingerprint(checkpoint: Path, part: str) -> str:
    """Names the weights of a part: their headers, sizes, and samples of their bytes.

    Not of every byte: 24 GB would take minutes, and training changes all of them.
    """
    digest = hashlib.sha256()
    for file in sorted((checkpoint / folder_of(part)).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for place in np.linspace(0, max(size - _SAMPLE_BYTES, 0), _SAMPLES).astype(int):
                stream.seek(int(place))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def command(checkpoint: Path, out: Path | None = None) -> str:
    """The command that makes a table."""
    target = out or Path(f"{checkpoint.name}.scales.npz")
    return f"python -m export.quantize --calibrate {checkpoint} --out {target}"


def _again(checkpoint: Path) -> str:
    return f"make one: {command(checkpoint)}"


def _remedy(path: Path) -> str:
    return f"make one: python -m export.quantize --calibrate CHECKPOINT --out {path}"
