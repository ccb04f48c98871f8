"""The operations of the OpenAPI document: what each route takes, gives, and may refuse."""

from __future__ import annotations

from typing import Any, Final

from serving.body import IMAGE_TYPES
from serving.card import ModelCard
from serving.pictures import MULTIPART, REPRODUCTION, ZIP
from serving.schema import MAX_RATIO, MIN_SIDE

_REASONS: Final = {
    400: "The body is not JSON, not a form, or not an image that can be read.",
    401: "No key was sent, or one that is not known.",
    403: "The key has not the role that is needed.",
    404: "Not there.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    415: "The Content-Type is not one of those taken.",
    422: "A field is unknown, missing, contradictory or out of range, or a picture of no use.",
    429: "No place is free, or too many wrong keys came; come back after Retry-After seconds.",
    500: "Something failed in the service.",
    503: "Engines are not proved yet, were found wrong, or the service stops; the message says so.",
    504: "Not done within the deadline.",
}
_BODY: Final = (400, 408, 413, 415, 422, 429)
"""What may be wrong with a body, or in the way of it."""

_HEADERS: Final = {
    401: ("WWW-Authenticate", "How to send a key.", "string"),
    429: ("Retry-After", "Seconds.", "integer"),
    503: ("Retry-After", "Seconds; only while waiting helps.", "integer"),
}
_FILE: Final = {"type": "string", "contentMediaType": "application/octet-stream"}
TEXT: Final = {"text/plain": {"schema": {"type": "string"}}}
_SALIENCY: Final = {
    "name": "saliency",
    "in": "query",
    "description": "1: say where the classifier looked, too.",
    "schema": {"type": "string", "enum": ["0", "1"], "default": "0"},
}


def generate() -> dict[str, Any]:
    """`POST /v1/generate`."""
    marks = (name.title() for name in REPRODUCTION)
    names = (*marks, "Prompt-Tokens", "Pixels-SHA256", "Images")
    headers = {f"X-DermaFlux-{name}": {"schema": {"type": "string"}} for name in names}
    files = (*IMAGE_TYPES, ZIP, MULTIPART)
    reply = {
        "description": "The image, marked as synthetic; its text holds all that repeats it. "
        f"Several come as {ZIP}, or as {MULTIPART} where Accept prefers that.",
        "headers": headers,
        "content": {kind: {"schema": {**_FILE, "contentMediaType": kind}} for kind in files},
    }
    return {
        "summary": "Draw synthetic lesions.",
        "operationId": "generate",
        "requestBody": {"required": True, "content": json_of("GenerateRequest")},
        "responses": {"200": reply, **errors(*_BODY, 403, 500, 503, 504)},
    }


def stream() -> dict[str, Any]:
    """`POST /v1/generate/stream`."""
    reply = {
        "description": "Events `queued` (StreamStart), `position` (StreamPosition) as that moves, "
        "`progress` (StreamProgress), then an `image` (StreamImage) for each, or `error` "
        "(ErrorReply). Closing the connection stops the work. A reader that falls behind misses "
        "steps, never an image.",
        "content": _events(
            queued="StreamStart",
            position="StreamPosition",
            progress="StreamProgress",
            image="StreamImage",
            error="ErrorReply",
        ),
    }
    return {
        "summary": "Draw synthetic lesions and tell of the progress.",
        "operationId": "generateStream",
        "requestBody": {"required": True, "content": json_of("StreamRequest")},
        "responses": {"200": reply, **errors(*_BODY, 403, 500, 503)},
    }


def images() -> dict[str, Any]:
    """`POST /v1/images/generations`."""
    reply = {
        "description": "The images; with `stream` events `image_generation.partial_image` "
        "(PartialEvent) and `image_generation.completed` (CompletedEvent).",
        "content": {
            **json_of("ImagesReply"),
            **_events(
                **{
                    "image_generation.partial_image": "PartialEvent",
                    "image_generation.completed": "CompletedEvent",
                    "error": "OpenAIError",
                }
            ),
        },
    }
    return {
        "summary": "Draw synthetic lesions, in the form of OpenAI's images API.",
        "operationId": "createImage",
        "requestBody": {"required": True, "content": json_of("ImagesRequest")},
        "responses": {"200": reply, **errors(*_BODY, 403, 404, 500, 503, 504)},
    }


