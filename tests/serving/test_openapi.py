"""The OpenAPI document: valid, of every route, and of one mind with the service."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from dermaflux.prompt import VOCABULARY
from serving.app import ROUTES, paths
from serving.keys import line, made
from tests.serving.live import Live, running

CAPTION = "dermoscopic image of a benign lesion"
_, KEY = made("holder", ["generate"])


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with running(anonymous_roles=("generate", "classify", "free-text")) as live:
        yield live


@pytest.fixture(scope="module")
def document(server: Live) -> dict[str, Any]:
    return dict(server.client.get("/openapi.json").json())


def schema(document: dict[str, Any], name: str) -> Draft202012Validator:
    return Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    )


def test_document_is_valid(document: dict[str, Any]) -> None:
    validate(document)
    for name in document["components"]["schemas"]:
        Draft202012Validator.check_schema(document["components"]["schemas"][name])


def test_every_route_is_in_it(document: dict[str, Any]) -> None:
    ours = {path for path in paths() if not path.startswith("/static/")}
    assert set(document["paths"]) == ours | {"/static/{file}"}
    for path, (method, _) in ROUTES.items():
        assert list(document["paths"][path]) == [method.lower()]


def test_keys_and_roles_are_in_it() -> None:
    with running(keys_inline=line(KEY)) as live:
        told = live.client.get("/openapi.json").json()
    validate(told)
    assert set(told["components"]["securitySchemes"]) == {"bearer", "header"}
    for path, (method, whom) in ROUTES.items():
        operation = told["paths"][path][method.lower()]
        if whom == "anybody":
            assert "security" not in operation
            continue
        roles = [] if whom == "known" else [whom]
        assert operation["security"] == [{"bearer": roles}, {"header": roles}]
        assert {"401", "429"} <= set(operation["responses"])
        assert ("403" in operation["responses"]) == (whom != "known")


def test_errors_have_the_form_that_is_told(server: Live, document: dict[str, Any]) -> None:
    for path, (method, _) in ROUTES.items():
        if method == "GET":
            continue
        reply = server.client.post(path, content=b"x", headers={"content-type": "text/plain"})
        told = document["paths"][path]["post"]["responses"][str(reply.status_code)]
        name = told["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        schema(document, name).validate(reply.json())
        assert name == ("OpenAIError" if "images" in path else "ErrorReply")


@pytest.mark.parametrize(
    ("path", "name"),
    [("/v1/queue", "QueueCard"), ("/v1/model", "ModelCard"), ("/v1/models", "ModelList")],
)
def test_cards_have_the_form_that_is_told(
    server: Live, document: dict[str, Any], path: str, name: str
) -> None:
    wrong = [*schema(document, name).iter_errors(server.client.get(path).json())]
    assert not wrong


VALUES: dict[str, list[Any]] = {
    "seed": [0, 7.0, 2**53 - 1, 2**53, -1, 1.5, "7", True, None],
    "steps": [1, 2.0, 3, 0, 51, None, "2"],
    "guidance": [0, 3.5, 30, 30.5, -1, None, "1"],
    "width": [32, 64, 48, 16, 40, 272, None],
    "height": [32, 48, 64, 0, None, "64"],
    "n": [1, 2, 3, 0, 9, None, "2"],
    "format": ["png", "webp", "jpeg", "gif", None],
    "quality": [1, 90, 100, 0, 101, None],
    "previews": [0, 8, 9, -1, None],
    "prompt": [CAPTION, "a mole", "", " ", "a\nb", "x" * 2001, 3, None],
    "size": ["64x64", "auto", "48x32", "100x100", "16x16", "64", None, 64],
    "model": ["tiny", "0123456789abcdef", "other", None],
    "response_format": ["b64_json", "url", None],
    "output_format": ["png", "webp", "jpeg", "gif", None],
    "output_compression": [0, 50, 100, 101, None],
    "partial_images": [0, 3, 4, None],
    "stream": [True, False, None, 1],
    "background": ["auto", "opaque", "transparent", None],
    "user": ["somebody", "x" * 600, None],
    "style": ["vivid", "ugly", None],
}
# Names of VALUES that each route has.
OURS = ["prompt", "seed", "steps", "guidance", "width", "height", "n", "format", "quality"]
OPENAI = [
    *("prompt", "model", "n", "size", "response_format", "output_format", "output_compression"),
    *("stream", "partial_images", "background", "user", "style", "seed", "steps", "guidance"),
]


def some_lesion(chance: random.Random) -> Any:
    lesion: dict[str, Any] = {}
    for name, words in VOCABULARY.items():
        if chance.random() < 0.4:
            many = name in ("colors", "structures")
            choices: list[Any] = [None, "wrong", *words] if chance.random() < 0.3 else [*words]
            one = chance.choice(choices)
            lesion[name] = [one, *chance.choices(words, k=1)] if many and one else one
    return chance.choice([lesion] * 12 + [None, "nevus", []])


def some_body(chance: random.Random, names: list[str], *, lesion: bool) -> dict[str, Any]:
    """Most of it right: else nothing but the first fault would be looked at."""
    body: dict[str, Any] = {}
    for name in names:
        if chance.random() < 0.35:
            good = chance.random() < 0.85
            body[name] = chance.choice(VALUES[name][:3] if good else VALUES[name])
    if chance.random() < 0.05:
        body["colour"] = "red"
    if not lesion or chance.random() < 0.3:
        return {"prompt": CAPTION, **body}
    if chance.random() < 0.9:
        body.pop("prompt", None)
    body["lesion"] = some_lesion(chance)
    return body


@pytest.mark.parametrize(
    ("path", "name", "fields"),
    [
        ("/v1/generate", "GenerateRequest", OURS),
        ("/v1/generate/stream", "StreamRequest", [*OURS, "previews"]),
        ("/v1/images/generations", "ImagesRequest", OPENAI),
    ],
)
def test_what_the_schema_takes_is_what_the_service_takes(
    server: Live, document: dict[str, Any], path: str, name: str, fields: list[str]
) -> None:
    validator = schema(document, name)
    chance = random.Random(0)
    counts = {True: 0, False: 0}
    for _ in range(50):
        body = some_body(chance, fields, lesion="images" not in path)
        # Small and short, where that is not what is being tried.
        body.setdefault("steps", 1)
        reply = server.client.post(path, json=body)
        valid = validator.is_valid(body)
        assert (reply.status_code == 200) == valid, (json.dumps(body), reply.text[:300])
        counts[valid] += 1
    assert min(counts.values()) > 8
