"""The official client, in process: it parses what we send and raises the errors that it should."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from engine.errors import EngineDead, Overloaded, StepFailed
from engine.types import Request
from tests.server.fake_engine import FakeEngine
from tests.server.harness import make_app, started

pytestmark = pytest.mark.asyncio
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def connected(engine: FakeEngine, **settings: Any) -> AsyncIterator[AsyncOpenAI]:
    async with started(make_app(engine, **settings)) as app:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
        async with AsyncOpenAI(base_url="http://test/v1", api_key="k", http_client=http, max_retries=0) as client:
            yield client


async def test_models() -> None:
    async with connected(FakeEngine("org/tiny")) as client:
        assert [model.id async for model in client.models.list()] == ["org/tiny"]
        assert (await client.models.retrieve("org/tiny")).created == 1_700_000_000


async def test_chat_and_completions() -> None:
    async with connected(FakeEngine()) as client:
        chat = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, n=3, logprobs=True, top_logprobs=2, seed=1, stop=["zzz"]
        )
        text = await client.completions.create(model="tiny", prompt=["a", "b"], logprobs=1, echo=True)
    assert [choice.message.content for choice in chat.choices] == ["Hello, wörld!"] * 3
    scores = chat.choices[0].logprobs
    assert scores is not None and scores.content is not None and len(scores.content[0].top_logprobs) == 2
    assert chat.choices[0].message.refusal is None and chat._request_id
    assert chat.usage is not None and chat.usage.completion_tokens == 33
    assert chat.usage.prompt_tokens_details is not None and chat.usage.prompt_tokens_details.cached_tokens == 2
    assert [choice.text for choice in text.choices] == ["aHello, wörld!", "bHello, wörld!"]
    assert text.choices[0].logprobs is not None and text.choices[0].logprobs.token_logprobs is not None


async def test_streams() -> None:
    async with connected(FakeEngine()) as client:
        options: Any = {"include_usage": True}
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model="tiny", messages=MESSAGES, stream=True, stream_options=options
            )
        ]
        async with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
            final = await stream.get_final_completion()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello, wörld!"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 11
    assert final.choices[0].message.content == "Hello, wörld!" and final.choices[0].finish_reason == "stop"


async def test_the_speculation_extension() -> None:
    extra: Any = {"speculation": {"max_draft": 4, "report": True}}
    options: Any = {"include_usage": True}
    async with connected(FakeEngine(stands=(2, 0, 3))) as client:
        asked: Any = {"model": "tiny", "messages": MESSAGES, "extra_body": extra}
        chat = await client.chat.completions.create(**asked)
        text = await client.completions.create(model="tiny", prompt="hi", extra_body=extra)
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
        counted = [
            chunk async for chunk in await client.chat.completions.create(**asked, stream=True, stream_options=options)
        ]
        async with client.chat.completions.stream(**asked) as stream:
            helped = [event.chunk async for event in stream if event.type == "chunk"]
            final = await stream.get_final_completion()
    told = (chat.model_extra or {})["speculation"]
    assert told["rounds"] == 4 == sum(told["histogram"]) and told["accepted"] == 7
    assert (text.model_extra or {})["speculation"] == told
    for seen in (chunks, counted, helped):
        assert [(chunk.model_extra or {}).get("speculation") for chunk in seen] == [None] * (len(seen) - 1) + [told]
    assert final.choices[0].message.content == "Hello, wörld!"
    assert chat.usage is not None and chat.usage.completion_tokens_details is not None
    assert chat.usage.completion_tokens_details.accepted_prediction_tokens is None


@pytest.mark.parametrize(
    "fields, error, code, param",
    [
        ({"n": 0}, openai.BadRequestError, "invalid_value", "n"),
        ({"temperature": 9}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"stop": list("abcde")}, openai.BadRequestError, "array_above_max_length", "stop"),
        ({"tools": []}, openai.BadRequestError, "invalid_value", "tools"),
        (
            {"extra_body": {"speculation": {"enabled": True}}},
            openai.BadRequestError,
            "unsupported_parameter",
            "speculation.enabled",
        ),
        ({"model": "none"}, openai.NotFoundError, "model_not_found", "model"),
        (
            {"messages": [{"role": "user", "content": "x" * 600}]},
            openai.BadRequestError,
            "context_length_exceeded",
            "messages",
        ),
    ],
)
async def test_typed_errors(fields: Any, error: type[openai.APIStatusError], code: str, param: str) -> None:
    async with connected(FakeEngine()) as client:
        with pytest.raises(error) as caught:
            await client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **fields})
    assert (caught.value.code, caught.value.param, caught.value.type) == (code, param, "invalid_request_error")
    assert caught.value.request_id


@pytest.mark.parametrize(
    "refusal, error",
    [
        (Overloaded("full", "max_num_queued_reqs"), openai.InternalServerError),
        (EngineDead("gone"), openai.InternalServerError),
        (StepFailed("NaN"), openai.InternalServerError),
    ],
)
async def test_server_errors(refusal: Any, error: type[openai.APIStatusError]) -> None:
    engine = FakeEngine()
    async with connected(engine) as client:
        engine.refusal = refusal
        with pytest.raises(error) as caught:
            await client.chat.completions.create(model="tiny", messages=MESSAGES)
        engine.refusal = None
    assert caught.value.type == "server_error" and caught.value.code


async def test_a_wrong_key() -> None:
    async with connected(FakeEngine(), api_key="other") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.models.list()
    assert caught.value.code == "invalid_api_key"


async def test_overload_is_retried_after_the_told_time_and_failures_are_not() -> None:
    """Point 47: the client's own retries, counted."""
    engine, submits = FakeEngine(), 0
    submit = engine.submit

    async def counting(*arguments: Any, **names: Any) -> Any:
        nonlocal submits
        submits += 1
        if submits == 2:
            engine.refusal = None
        return await submit(*arguments, **names)

    engine.submit = counting  # type: ignore[method-assign]
    async with connected(engine) as client:
        engine.refusal = Overloaded("full", "max_num_queued_reqs", retry_after=0.01)
        patient = client.with_options(max_retries=2)
        assert (await patient.chat.completions.create(model="tiny", messages=MESSAGES)).choices
        assert submits == 2
        engine.refusal = StepFailed("NaN")
        submits = 2
        with pytest.raises(openai.InternalServerError):
            await patient.chat.completions.create(model="tiny", messages=MESSAGES)
    assert submits == 3


async def test_an_error_in_a_stream() -> None:
    engine = FakeEngine()

    def fails(request: Request) -> list[int]:
        engine.error(request.id)
        return []

    engine.answer = fails
    async with connected(engine) as client:
        pending = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="failed on this request"):
            async for _ in pending:
                pass
