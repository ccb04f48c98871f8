"""Requests and replies as pydantic models: what the OpenAPI document shows is what is checked.

Requests are strict: no unknown fields, no numbers in strings, no NaN. The words of a lesion and
the bounds of a bundle are checked by the core, which alone knows them; `serving.openapi` shows
them in the document.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from dermaflux.flow import MAX_SEED
from dermaflux.images import JPEG_QUALITY, Form
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
MAX_PREVIEWS = 8
"""Previews of one image; each is decoded between two steps, and holds the others up."""
MAX_RATIO = 4
"""Longer side over shorter. The classifier sees the centre square, so of a longer picture less than
a quarter, and the lesion may be outside of it."""

# The bundle's own bounds are narrower; this keeps numbers of thousands of digits out.
_Count = Annotated[int, Field(ge=1, le=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _words(name: str) -> Any:
    return Field(default=None, json_schema_extra={"enum": [*VOCABULARY[name], None]})


def _word_list(name: str) -> Any:
    return Field(
        default=None,
        json_schema_extra={
            "items": {"type": "string", "enum": list(VOCABULARY[name])},
            "uniqueItems": True,
        },
    )


class LesionAttributes(_Strict):
    """What to draw, in the vocabulary of the model; `label` may be left out with a diagnosis."""

    label: str | None = _words("label")
    diagnosis: str | None = _words("diagnosis")
    asymmetry: str | None = _words("asymmetry")
    border: str | None = _words("border")
    colors: list[str] | None = _word_list("colors")
    size: str | None = _words("size")
    structures: list[str] | None = _word_list("structures")


class GenerateRequest(_Strict):
    """Images to draw: either `prompt` or `lesion`; the rest has the bundle's defaults."""

    # Both fields may be null in JSON, so "required" alone would not say which one is given.
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "title": f"By {given}",
                    "required": [given],
                    "properties": {
                        given: {"not": {"type": "null"}},
                        other: {"type": "null"},
                    },
                }
                for given, other in (("prompt", "lesion"), ("lesion", "prompt"))
            ],
            "if": {
                "required": ["quality"],
                "properties": {"quality": {"not": {"type": "null"}}},
            },
            "then": {"required": ["format"], "properties": {"format": {"enum": ["webp", "jpeg"]}}},
        }
    )

    prompt: str | None = Field(
        default=None,
        description="A caption in the wording of the model, as its images have in their record; "
        "other text only with the right `free-text`. At most 2,000 characters.",
    )
    lesion: LesionAttributes | None = None
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Of the first image; drawn at random if not given. The next ones have the "
        "next seeds; after the largest comes 0.",
    )
    steps: _Count | None = None
    guidance: FiniteFloat | None = None
    width: _Count | None = Field(default=None, description="Pixels.")
    height: _Count | None = Field(default=None, description="Pixels.")
    n: _Count = Field(default=1, description="Images; with consecutive seeds.")
    format: Form = "png"
    quality: Annotated[int, Field(ge=1, le=100)] | None = Field(
        default=None,
        description=f"Of jpeg, {JPEG_QUALITY} if not given; of webp, lossless if not given.",
    )

    @model_validator(mode="after")
    def _one_description(self) -> Self:
        if (self.prompt is None) == (self.lesion is None):
            both = "" if self.prompt is None else ", not both"
            raise PydanticCustomError("description", f"give a prompt or a lesion{both}")
        if self.quality is not None and self.format == "png":
            raise PydanticCustomError(
                "quality", "a png has no quality; leave it out, or ask for the format webp or jpeg"
            )
        return self


class StreamRequest(GenerateRequest):
    """The same, with previews on the way."""

    previews: Annotated[int, Field(ge=0, le=MAX_PREVIEWS)] = Field(
        default=0, description="Small unfinished pictures per image, evenly over its steps."
    )


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


class StreamStart(BaseModel):
    """Data of the event `queued`: accepted, and how many images are before the first of these."""

    ahead: int
    seed: int = Field(description="Of the first image.")
    images: int


class StreamPosition(BaseModel):
    """Data of the event `position`: how many images are before the first of these now."""

    ahead: int


class StreamProgress(BaseModel):
    """Data of the event `progress`: denoising steps that an image has done."""

    image: int = Field(description="From 0.")
    step: int
    steps: int
    preview: str | None = Field(
        default=None,
        description="How the image looks so far: a small JPEG, base64.",
        json_schema_extra={"format": "byte"},
    )


class StreamImage(BaseModel):
    """Data of the event `image`, one for each; the last of them is the last event."""

    image: int = Field(description="From 0.")
    seed: int
    prompt: str
    steps: int
    guidance: float | None
    width: int
    height: int
    bundle: str
    engine: str
    precision: str
    prompt_tokens: int
    text_length: int = Field(description="Tokens of the prompt beyond this are not read.")
    format: Form
    file: str = Field(description="The file, base64.", json_schema_extra={"format": "byte"})


def first_fault(
    error: ValidationError, model: type[BaseModel] = GenerateRequest
) -> tuple[str, str | None]:
    """The first thing wrong with a `model`, as a sentence, and the field's dotted name or None.

    Never repeats what was sent: it may be long, or name a person.
    """
    fault = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        owner = LesionAttributes if field.startswith("lesion.") else model
        return f"{field[:80]}: is not a field here; use {', '.join(owner.model_fields)}", field[:80]
    message = fault["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be", 1)
    return (f"{field}: {message}", field) if field else (message, None)
