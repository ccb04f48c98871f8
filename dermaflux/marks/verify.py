"""What still holds of a picture's marks, whoever sends it and whatever was done to it.

    >>> verdict = verify(path.read_bytes(), Keys.open(folder, make=False), registry)
    >>> verdict.shown, verdict.sentences
    (True, ('There is no signed manifest.', 'The watermark is there (score 19.2, ...).'))

That nothing is found shows nothing: marks can be removed, and others' images bear other marks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dermaflux.images import SOURCE_TYPE, decode_upload, read_marks
from dermaflux.marks import crops
from dermaflux.marks.credentials import REMOTE, Credentials, Manifest
from dermaflux.marks.keys import Keys
from dermaflux.marks.registry import Known, pixel_hash
from dermaflux.marks.watermark import UPRIGHT, Found, Watermark


@dataclass(frozen=True)
class Verdict:
    """What was looked at and what was found.

    `known` is None where nobody was asked, `watermark` None where there is no key to look with;
    `crop` is the best place in an original, looked for where the whole picture bears no mark.
    `claims` are unsigned texts that anybody can write.
    """

    sha256: str
    pixels_sha256: str
    width: int
    height: int
    manifest: Manifest
    known: bool | None
    watermark: Found | None
    crop: crops.Crop | None
    claims: Mapping[str, str]

    @property
    def marked(self) -> Found | None:
        """The watermark that is there, of the whole picture or of a piece."""
        piece = None if self.crop is None else self.crop.found
        looked = (self.watermark, piece)
        return next((one for one in looked if one is not None and one.present), None)

    @property
    def exact(self) -> bool:
        """Whether a trusted signer said of exactly these pixels that they were drawn."""
        record = self.manifest.record
        return self.manifest.believed and record.get("pixels_sha256") == self.pixels_sha256

    @property
    def signed(self) -> bool:
        """Whether a trusted signer signed this file, or these pixels, as made by a model."""
        # A manifest that was cut out of another file is genuine, and says nothing of this one. And
        # an authority of the site's own may vouch for cameras, too.
        manifest = self.manifest
        return self.exact or (manifest.trusted and manifest.state == "valid" and manifest.synthetic)

    @property
    def shown(self) -> bool:
        """Whether it is shown that this picture was drawn by a site whose keys are here."""
        return self.signed or bool(self.known) or self.marked is not None

    @property
    def claimed(self) -> bool:
        """Whether it says of itself that a model made it, without that being shown."""
        return self.manifest.synthetic or self.claims.get("DigitalSourceType") == SOURCE_TYPE

    @property
    def sentences(self) -> tuple[str, ...]:
        """The findings in words."""
        told = [_of_manifest(self.manifest)]
        if self.exact:
            told.append("The pixels are the very ones that were drawn, without a watermark.")
        if self.known is not None:
            told.append(
                "Exactly these pixels were drawn here."
                if self.known
                else "These exact pixels are not registered here."
            )
        if self.marked is not None and self.crop is not None and self.marked is self.crop.found:
            told.append(
                f"It is a piece of a marked picture of {self.crop.size[1]} x {self.crop.size[0]} "
                f"pixels, from {self.crop.left}, {self.crop.top} on ({_odds(self.marked)})."
            )
        elif self.marked is not None:
            lies = "" if self.marked.view == UPRIGHT else f", the picture {self.marked.view}"
            told.append(f"The watermark is there{lies} ({_odds(self.marked)}).")
        elif self.watermark is not None:
            told.append("No watermark of these keys is found.")
        if not self.shown:
            told.append(
                "It says of itself that a model made it; that is not shown."
                if self.claimed
                else "Nothing shows where it comes from. That does not make it a photograph."
            )
        return tuple(told)

    def as_json(self) -> dict[str, Any]:
        """Plain values for a reply, without texts that anybody may have written."""
        found = self.marked or self.watermark
        manifest = asdict(self.manifest)
        if not self.manifest.believed:
            manifest["record"] = {}
        return {
            "shown": self.shown,
            "claimed": self.claimed,
            "sha256": self.sha256,
            "pixels_sha256": self.pixels_sha256,
            "width": self.width,
            "height": self.height,
            "manifest": manifest | {"problems": list(self.manifest.problems)},
            "pixels_known": self.known,
            "watermark": None if found is None else _plain(found),
            "piece_of": None
            if self.crop is None or not self.crop.found.present
            else {
                "height": self.crop.size[0],
                "width": self.crop.size[1],
                "top": self.crop.top,
                "left": self.crop.left,
            },
            "sentences": list(self.sentences),
        }


def verify(
    data: bytes,
    keys: Keys | None = None,
    known: Known | None = None,
    *,
    sizes: Iterable[tuple[int, int]] = crops.SIZES,
    max_pixels: int = 40_000_000,
    credentials: Credentials | None = None,
) -> Verdict:
    """Look at a PNG, JPEG or WebP of at most `max_pixels`.

    Without `keys` nothing is trusted and no watermark is looked for. `sizes` are height and width
    of the originals that a cut piece is looked for in; none means not at all. `credentials` saves
    loading the anchors anew.

    Raises:
        ImageError: it is not such a picture, is damaged, or has too many pixels.
    """
    pixels = np.asarray(decode_upload(data, max_pixels))
    manifest = (credentials or Credentials(keys)).read(data)
    watermark, crop = None, None
    if keys is not None:
        mark = Watermark(*keys.watermark)
        watermark = mark.find(pixels)
        if not watermark.present:
            crop = crops.find(mark, pixels, sizes)
    shown = pixel_hash(pixels)
    return Verdict(
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=shown,
        width=pixels.shape[1],
        height=pixels.shape[0],
        manifest=manifest,
        known=None if known is None else known.known(shown),
        watermark=watermark,
        crop=crop,
        claims=read_marks(data),
    )


def _of_manifest(manifest: Manifest) -> str:
    by = f"signed by {manifest.signer or 'nobody named'}"
    trust = "who is trusted here" if manifest.trusted else "who is not known here"
    says = "" if manifest.synthetic else ", but nobody says there that a model made it"
    why = f" ({', '.join(manifest.problems)})" if manifest.problems else ""
    return {
        "absent": "There is no signed manifest in the file; it names one elsewhere, which is not "
        "fetched."
        if REMOTE in manifest.problems
        else "There is no signed manifest.",
        "valid": f"The manifest holds, {by}, {trust}; the file is as it was signed{says}.",
        "edited": f"There is a manifest {by}, {trust}, but not of this file: it was changed after, "
        f"or the manifest is from another{why}.",
        "broken": f"The manifest does not hold{why}.",
    }[manifest.state]


def _odds(found: Found) -> str:
    # A sum of rounded numbers shows no less, and nothing is impossible.
    return f"score {found.score:.1f}, by chance at most {max(found.p_value, 1e-30):.0e}"


def _plain(found: Found) -> dict[str, Any]:
    return {
        "present": found.present,
        "score": round(found.score, 3),
        "p_value": found.p_value,
        "tries": found.tries,
        "payload": None if found.payload is None else found.payload.hex(),
        "view": found.view,
        "key": found.key,
    }
