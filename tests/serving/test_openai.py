"""OpenAI's images API, by OpenAI's own client as it is."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI
from PIL import Image

from dermaflux.images import read_marks
from tests.serving.live import Live, running

PROMPT = "dermoscopic image of a benign lesion, nevus"


def client_of(live: Live, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, **options)


@pytest.fixture
def client(live: Live) -> Iterator[OpenAI]:
    with client_of(live) as made:
        yield made


def files(reply: Any) -> list[bytes]:
    return [base64.b64decode(one.b64_json) for one in reply.data]


def test_client_draws_as_with_openai(client: OpenAI, live: Live) -> None:
    reply = client.images.generate(
        model="tiny",
        prompt=PROMPT,
        n=2,
        size="128x96",
        response_format="b64_json",
        output_format="png",
        extra_body={"seed": 6, "steps": 2, "guidance": 2.5},
    )
    assert (reply.size, reply.output_format, reply.background) == ("128x96", "png", "opaque")
    assert reply.usage is not None
    assert reply.usage.output_tokens == 2 * 128 * 96 // 256
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    ours = [
        live.client.post(
            "/v1/generate",
            json={
                "prompt": PROMPT,
                "seed": seed,
                "steps": 2,
                "guidance": 2.5,
                "width": 128,
                "height": 96,
            },
        ).content
        for seed in (6, 7)
    ]
    assert files(reply) == ours


def test_prompt_alone_is_enough(client: OpenAI) -> None:
    (data,) = files(client.images.generate(prompt=PROMPT))
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))
    assert read_marks(data)["dermaflux.prompt"] == PROMPT


@pytest.mark.parametrize(
    ("ask", "form"),
    [
        ({"output_format": "webp", "output_compression": 60}, "WEBP"),
        ({"output_format": "webp", "output_compression": 100}, "WEBP"),
        ({"output_format": "jpeg", "output_compression": 0}, "JPEG"),
        ({"output_format": "jpeg"}, "JPEG"),
        ({"output_compression": 50}, "PNG"),
    ],
)
def test_formats_and_compression(client: OpenAI, ask: dict[str, Any], form: str) -> None:
    (data,) = files(client.images.generate(prompt=PROMPT, **ask))
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == form


def test_compression_is_quality(client: OpenAI) -> None:
    sizes = [
        len(
            files(
                client.images.generate(
                    prompt=PROMPT,
                    output_format="webp",
                    output_compression=quality,
                    extra_body={"seed": 1},
                )
            )[0]
        )
        for quality in (0, 50, 99)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


def test_what_has_no_effect_is_taken(client: OpenAI) -> None:
    plain = client.images.generate(prompt=PROMPT, extra_body={"seed": 2})
    more = client.images.generate(
        prompt=PROMPT,
        model="0123456789abcdef",
        size="auto",
        quality="hd",
        style="vivid",
        background="opaque",
        moderation="low",
        user="somebody",
        extra_body={"seed": 2},
    )
    assert files(plain) == files(more)


@pytest.mark.parametrize(
    ("ask", "param", "words"),
    [
        ({"response_format": "url"}, "response_format", "use b64_json"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"size": "100x100"}, "size", "multiple of 16"),
        ({"size": "4096x64"}, "size", "use 32 to 256"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "64x64\n"}, "size", "WIDTHxHEIGHT"),
        ({"n": 9}, "n", "use 1 to 8"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"output_format": "gif"}, "output_format", "'png'"),
        ({"quality": "best"}, "quality", "'high'"),
        ({"prompt": ""}, "prompt", "is empty"),
        ({"extra_body": {"colour": "red"}}, "colour", "is not a field here"),
        ({"extra_body": {"partial_images": 2}}, None, "set stream"),
    ],
)
def test_wrong_fields_are_told_in_openais_form(
    client: OpenAI, live: Live, ask: dict[str, Any], param: str | None, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as told:
        client.images.generate(**{"prompt": PROMPT, **ask})
    assert (told.value.param, told.value.type) == (param, "invalid_request_error")
    assert told.value.request_id
    assert live.brake.steps == 0


def test_other_models_are_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="use tiny") as told:
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    assert told.value.code == "model_not_found"


def test_free_text_is_a_right(client: OpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="for example 'dermoscopic") as told:
        client.images.generate(prompt="a mole of Jane Doe")
    assert told.value.param == "prompt"
    assert "Jane" not in str(told.value)
    with (
        running(anonymous_roles=("generate", "free-text")) as live,
        client_of(live) as allowed,
    ):
        (data,) = files(allowed.images.generate(prompt="a mole"))
        assert read_marks(data)["dermaflux.prompt"] == "a mole"


def test_models_are_listed(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "dermaflux 0.1.0")
    assert model.created == 1767225600


def test_full_queue_is_a_rate_limit_and_the_client_comes_back() -> None:
    ask = {"lesion": {"label": "benign"}}
    with running(open_requests=1) as live, ThreadPoolExecutor(1) as pool, client_of(live) as client:
        with live.brake.closed():
            first = pool.submit(live.client.post, "/v1/generate", json=ask)
            live.brake.wait_for(1)
            with pytest.raises(openai.RateLimitError) as told:
                client.images.generate(prompt=PROMPT)
            assert told.value.code == "rate_limit_exceeded"
            assert told.value.response.headers["retry-after"] == "1"
            patient = client.with_options(max_retries=5)
            again = ThreadPoolExecutor(1).submit(patient.images.generate, prompt=PROMPT)
            live.brake.open.set()
            assert first.result().status_code == 200
        assert len(files(again.result())) == 1


def test_stream_ends_with_the_image(client: OpenAI) -> None:
    (whole,) = files(client.images.generate(prompt=PROMPT, extra_body={"seed": 4}))
    told = list(
        client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 4})
    )
    assert told[-1].type == "image_generation.completed"
    assert base64.b64decode(told[-1].b64_json) == whole
    assert told[-1].usage.output_tokens == 64 * 64 // 256
    for number, partial in enumerate(told[:-1]):
        assert partial.type == "image_generation.partial_image"
        assert partial.partial_image_index == number


def test_failure_in_a_stream_is_an_error_of_the_client() -> None:
    with running(fails=RuntimeError("secret of the house")) as live, client_of(live) as client:
        with pytest.raises(openai.APIError, match="Something failed here") as told:
            list(client.images.generate(prompt=PROMPT, stream=True))
        assert "secret" not in str(told.value)
        with pytest.raises(openai.InternalServerError, match="Something failed here"):
            client.images.generate(prompt=PROMPT)


def test_what_is_no_json_is_told_in_openais_form(live: Live) -> None:
    reply = live.client.post(
        "/v1/images/generations", content=b"{", headers={"content-type": "application/json"}
    )
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    for method, path in (("GET", "/v1/images/generations"), ("POST", "/v1/models")):
        reply = live.client.request(method, path)
        assert reply.status_code == 405
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
