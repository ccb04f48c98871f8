"""Request bodies, read within a limit: a declared length is checked first, a chunked one counted.

A photograph may be a patient's, so it stays in memory: nothing here writes a temporary file. Who
sends it has to keep up a pace: a place of the door (`serving.door`) is held meanwhile, and a byte
now and then would hold it until the deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar, cast

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serving.door import Place
from serving.replies import Refusal
from serving.schema import first_fault

Model = TypeVar("Model", bound=BaseModel)

IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp")
# Not a registered type, but common; what the bytes are is decided by the bytes.
_IMAGE_ALIASES = (*IMAGE_TYPES, "image/jpg")
_ANY_TYPE = "application/octet-stream"
_PIECE = 1 << 18
GRACE_SECONDS = 10.0
"""For a body's first bytes, and for what stops on its way."""
PACE = 20_000
"""Bytes a second from then on, as a poor mobile network has: each gives the body 50 us more."""


async def read_json(request: Request, model: type[Model], limit: int, seconds: float) -> Model:
    """Read a JSON body and check it against `model`.

    Raises:
        Refusal: 415 not JSON by its type, 413 too long, 408 too slow, 429 too much at once,
            400 not JSON, 422 a field is wrong.
    """
    if _media_type(request.headers.get("content-type", "")) != "application/json":
        raise Refusal(
            415,
            "unsupported_media_type",
            "Send JSON, with Content-Type: application/json.",
        )
    body = await _read(request, limit, seconds)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        message, field = first_fault(error, model)
        if error.errors(include_input=False)[0]["type"] == "json_invalid":
            raise Refusal(400, "invalid_json", message) from None
        raise Refusal(422, "invalid_request", message, field=field) from None


async def read_image(request: Request, limit: int, seconds: float) -> bytes:
    """Read the image file of a classification: the body itself, or the form's file `image`.

    Raises:
        Refusal: 415 neither an image nor a form by its type, 413 too long, 408 too slow, 429 too
            much at once, 400 empty or not one file named `image`.
    """
    content_type = request.headers.get("content-type", "")
    kind = _media_type(content_type)
    if kind == "multipart/form-data":
        data = await _one_file(request, await _read(request, limit, seconds))
    elif kind in _IMAGE_ALIASES:
        data = await _read(request, limit, seconds)
    else:
        raise _unsupported_image()
    if not data:
        raise Refusal(400, "invalid_image", "image: the file is empty.", field="image")
    return data


async def read_images(
    request: Request, limit: int, most: int, seconds: float
) -> list[bytes | Refusal]:
    """Read the form of several classifications: its files in order, or why one is not taken.

    Raises:
        Refusal: 415 not a form by its type, 413 too long, 408 too slow, 429 too much at once, 400
            not a form of files named `image`, or of more than `most`.
    """
    if _media_type(request.headers.get("content-type", "")) != "multipart/form-data":
        raise Refusal(
            415,
            "unsupported_media_type",
            f"Send a form (multipart/form-data) of up to {most} files, each named image.",
            field="image",
        )
    needed = f"The form needs one to {most} fields, each a file named image."
    return await _files(request, await _read(request, limit, seconds), most, needed)


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _unsupported_image() -> Refusal:
    return Refusal(
        415,
        "unsupported_media_type",
        f"Send the image file itself with Content-Type {', '.join(IMAGE_TYPES)}, "
        "or a form with one file field named image.",
        field="image",
    )


async def _read(request: Request, limit: int, seconds: float) -> bytes:
    too_large = Refusal(413, "body_too_large", f"The body is longer than {limit:,} bytes.")
    declared = request.headers.get("content-length", "")
    # Longer digit strings than int() converts are refused as well, by their length alone.
    if len(declared) > 18 or (declared.isdecimal() and int(declared) > limit):
        raise too_large
    body, place = bytearray(), cast(Place, request.state.place)
    begin = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(min(seconds, GRACE_SECONDS)) as bound:
            async for chunk in request.stream():
                place.hold(len(chunk))
                body += chunk
                if len(body) > limit:
                    raise too_large
                bound.reschedule(begin + min(seconds, GRACE_SECONDS + len(body) / PACE))
    except TimeoutError:
        raise Refusal(
            408,
            "slow_upload",
            f"The body came too slowly: after {GRACE_SECONDS:g} seconds it has to keep up "
            f"{PACE:,} bytes a second, and be here within {seconds:g} seconds.",
        ) from None
    return bytes(body)


class _InMemory(MultiPartParser):
    # The body was read within its limit already, so no part can be longer than that.
    spool_max_size = 1 << 62


async def _one_file(request: Request, body: bytes) -> bytes:
    needed = "The form needs exactly one field, a file named image."
    (file,) = await _files(request, body, 1, needed)
    if isinstance(file, Refusal):
        raise file
    return file


async def _files(request: Request, body: bytes, most: int, needed: str) -> list[bytes | Refusal]:
    """The form's files, all named `image`: what is in them, or why one is not taken."""

    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), _PIECE):
            yield body[start : start + _PIECE]
            # Others are answered between two pieces; a form of 100 MB takes a fifth of a second.
            await asyncio.sleep(0)

    refusal = Refusal(400, "invalid_request", needed, field="image")
    try:
        form = await _InMemory(request.headers, pieces(), max_files=most, max_fields=0).parse()
    except MultiPartException:
        raise refusal from None
    found: list[bytes | Refusal] = []
    for name, file in form.multi_items():
        if name != "image" or not isinstance(file, UploadFile):
            raise refusal
        # Many clients leave a part's type out, or name none in particular; the bytes decide anyhow.
        if _media_type(file.content_type or _ANY_TYPE) not in {*_IMAGE_ALIASES, _ANY_TYPE}:
            found.append(_unsupported_image())
        else:
            found.append(await file.read())
    if not found:
        raise refusal
    return found
