"""Errors: points 42 to 49 of the wire format."""

from __future__ import annotations

import asyncio
import logging

import pytest

from engine.errors import ContextLengthExceeded, EngineDead, InvalidRequest, Overloaded, StepFailed
from engine.types import Health
from server.errors import MAX_MESSAGE, field_path, to_api_error
from tests.server.fake_engine import FakeEngine
from tests.server.harness import (
    CHAT,
    CHAT_URL,
    COMPLETION,
    COMPLETION_URL,
    Connection,
    Json,
    error_of,
    make_app,
    serving,
    started,
)

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(
    "error, status, code",
    [
        (InvalidRequest("no", param="n"), 400, "invalid_value"),
        (ContextLengthExceeded(8, 9, 1), 400, "context_length_exceeded"),
        (Overloaded("full", "max_num_queued_reqs", 2.5), 503, "overloaded"),
        (EngineDead("gone"), 503, "engine_unavailable"),
        (StepFailed("NaN"), 500, "internal_error"),
        (RuntimeError("/secret/path 0x7f001122"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_point_42_engine_errors_have_the_shape(error: Exception, status: int, code: str, streamed: bool) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        engine.refusal = error
        response = await client.post(CHAT_URL, json={**CHAT, "stream": streamed})
        found = error_of(response, status)
        engine.refusal = None
        assert (await client.post(CHAT_URL, json=CHAT)).status_code == 200
    assert found["code"] == code
    assert "secret" not in response.text and "0x7f" not in response.text
    if isinstance(error, Overloaded):
        assert response.headers["retry-after"] == "3"
    if status == 500:  # point 47: a deterministic failure is not tried three times
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "url, body, param, place",
    [
        (COMPLETION_URL, {**COMPLETION, "prompt": [5] * 64, "max_tokens": 7}, "prompt", "prompt"),
        (CHAT_URL, {"messages": [{"role": "user", "content": "x" * 80}], "max_tokens": 7}, "messages", "messages"),
    ],
)
async def test_point_44_context_overflow(url: str, body: Json, param: str, place: str) -> None:
    async with serving(FakeEngine(max_model_len=64)) as client:
        error = error_of(await client.post(url, json=body), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == param
    assert error["type"] == "invalid_request_error"
    tokens = 64 if url == COMPLETION_URL else int(error["message"].split("(")[1].split(" ")[0])
    assert error["message"] == (
        f"This model's maximum context length is 64 tokens. However, you requested {tokens + 7} tokens "
        f"({tokens} in the {place}, 7 in the completion). Please reduce the length of the {place} or completion."
    )


@pytest.mark.parametrize("length, status", [(62, 200), (63, 200), (64, 400), (65, 400)])
async def test_prompts_around_the_context_length(length: int, status: int) -> None:
    async with serving(FakeEngine(max_model_len=64)) as client:
        response = await client.post(COMPLETION_URL, json={**COMPLETION, "prompt": [5] * length})
    assert response.status_code == status
    if status == 200:
        answer = response.json()
        assert answer["usage"]["completion_tokens"] == 64 - length
        assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("url, param", [(COMPLETION_URL, "prompt"), (CHAT_URL, "messages")])
async def test_a_giant_text_is_refused_before_it_is_tokenized(
    url: str, param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(max_model_len=64)
    monkeypatch.setattr(engine.tokenizer, "_encode", pytest.fail)
    text = "a" * (64 * 128 + 1)
    body = {"prompt": text} if url == COMPLETION_URL else {"messages": [{"role": "user", "content": text}]}
    async with serving(engine) as client:
        error = error_of(await client.post(url, json=body), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == param
    assert "maximum context length is 64 tokens" in error["message"]


@pytest.mark.parametrize(
    "body, param, code",
    [
        ({"messages": None}, "messages", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": "a"}, 7]}, "messages[1]", "invalid_type"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"stream_options": {"include_usage": 3}, "stream": True}, "stream_options.include_usage", "invalid_type"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5", "invalid_type"),
        ({"n": 1.5}, "n", "invalid_type"),
    ],
)
async def test_point_45_validation_is_400_with_a_path(body: Json, param: str, code: str) -> None:
    async with serving() as client:
        error = error_of(await client.post(CHAT_URL, json={**CHAT, **body}), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert param in error["message"]


async def test_point_45_errors_do_not_echo_what_was_sent() -> None:
    async with serving() as client:
        for body in (
            {"messages": [{"role": "x" * 100_000, "content": 1}] * 100},
            {"model": "m" * 100_000, **{k: v for k, v in CHAT.items() if k != "model"}},
            {**CHAT, "logit_bias": {"k" * 100_000: 1}},
            {**CHAT, "stop": ["s" * 100_000]},
            {**CHAT, "messages": [{"role": "user", "content": [{"type": "t" * 100_000}]}]},
            {**CHAT, "allowed_token_ids": ["a"] * 200_000},
        ):
            response = await client.post(CHAT_URL, json=body)
            assert 400 <= response.status_code <= 404 and len(response.content) < MAX_MESSAGE + 400


@pytest.mark.parametrize(
    "method, url, status, code",
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", CHAT_URL, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
    ],
)
async def test_point_46_paths_and_methods(method: str, url: str, status: int, code: str) -> None:
    async with serving() as client:
        response = await client.request(method, url)
    assert error_of(response, status)["code"] == code
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize("url, body", [(CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION), ("/tokenize", {"prompt": "x"})])
async def test_point_46_unknown_model(url: str, body: Json) -> None:
    async with serving() as client:
        error = error_of(await client.post(url, json={**body, "model": "gpt-17"}), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model" and "gpt-17" in error["message"]


async def test_point_49_an_unexpected_error_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()

    def broken(text: str, add_special_tokens: bool = True) -> list[int]:
        raise ZeroDivisionError("at /secret/path")

    engine.tokenizer.encode = broken  # type: ignore[method-assign]
    async with serving(engine) as client:
        with caplog.at_level(logging.ERROR):
            response = await client.post(COMPLETION_URL, json=COMPLETION)
        assert (await client.get("/v1/models")).status_code == 200
    assert error_of(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text and "ZeroDivisionError" in caplog.text


async def test_an_engine_that_dies_ends_streams_with_an_error() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    async with started(make_app(engine)) as app:
        connection = Connection(app, CHAT_URL, {**CHAT, "stream": True})
        whole = Connection(app, COMPLETION_URL, COMPLETION)
        await connection.next()
        await connection.next()
        while len(engine.submitted) < 2:
            await asyncio.sleep(0)
        engine.health_now = Health(False, False, "gone")
        engine.fail("the engine process is gone")
        told = await connection.rest()
        assert told.startswith(b'data: {"error":{"message":') and told.endswith(b"data: [DONE]\n\n")
        start = await whole.next()
        assert start["status"] == 503 and b"retry-after" in dict(start["headers"])


async def test_field_paths() -> None:
    assert field_path(("messages", 0, "content", 2, "text")) == "messages[0].content[2].text"
    assert to_api_error(KeyError("x")).status_code == 500
    assert len(to_api_error(InvalidRequest("x" * 10_000, param="y" * 10_000)).detail) == MAX_MESSAGE
