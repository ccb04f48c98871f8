"""Requests for images, and the events of a stream, as pydantic models.

Requests are strict: no unknown fields, no numbers in strings, no NaN. The words of a lesion and
the bounds of a bundle are checked by the core, which alone knows them; `serving.bounds` writes
them into the document.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dermaflux.flow import MAX_SEED
from dermaflux.images import JPEG_QUALITY, Form
from dermaflux.prompt import DIAGNOSES, LABELS, VOCABULARY

MAX_PREVIEWS = 8
"""Previews of one image; each is decoded between two steps, and holds the others up."""


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""JSON has no integers of its own: 20.0 is one by JSON Schema, and some programs write it so. It
comes last in an annotation, or the bounds before it would be missing in the document."""
# The bundle's own bounds are narrower; this keeps numbers of thousands of digits out.
Count = Annotated[int, Field(ge=1, le=2**31), WHOLE]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), WHOLE]


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


def _implied(label: str) -> list[JsonValue]:
    return [word for word, implied in DIAGNOSES.items() if implied == label]


class LesionAttributes(_Strict):
    """What to draw, in the vocabulary of the model; `label` may be left out with a diagnosis."""

    # The core's own rules (`dermaflux.prompt.Lesion`), for those who read the document.
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["label"], "properties": {"label": {"enum": [*LABELS]}}},
                {
                    "required": ["diagnosis"],
                    "properties": {
                        "diagnosis": {
                            "enum": [word for label in LABELS for word in _implied(label)]
                        }
                    },
                },
            ],
            "allOf": [
                {
                    "if": {
                        "required": ["diagnosis"],
                        "properties": {"diagnosis": {"enum": _implied(label)}},
                    },
                    "then": {"properties": {"label": {"enum": [label, None]}}},
                }
                for label in LABELS
            ],
        }
    )

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
    seed: Seed | None = Field(
        default=None,
        description="Of the first image; drawn at random if not given. The next ones have the "
        "next seeds; after the largest comes 0.",
    )
    steps: Count | None = None
    guidance: FiniteFloat | None = None
    width: Count | None = Field(default=None, description="Pixels.")
    height: Count | None = Field(default=None, description="Pixels.")
    n: Count = Field(default=1, description="Images; with consecutive seeds.")
    format: Form = "png"
    quality: Annotated[int, Field(ge=1, le=100), WHOLE] | None = Field(
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

    previews: Annotated[int, Field(ge=0, le=MAX_PREVIEWS), WHOLE] = Field(
        default=0, description="Small unfinished pictures per image, evenly over its steps."
    )


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
    """Data of the event `image`, one for each as soon as it is done; the last one ends it."""

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
    tier: str | None = Field(
        default=None, description="Where steps were forecast: what was given up for speed."
    )
    prompt_tokens: int
    text_length: int = Field(description="Tokens of the prompt beyond this are not read.")
    format: Form
    file: str = Field(description="The file, base64.", json_schema_extra={"format": "byte"})