def classify() -> dict[str, Any]:
    """`POST /v1/classify`."""
    reply = {"description": "The answer.", "content": json_of("Classification")}
    return {
        "summary": "Classify one photograph of a lesion.",
        "description": (
            f"At least {MIN_SIDE} pixels a side and at most {MAX_RATIO} times as long as wide: of "
            "a smaller or longer one an answer would mean nothing (422)."
        ),
        "operationId": "classify",
        "parameters": [_SALIENCY],
        "requestBody": {"required": True, "content": _picture()},
        "responses": {"200": reply, **errors(*_BODY, 404, 500, 503, 504)},
    }


def classify_batch(card: ModelCard) -> dict[str, Any]:
    """`POST /v1/classify/batch`."""
    files = {
        "type": "array",
        "items": _FILE,
        "minItems": 1,
        "maxItems": card.limits.max_batch_files,
    }
    form = {
        "type": "object",
        "required": ["image"],
        "additionalProperties": False,
        "properties": {"image": files},
    }
    reply = {
        "description": "An answer or an error for each file, in the order of the form.",
        "content": json_of("ClassifiedFiles"),
    }
    return {
        "summary": "Classify the photographs of a form.",
        "operationId": "classifyBatch",
        "parameters": [_SALIENCY],
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
        "responses": {"200": reply, **errors(*_BODY, 404, 500, 503, 504)},
    }


def verify() -> dict[str, Any]:
    """`POST /v1/verify`."""
    reply = {"description": "What was found.", "content": json_of("Verified")}
    return {
        "summary": "Look for the marks of a synthetic image in any picture.",
        "description": (
            "For a signed manifest, for pixels that were drawn here, and for the watermark, of a "
            "whole picture or a piece. That nothing is found shows nothing: marks can be removed."
        ),
        "operationId": "verify",
        "requestBody": {"required": True, "content": _picture()},
        "responses": {"200": reply, **errors(*_BODY, 500, 503, 504)},
    }


def _picture() -> dict[str, Any]:
    """A body that is one picture, or a form with it."""
    form = {
        "type": "object",
        "required": ["image"],
        "additionalProperties": False,
        "properties": {"image": _FILE},
    }
    content = {kind: {"schema": {**_FILE, "contentMediaType": kind}} for kind in IMAGE_TYPES}
    return {**content, "multipart/form-data": {"schema": form}}


def plain(description: str, content: dict[str, Any], *statuses: int) -> dict[str, Any]:
    """A route without parameters; `statuses` are those of its errors."""
    return {
        "summary": description,
        "responses": {"200": {"description": description, "content": content}, **errors(*statuses)},
    }


def json_of(model: str) -> dict[str, Any]:
    """Content in the form of a model."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model}"}}}


def _events(**models: str) -> dict[str, Any]:
    """A stream of events: the schema is that of one, whose data is JSON in the form of a model."""
    forms = [{"$ref": f"#/components/schemas/{model}"} for model in models.values()]
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": forms},
    }
    one = {
        "type": "object",
        "required": ["event", "data"],
        "properties": {"event": {"type": "string", "enum": list(models)}, "data": data},
    }
    return {"text/event-stream": {"schema": one}}


def errors(*statuses: int) -> dict[str, Any]:
    """Replies of these statuses in the form of our errors."""
    return {str(status): _error(status) for status in sorted(statuses)}


def _error(status: int) -> dict[str, Any]:
    reply: dict[str, Any] = {"description": _REASONS[status], "content": json_of("ErrorReply")}
    if status in _HEADERS:
        name, description, kind = _HEADERS[status]
        reply["headers"] = {name: {"description": description, "schema": {"type": kind}}}
    return reply
