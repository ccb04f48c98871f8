"""Requests and replies as pydantic models: what the OpenAPI document shows is what is checked.

Requests are strict: no unknown fields, no numbers in strings, no NaN. The words of a lesion and
the bounds of a bundle are checked by the core, which alone knows them; `serving.openapi` shows
them in the document.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from dermaflux.flow import MAX_SEED
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
    """One image to draw: either `prompt` or `lesion`; the rest has the bundle's defaults."""

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
            ]
        }
    )

    prompt: str | None = Field(default=None, description="Free text, at most 2,000 characters.")
    lesion: LesionAttributes | None = None
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Drawn at random if not given."
    )
    steps: _Count | None = None
    guidance: FiniteFloat | None = None
    width: _Count | None = Field(default=None, description="Pixels.")
    height: _Count | None = Field(default=None, description="Pixels.")

    @model_validator(mode="after")
    def _one_description(self) -> GenerateRequest:
        if (self.prompt is None) == (self.lesion is None):
            both = "" if self.prompt is None else ", not both"
            raise PydanticCustomError("description", f"give a prompt or a lesion{both}")
        return self


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


class Classification(BaseModel):
    """The classifier's answer about one photograph. Research use only."""

    label: Literal["benign", "malignant"] = Field(
        description="malignant where probability >= threshold"
    )
    probability: Annotated[float, Field(ge=0, le=1)] = Field(
        description="Calibrated probability of malignant."
    )
    threshold: float
    abstain: tuple[float, float] = Field(
        description="From the first up to, but not at, the second there is no decision."
    )
    decision: Literal["benign", "malignant", "abstain"]
    accepted: bool = Field(
        description="Whether the picture is one that can be judged: well enough taken, and like "
        "those that the classifier learnt from. If not, the decision is abstain, and label and "
        "probability mean nothing."
    )
    reasons: list[Refused] = Field(description="Why it is not accepted; empty where it is.")
    bundle: str = Field(description="Identity of the bundle that answered.")


class StreamStart(BaseModel):
    """Data of the event `queued`: accepted, and how many are before it."""

    ahead: int
    seed: int


class StreamProgress(BaseModel):
    """Data of the event `progress`: denoising steps done."""

    step: int
    steps: int


class StreamImage(BaseModel):
    """Data of the event `image`, the last one."""

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
    png: str = Field(description="The PNG file, base64.", json_schema_extra={"format": "byte"})


def first_fault(error: ValidationError) -> tuple[str, str | None]:
    """The first thing wrong, as a sentence, and the field's dotted name or None.

    Never repeats what was sent: it may be long, or name a person.
    """
    fault = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        owner = LesionAttributes if field.startswith("lesion.") else GenerateRequest
        return f"{field[:80]}: is not a field here; use {', '.join(owner.model_fields)}", field[:80]
    message = fault["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be", 1)
    return (f"{field}: {message}", field) if field else (message, None)
