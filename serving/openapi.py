"""The OpenAPI 3.1 document: every address of the service, ours and BentoML's, in one place.

BentoML's own document leaves mounted routes out. This one is put together from the models of
requests and replies, with the bounds and defaults of the bundle that is being served, and from the
table of who may call what: a role stands beside the key that has to have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

from serving.bounds import schemas
from serving.card import ModelCard, QueueCard
from serving.marking import Verified
from serving.openai_form import PATHS as OPENAI_PATHS
from serving.openai_schema import (
    CompletedEvent,
    ImagesReply,
    ImagesRequest,
    ModelList,
    OpenAIError,
    PartialEvent,
)
from serving.operations import (
    TEXT,
    classify,
    classify_batch,
    errors,
    generate,
    images,
    json_of,
    plain,
    stream,
    verify,
)
from serving.schema import Classification, ClassifiedFiles, ErrorReply
from serving.wishes import (
    GenerateRequest,
    StreamImage,
    StreamPosition,
    StreamProgress,
    StreamRequest,
    StreamStart,
)

_MODELS: Final[tuple[type[BaseModel], ...]] = (
    GenerateRequest,
    StreamRequest,
    ImagesRequest,
    ImagesReply,
    PartialEvent,
    CompletedEvent,
    ModelList,
    OpenAIError,
    Classification,
    ClassifiedFiles,
    ErrorReply,
    ModelCard,
    QueueCard,
    Verified,
    StreamStart,
    StreamPosition,
    StreamProgress,
    StreamImage,
)

_SCHEMES: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def document(card: ModelCard, whom: Mapping[str, str], *, keyed: bool) -> dict[str, Any]:
    """The document for a service with this card.

    `whom` is who may call each route: a role, `known` or `anybody`. `keyed` says whether the
    service asks for keys at all.
    """
    paths = _paths(card)
    for path, methods in paths.items():
        for operation in methods.values():
            _guard(operation, path, whom.get(path, "anybody"), keyed)
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
        "paths": paths,
        "components": {"schemas": schemas(card, _MODELS), "securitySchemes": _SCHEMES},
    }


def _paths(card: ModelCard) -> dict[str, dict[str, dict[str, Any]]]:
    page = plain("The page.", {"text/html": {"schema": {"type": "string"}}})
    file = plain("A file of the page.", {"*/*": {}}, 404)
    name = {"name": "file", "in": "path", "required": True, "schema": {"type": "string"}}
    ready = {"application/json": {"schema": {"type": "object"}}}
    return {
        "/v1/generate": {"post": generate()},
        "/v1/generate/stream": {"post": stream()},
        "/v1/images/generations": {"post": images()},
        "/v1/classify": {"post": classify()},
        "/v1/classify/batch": {"post": classify_batch(card)},
        "/v1/verify": {"post": verify()},
        "/v1/queue": {"get": plain("The generator's queue.", json_of("QueueCard"))},
        "/v1/model": {"get": plain("The model card.", json_of("ModelCard"))},
        "/v1/models": {"get": plain("The model, in OpenAI's form.", json_of("ModelList"))},
        "/openapi.json": {"get": plain("This document.", {"application/json": {}})},
        "/": {"get": page},
        "/static/{file}": {"get": {**file, "parameters": [name]}},
        "/livez": {"get": plain("The process is alive.", TEXT)},
        "/healthz": {"get": plain("The process is alive.", TEXT)},
        "/readyz": {"get": plain("Engines have run, and the golden image is right.", ready, 503)},
        "/metrics": {"get": plain("Prometheus metrics.", TEXT)},
    }


def _guard(operation: dict[str, Any], path: str, whom: str, keyed: bool) -> None:
    """Write into an operation who may call it, and the forms of its errors."""
    roles = [] if whom in ("anybody", "known") else [whom]
    if whom != "anybody":
        keys = [{scheme: roles} for scheme in _SCHEMES]
        operation["security"] = keys if keyed else [*keys, {}]
        refusals = (401, 403, 429) if roles else (401, 429)
        operation["responses"] = {**errors(*refusals), **operation["responses"]}
    if path in OPENAI_PATHS:
        # There what is wrong with a field is 400.
        operation["responses"].pop("422", None)
        for status, reply in operation["responses"].items():
            if int(status) >= 400:
                reply["content"] = json_of("OpenAIError")
