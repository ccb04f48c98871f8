"""What is done to an image between the pixels and the file: watermark, metadata, signature, hash.

    >>> marker = Marker.open(Path("/var/lib/dermaflux/marks"), bundle=bundle.id)
    >>> marked = marker.mark(pixels, pipeline.record(request), form="jpeg", quality=90)
    >>> marked.pixels_sha256                     # of the exact pixels, before any mark

The hash of the exact pixels is registered before anything is changed, so parity can be shown for
marked images too. `watermark=False` leaves the pixels as they were drawn: for comparing engines,
and for pictures that a classifier will be trained on (docs/provenance.md says why).
"""

from __future__ import annotations

import hashlib
import hmac
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from dermaflux.images import Form, encode
from dermaflux.marks.certificates import MarksError
from dermaflux.marks.credentials import Credentials
from dermaflux.marks.crops import SIZES
from dermaflux.marks.keys import ANCHORS, Keys
from dermaflux.marks.registry import Registry, pixel_hash
from dermaflux.marks.symbols import PAYLOAD_BYTES
from dermaflux.marks.verify import Verdict, verify
from dermaflux.marks.watermark import Pixels, Watermark

KEYS: Final = "keys"
REGISTRY: Final = "pixels.sha256"


@dataclass(frozen=True)
class Marked:
    """A file, and what was done to it.

    `pixels_sha256` is of the pixels as drawn, `shown_sha256` of those that the file decodes to;
    `watermark_psnr_db` is None where there is no watermark.
    """

    data: bytes
    pixels_sha256: str
    shown_sha256: str
    watermark_psnr_db: float | None


class Marker:
    """Marks the images of one bundle with one site's keys, and verifies anybody's."""

    def __init__(
        self, keys: Keys, registry: Registry, bundle: str, *, watermark: bool = True
    ) -> None:
        self.keys = keys
        self.registry = registry
        self._bundle = bundle
        self._watermark = watermark
        self._mark = Watermark(*keys.watermark)
        self._credentials = Credentials(keys)

    @classmethod
    def open(cls, folder: Path, bundle: str, *, watermark: bool = True) -> Marker:
        """A marker with the keys and the registry of `folder`, made if they are not there.

        `bundle` is the bundle's id. A tiny picture is signed and read back, so that a certificate
        that does not do stops the start and not the first image.

        Raises:
            MarksError: keys or certificates do not do.
        """
        keys = Keys.open(folder / KEYS)
        marker = cls(keys, Registry(folder / REGISTRY), bundle, watermark=watermark)
        trial = encode(np.zeros((16, 16, 3), np.uint8), {})
        read = marker._credentials.read(marker._credentials.sign(trial, "png", {}), "png")
        if not (read.state == "valid" and read.trusted):
            raise MarksError(
                f"what {keys.signer.subject} signs is {read.state} "
                f"({', '.join(read.problems) or 'its authority is not among the anchors'}); put "
                f"the authority's certificate into {folder / KEYS / ANCHORS}"
            )
        return marker

    def mark(
        self,
        pixels: Pixels,
        record: Mapping[str, str],
        form: Form = "png",
        quality: int | None = None,
        *,
        watermark: bool | None = None,
    ) -> Marked:
        """A file of uint8 [height, width, 3] in `form`, with all marks.

        `record` is `Pipeline.record`'s; its prompt goes into the file's own texts as before, and
        into what is signed as a keyed hash. `watermark` overrides what the marker was made with.

        Raises:
            MarksError: the certificate has expired.
            RegistryError: the registry takes no more. Nothing unregistered leaves the house.
        """
        drawn = pixel_hash(pixels)
        shown, psnr = pixels, None
        if self._watermark if watermark is None else watermark:
            marked = Watermark.embed(self._mark, pixels, payload(self._bundle))
            shown, psnr = marked.pixels, marked.psnr_db
        data = encode(shown, record, form, quality)
        signed = self._credentials.sign(data, form, self._signed(record, drawn, psnr))
        lossless = form == "png" or (form == "webp" and quality is None)
        seen = pixel_hash(shown) if lossless else _decoded(data)
        self.registry.add(*dict.fromkeys((drawn, seen)))
        return Marked(signed, drawn, seen, psnr)

    def sign(self, data: bytes, record: Mapping[str, str], drawn: str) -> bytes:
        """A PNG whose pixels are those that were drawn, `drawn` being their hash, with a manifest.

        It is for who writes many files: nothing is registered (`registry.add` takes many hashes at
        once) and no pixel is touched, so that one may be trained on them (docs/provenance.md).

        Raises:
            MarksError: the certificate has expired.
        """
        return self._credentials.sign(data, "png", self._signed(record, drawn, None))

    def verify(self, data: bytes, *, crops: bool = True) -> Verdict:
        """What holds of any picture; see `dermaflux.marks.verify`."""
        return verify(
            data, self.keys, self.registry, sizes=SIZES if crops else (),
            credentials=self._credentials,
        )  # fmt: skip

    def _signed(self, record: Mapping[str, str], drawn: str, psnr: float | None) -> dict[str, Any]:
        told: dict[str, Any] = {name: text for name, text in record.items() if name != "prompt"}
        told |= {"bundle": self._bundle, "pixels_sha256": drawn, "watermark": psnr is not None}
        if "prompt" in record:
            told["prompt_hmac_sha256"] = prompt_hash(record["prompt"], self.keys)
        return told


def payload(bundle: str) -> bytes:
    """Four bytes that stand for a bundle in the watermark."""
    return hashlib.sha256(bundle.encode()).digest()[:PAYLOAD_BYTES]


def prompt_hash(prompt: str, keys: Keys) -> str:
    """HMAC-SHA-256 in hex of a prompt under the site's first watermark key."""
    return hmac.new(keys.watermark[0], prompt.encode(), "sha256").hexdigest()


def _decoded(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as picture:
        return pixel_hash(np.asarray(picture.convert("RGB")))
