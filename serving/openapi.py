"""The OpenAPI 3.1 document: every address of the service, ours and BentoML's, in one place.

BentoML's own document leaves mounted routes out. This one is put together from the models in
`serving.schema`, with the bounds and defaults of the bundle that is being served.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dermaflux.request import MAX_GUIDANCE, MAX_PROMPT
from serving.body import IMAGE_TYPES
from serving.card import ModelCard
from serving.pictures import REPRODUCTION
from serving.schema import (
    MAX_RATIO,
    MIN_SIDE,
    Classification,
    ClassifiedFiles,
    ErrorReply,
    GenerateRequest,
    StreamImage,
    StreamPosition,
    StreamProgress,
    StreamRequest,
    StreamStart,
)

_MODELS: tuple[type[BaseModel], ...] = (
    GenerateRequest,
    StreamRequest,
    Classification,
    ClassifiedFiles,
    ErrorReply,
    ModelCard,
    StreamStart,
    StreamPosition,
    StreamProgress,
    StreamImage,
)

_REASONS = {
    400: "The body is not JSON, not a form, or not an image that can be read.",
    404: "Not there.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    415: "The Content-Type is not one of those taken.",
    422: "A field is unknown, missing, contradictory or out of range, or a picture of no use.",
    429: "No place is free; come back after Retry-After seconds.",
    500: "Something failed in the service.",
    503: "Engines are not proved yet, or were found wrong; the message says why.",
    504: "Not done within the deadline.",
}

_FILE = {"type": "string", "contentMediaType": "application/octet-stream"}

_SALIENCY = {
    "name": "saliency",
    "in": "query",
    "description": "1: say where the classifier looked, too.",
    "schema": {"type": "string", "enum": ["0", "1"], "default": "0"},
}


def document(card: ModelCard) -> dict[str, Any]:
    """The document for a service with this card."""
    _, schemas = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    for name in ("GenerateRequest", "StreamRequest"):
        _bounds(schemas["$defs"][name]["properties"], card)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "DermaFlux",
            "version": card.made_by.rpartition(" ")[2] or "0",
            "summary": "Draws synthetic skin lesions and classifies photographs of lesions.",
            "description": card.notice,
        },
        # Relative, so that it holds behind a proxy with a prefix too.
        "servers": [{"url": "."}],
        "paths": {
            "/v1/generate": {"post": _generate()},
            "/v1/generate/stream": {"post": _stream()},
            "/v1/classify": {"post": _classify()},
            "/v1/classify/batch": {"post": _classify_batch(card)},
            "/v1/model": {"get": _plain("The model card.", _json("ModelCard"))},
            "/openapi.json": {"get": _plain("This document.", {"application/json": {}})},
            "/": {"get": _plain("The page.", {"text/html": {}})},
            "/static/{file}": {
                "get": {
                    **_plain("A file of the page.", {"*/*": {}}, 404),
                    "parameters": [
                        {
                            "name": "file",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string"},
                        }
                    ],
                }
            },
            "/livez": {"get": _plain("The process is alive.", {"text/plain": {}})},
            "/healthz": {"get": _plain("The process is alive.", {"text/plain": {}})},
            "/readyz": {
                "get": _plain(
                    "Engines have run, and the golden image is right.",
                    {"application/json": {}},
                    503,
                )
            },
            "/metrics": {"get": _plain("Prometheus metrics.", {"text/plain": {}})},
        },
        "components": {"schemas": schemas["$defs"]},
    }


def _bounds(properties: dict[str, Any], card: ModelCard) -> None:
    limits, defaults = card.limits, card.defaults
    size = {
        "minimum": limits.min_size,
        "maximum": limits.max_size,
        "multipleOf": limits.size_multiple,
    }
    for name, bound in {
        "steps": {"minimum": 1, "maximum": limits.max_steps},
        "guidance": {"minimum": 0, "maximum": MAX_GUIDANCE},
        "width": size,
        "height": size,
    }.items():
        # pydantic writes optional numbers as anyOf(number, null).
        properties[name]["anyOf"][0].update(bound)
        properties[name]["default"] = getattr(defaults, name)
    properties["n"]["maximum"] = limits.max_images
    properties["prompt"]["anyOf"][0].update({"minLength": 1, "maxLength": MAX_PROMPT})


def _generate() -> dict[str, Any]:
    names = (*(name.title() for name in REPRODUCTION), "Prompt-Tokens")
    headers = {f"X-DermaFlux-{name}": {"schema": {"type": "string"}} for name in names}
    reply = {
        "description": "The image, marked as synthetic; its text holds all that repeats it.",
        "headers": headers,
        "content": {"image/png": {"schema": {"type": "string", "contentMediaType": "image/png"}}},
    }
    return {
        "summary": "Draw one synthetic lesion.",
        "operationId": "generate",
        "requestBody": {"required": True, "content": _json("GenerateRequest")},
        "responses": {"200": reply, **_errors(400, 408, 413, 415, 422, 429, 500, 503, 504)},
    }


def _stream() -> dict[str, Any]:
    reply = {
        "description": (
            "Events `queued` (StreamStart), `progress` (StreamProgress) per step, then `image` "
            "(StreamImage) or `error` (ErrorReply). Closing the connection stops the work."
        ),
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
    return {
        "summary": "Draw one synthetic lesion and tell of the progress.",
        "operationId": "generateStream",
        "requestBody": {"required": True, "content": _json("GenerateRequest")},
        "responses": {"200": reply, **_errors(400, 408, 413, 415, 422, 429, 500, 503)},
    }


def _classify() -> dict[str, Any]:
    form = {
        "type": "object",
        "required": ["image"],
        "additionalProperties": False,
        "properties": {"image": _FILE},
    }
    content = {kind: {"schema": {**_FILE, "contentMediaType": kind}} for kind in IMAGE_TYPES}
    reply = {"description": "The answer.", "content": _json("Classification")}
    return {
        "summary": "Classify one photograph of a lesion.",
        "description": (
            f"At least {MIN_SIDE} pixels a side and at most {MAX_RATIO} times as long as wide: of "
            "a smaller or longer one an answer would mean nothing (422)."
        ),
        "operationId": "classify",
        "parameters": [_SALIENCY],
        "requestBody": {
            "required": True,
            "content": {**content, "multipart/form-data": {"schema": form}},
        },
        "responses": {"200": reply, **_errors(400, 404, 408, 413, 415, 422, 429, 500, 503, 504)},
    }


def _classify_batch(card: ModelCard) -> dict[str, Any]:
    form = {
        "type": "object",
        "required": ["image"],
        "additionalProperties": False,
        "properties": {
            "image": {
                "type": "array",
                "items": _FILE,
                "minItems": 1,
                "maxItems": card.limits.max_batch_files,
            }
        },
    }
    reply = {
        "description": "An answer or an error for each file, in the order of the form.",
        "content": _json("ClassifiedFiles"),
    }
    return {
        "summary": "Classify the photographs of a form.",
        "operationId": "classifyBatch",
        "parameters": [_SALIENCY],
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
        "responses": {"200": reply, **_errors(400, 404, 408, 413, 415, 422, 429, 500, 503)},
    }


def _plain(description: str, content: dict[str, Any], *errors: int) -> dict[str, Any]:
    return {
        "summary": description,
        "responses": {"200": {"description": description, "content": content}, **_errors(*errors)},
    }


def _json(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model}"}}}


def _errors(*statuses: int) -> dict[str, Any]:
    return {
        str(status): {"description": _REASONS[status], "content": _json("ErrorReply")}
        for status in statuses
    }
