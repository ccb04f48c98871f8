"""Images on their way into files, with the site's marks, and `POST /v1/verify` that finds them.

    curl localhost:3000/v1/verify -H 'content-type: image/jpeg' --data-binary @received.jpg

Whatever is done to an image later, the sha256 of its exact pixels is taken before: it stands in the
file's own record, in a header, and in the audit log. Without a folder of marks that is all; with
one, every file is signed and its pixels are registered (`dermaflux.marks`), in the threads that
write files. Signing leaves every pixel as it was; the watermark, where it is on, does not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dermaflux.decode import Pixels
from dermaflux.images import Form, encode
from dermaflux.marks import Marker, MarksError, verify
from dermaflux.marks.credentials import Credentials
from dermaflux.marks.crops import SIZES
from dermaflux.marks.registry import RegistryError, pixel_hash
from dermaflux.request import Request as Wanted
from serving.audit.record import answer_hash
from serving.audit.results import Results
from serving.body import read_image
from serving.pictures import Picture
from serving.records import Records, note
from serving.replies import Refusal
from serving.settings import Settings

logger = logging.getLogger(__name__)

WAITING: Final = 8
"""Pictures that wait to be looked at; each was read already, and may have 20 MB."""
RETRY_SECONDS: Final = "60"
"""Somebody has to make room, or to put another certificate there."""


class Found(BaseModel):
    """What was found of the watermark."""

    present: bool
    score: float = Field(description="In standard deviations of chance.")
    p_value: float = Field(description="At most the probability of such a score by chance.")
    tries: int
    payload: str | None = Field(description="Four bytes in hex that stand for the bundle.")
    view: str = Field(description="How the picture lies, as against the one that was marked.")
    key: int = Field(description="Which of the site's keys, from 0.")


class Piece(BaseModel):
    """Of which part of a marked picture it is a piece, in pixels."""

    height: int
    width: int
    top: int
    left: int


class Signature(BaseModel):
    """The C2PA manifest of a file."""

    state: Literal["absent", "valid", "edited", "broken"]
    trusted: bool = Field(description="Whether the signer is known here.")
    signer: str | None
    source_type: str | None
    record: dict[str, Any] = Field(description="What a trusted signer said of it; else empty.")
    problems: list[str] = Field(description="C2PA's codes.")


class Verified(BaseModel):
    """What still holds of a picture's marks. That nothing is found shows nothing."""

    shown: bool = Field(description="It is shown that a site whose keys are here drew it.")
    claimed: bool = Field(description="It says of itself that a model made it, unproved.")
    sha256: str
    pixels_sha256: str = Field(description="Of uint8 [height, width, 3].")
    width: int
    height: int
    manifest: Signature
    pixels_known: bool | None = Field(
        description="Whether exactly these pixels were drawn here; null where nothing is kept."
    )
    audit_known: bool | None = Field(
        description="Whether the audit log has them; null where there is none."
    )
    watermark: Found | None = Field(description="Null where there is no key to look with.")
    piece_of: Piece | None
    sentences: list[str] = Field(description="The same in words.")


class Marking:
    """Writes files with the marks of these records, and looks for them in any picture."""

    def __init__(self, records: Records, settings: Settings) -> None:
        self._marker = records.marker
        self._settings = settings
        keys = None if records.marker is None else records.marker.keys
        self._keys = keys
        self._credentials = Credentials(keys)
        audit = None if records.audit is None else records.audit.folder
        self._audit = None if audit is None else Results(audit)
        # One at a time: a picture of forty million pixels takes 400 MB while it is looked at.
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="verify")
        self._waiting = 0

    def written(
        self,
        pixels: Pixels,
        wanted: Wanted,
        record: Mapping[str, str],
        prompt_tokens: int,
        form: Form,
        quality: int | None,
    ) -> Picture:
        """The file of an image uint8 [height, width, 3]; takes some ms, so call it in a thread.

        Raises:
            Refusal: 503, it cannot be signed or registered, and unmarked it must not go out.
        """
        drawn = pixel_hash(pixels)
        record = {**record, "pixels_sha256": drawn}
        if self._marker is None:
            data = encode(pixels, record, form, quality)
        else:
            try:
                data = self._marker.mark(pixels, record, form, quality).data
            except (MarksError, RegistryError) as error:
                logger.error("an image was not marked: %s", error)
                raise Refusal(
                    503,
                    "not_ready",
                    "Images have to be marked, and cannot be at the moment; come back later.",
                    headers={"Retry-After": RETRY_SECONDS},
                ) from None
        return Picture(wanted, record, prompt_tokens, form, data, drawn)

    async def verify(self, request: Request) -> Response:
        """What still holds of a picture, as JSON; see `Verified`."""
        settings = self._settings
        data = await read_image(request, settings.max_upload_bytes, settings.deadline_seconds)
        if self._waiting > WAITING:
            crowded = "Too many pictures wait to be looked at; come back in a second."
            raise Refusal(429, "busy", crowded, headers={"Retry-After": "1"})
        self._waiting += 1
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(settings.deadline_seconds):
                answer = await loop.run_in_executor(self._looking, self._looked_at, data)
        except TimeoutError:
            words = f"It was not done within {settings.deadline_seconds:g} seconds."
            raise Refusal(504, "deadline", words) from None
        finally:
            self._waiting -= 1
        told = answer.model_dump()
        # Not the hash of the pixels: whoever asks twice would have made them known.
        await note(request, [answer_hash(told)])
        return JSONResponse(told, headers={"Cache-Control": "no-store"})

    def close(self) -> None:
        """Look at nothing more."""
        self._looking.shutdown(wait=False, cancel_futures=True)

    def _looked_at(self, data: bytes) -> Verified:
        asked = None
        if self._marker is not None or self._audit is not None:
            asked = _Asked(self._marker, self._audit)
        verdict = verify(data, self._keys, asked, sizes=SIZES, credentials=self._credentials)
        return Verified(**verdict.as_json(), audit_known=None if asked is None else asked.audit)


class _Asked:
    """The registry and the audit log as one; `audit` is what the log said, None without one."""

    def __init__(self, marker: Marker | None, results: Results | None) -> None:
        self._marker = marker
        self._results = results
        self.audit: bool | None = None

    def known(self, sha256: str) -> bool:
        """Whether one of them knows pixels of this hash."""
        if self._results is not None:
            self.audit = self._results.known(sha256)
        return bool(self.audit) or (
            self._marker is not None and self._marker.registry.known(sha256)
        )
