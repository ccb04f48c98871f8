"""Requests and replies of OpenAI's images API, as far as they are served here.

Its reference: `openai.types` of the Python client, version 3. `seed`, `steps` and `guidance` are
ours. Fields without an effect are checked all the same, so that a slip of the pen is told.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator
from pydantic_core import PydanticCustomError

from dermaflux.images import Form
from serving.wishes import WHOLE, Count, Seed

DEFAULT_FORM: Final[Form] = "png"

_NONE = "Has no effect here."
_Text = Annotated[str, Field(max_length=512)]


class ImagesRequest(BaseModel):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={
            "if": {
                "required": ["partial_images"],
                "properties": {"partial_images": {"type": "integer", "minimum": 1}},
            },
            "then": {"required": ["stream"], "properties": {"stream": {"const": True}}},
        },
    )

    prompt: str = Field(
        description="A caption in the wording of the model; other text only with the right "
        "`free-text`. At most 2,000 characters."
    )
    model: _Text | None = Field(default=None, description="Name or identity of the bundle.")
    n: Count | None = None
    size: str | None = Field(
        default=None, description="WIDTHxHEIGHT in pixels, or auto: the bundle's default."
    )
    output_format: Form | None = None
    output_compression: Annotated[int, Field(ge=0, le=100), WHOLE] | None = Field(
        default=None,
        description="Quality of a jpeg or webp, 100 if not given; a webp of 100 is lossless.",
    )
    response_format: Literal["b64_json"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3), WHOLE] | None = Field(
        default=None, description="Small unfinished pictures of each image; with `stream` alone."
    )
    background: Literal["opaque", "auto"] | None = Field(default=None, description=_NONE)
    moderation: Literal["low", "auto"] | None = Field(default=None, description=_NONE)
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = (
        Field(default=None, description=_NONE)
    )
    style: Literal["vivid", "natural"] | None = Field(default=None, description=_NONE)
    user: _Text | None = Field(default=None, description=f"{_NONE} It is not looked at.")
    safety_identifier: _Text | None = Field(
        default=None, description=f"{_NONE} It is not looked at."
    )
    seed: Seed | None = Field(
        default=None,
        description="Ours. Of the first image; the next ones have the next seeds.",
    )
    steps: Count | None = Field(default=None, description="Ours.")
    guidance: FiniteFloat | None = Field(default=None, description="Ours.")

    @field_validator("response_format", mode="before")
    @classmethod
    def _no_address(cls, value: Any) -> Any:
        if value == "url":
            raise PydanticCustomError(
                "url", "url cannot be had: no image is kept here to be fetched later; use b64_json"
            )
        return value

    @field_validator("background", mode="before")
    @classmethod
    def _no_transparency(cls, value: Any) -> Any:
        if value == "transparent":
            raise PydanticCustomError(
                "transparent", "the images are photographs' likes and opaque; use opaque or auto"
            )
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> ImagesRequest:
        if self.partial_images and not self.stream:
            raise PydanticCustomError("partial", "partial_images come in a stream; set stream")
        return self


class UsageDetails(BaseModel):
    """Of what the input was."""

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """Tokens that the transformer saw; nothing is charged by them."""

    input_tokens: int
    input_tokens_details: UsageDetails
    output_tokens: int
    total_tokens: int


class OneImage(BaseModel):
    """One of the images."""

    b64_json: str = Field(json_schema_extra={"format": "byte"})
    seed: int = Field(description="Ours.")


class ImagesReply(BaseModel):
    """The images in order."""

    created: int = Field(description="Seconds since 1970.")
    background: Literal["opaque"] = "opaque"
    output_format: Form
    size: str
    data: list[OneImage]
    usage: Usage


class PartialEvent(BaseModel):
    """Data of the event `image_generation.partial_image`: a small JPEG."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str = Field(json_schema_extra={"format": "byte"})
    created_at: int
    size: str
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    output_format: Literal["jpeg"] = "jpeg"
    partial_image_index: int


class CompletedEvent(BaseModel):
    """Data of the event `image_generation.completed`, one for each image."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    b64_json: str = Field(json_schema_extra={"format": "byte"})
    created_at: int
    size: str
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    output_format: Form
    usage: Usage
    seed: int = Field(description="Ours.")


class ModelEntry(BaseModel):
    """What is served here."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970.")
    owned_by: str


class ModelList(BaseModel):
    """Reply of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class OpenAIErrorDetail(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """The form of errors on these routes."""

    error: OpenAIErrorDetail
