"""Errors and classifications as pydantic models: what the OpenAPI document shows is what is sent.

Requests for images are in `serving.wishes`, those in OpenAI's form in `serving.openai_schema`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from dermaflux.intake import Code
from dermaflux.prompt import VOCABULARY

ErrorCode = Literal[
    "body_too_large",
    "busy",
    "cancelled",
    "deadline",
    "forbidden",
    "internal",
    "invalid_image",
    "invalid_json",
    "invalid_request",
    "method_not_allowed",
    "no_classifier",
    "not_found",
    "not_ready",
    "slow_upload",
    "unauthorized",
    "unsuitable_image",
    "unsupported_media_type",
]

MIN_SIDE = 64
"""Pixels. A smaller picture is a thumbnail: blown up to the classifier's input it is guesswork."""
MAX_RATIO = 4
"""Longer side over shorter. The classifier sees the centre square, so of a longer picture less than
a quarter, and the lesion may be outside of it."""


class ErrorDetail(BaseModel):
    """Why a request was refused."""

    code: ErrorCode
    message: str = Field(description="A sentence for a person.")
    field: str | None = Field(default=None, description="Dotted name of the field at fault.")
    request_id: str = Field(description="The X-Request-ID of the reply; the log has it too.")


class ErrorReply(BaseModel):
    """The form of every error."""

    error: ErrorDetail


class Refused(BaseModel):
    """Why a picture is not judged."""

    code: Code
    text: str = Field(description="A sentence for a person, with the figure and its limit.")


Label = Literal["benign", "malignant"]


class Classification(BaseModel):
    """The classifier's answer about one photograph. Research use only."""

    label: Label | None = Field(
        description="malignant where probability >= threshold; null where the picture is not "
        "accepted"
    )
    probability: Annotated[float, Field(ge=0, le=1)] | None = Field(
        description="Calibrated probability of malignant; null where the picture is not accepted."
    )
    threshold: float
    abstain: tuple[float, float] = Field(
        description="From the first up to, but not at, the second there is no decision."
    )
    decision: Literal["benign", "malignant", "abstain"]
    accepted: bool = Field(
        description="Whether the picture is one that can be judged: well enough taken, and like "
        "those that the classifier learnt from. If not, the decision is abstain, and there is no "
        "label, no probability and no saliency."
    )
    reasons: list[Refused] = Field(description="Why it is not accepted; empty where it is.")
    saliency: str | None = Field(
        default=None,
        description="Where the classifier looked, if asked for: a PNG file, base64, to be laid "
        "over the picture, whose shape it has. Grey is attention rolled out over the blocks of "
        "the vision transformer (white most), alpha is 0 where the picture was cut off. It tells "
        "where the model looked, not why, and explains nothing clinically.",
        json_schema_extra={"format": "byte"},
    )
    bundle: str = Field(description="Identity of the bundle that answered.")


class ClassifiedFile(BaseModel):
    """What became of one file of a form: one of result and error."""

    index: int = Field(description="Which file of the form, from 0.")
    result: Classification | None = None
    error: ErrorDetail | None = None


class ClassifiedFiles(BaseModel):
    """The answers about the files of a form, in their order."""

    results: list[ClassifiedFile]


def first_fault(error: ValidationError, model: type[BaseModel]) -> tuple[str, str | None]:
    """The first thing wrong with a `model`, as a sentence, and the field's dotted name or None.

    Never repeats what was sent: it may be long, or name a person.
    """
    fault = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = VOCABULARY if field.startswith("lesion.") else model.model_fields
        return f"{field[:80]}: is not a field here; use {', '.join(known)}", field[:80]
    message = fault["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be", 1)
    return (f"{field}: {message}", field) if field else (message, None)
