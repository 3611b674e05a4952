"""The asynchronous openai SDK against the demo model: many at once, and streams that are left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.e2e.process import ServerProcess
from tests.e2e.wire import assert_idle, complete

pytestmark = pytest.mark.asyncio

GREEDY: Any = {"model": "demo", "temperature": 0}
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Germany": "Berlin"}


@asynccontextmanager
async def connected(demo: ServerProcess, *, strict: bool = True) -> AsyncIterator[AsyncOpenAI]:
    """`strict` has the SDK check answers against its types, which know no finish reason of null in completions."""
    async with AsyncOpenAI(
        base_url=f"{demo.url}/v1", api_key="any", max_retries=0, timeout=60, _strict_response_validation=strict
    ) as client:
        yield client


async def test_many_at_once_get_their_own_answers(demo: ServerProcess) -> None:
    async def streamed(client: AsyncOpenAI, prompt: str) -> str:
        chunks = await client.completions.create(prompt=prompt, max_tokens=4, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def whole(client: AsyncOpenAI, prompt: str) -> str:
        return (await client.completions.create(prompt=prompt, max_tokens=4, **GREEDY)).choices[0].text

    prompts = [f"The capital of {country} is" for country in CAPITALS]
    async with connected(demo) as client, connected(demo, strict=False) as lenient:
        texts = await asyncio.gather(
            *(whole(client, prompt) for prompt in prompts), *(streamed(lenient, prompt) for prompt in prompts)
        )
    for (country, city), text, again in zip(
        CAPITALS.items(), texts[: len(prompts)], texts[len(prompts) :], strict=True
    ):
        assert city in text and again == text, country


async def test_models_chat_and_usage(demo: ServerProcess) -> None:
    async with connected(demo) as client:
        assert [model.id async for model in client.models.list()] == ["demo"]
        answer = await client.chat.completions.create(messages=QUESTION, logprobs=True, top_logprobs=1, **GREEDY)
        options: Any = {"include_usage": True}
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                messages=QUESTION, stream=True, stream_options=options, **GREEDY
            )
        ]
    (choice,) = answer.choices
    assert choice.message.content is not None and "Paris" in choice.message.content
    assert answer.usage is not None and choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert told == choice.message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


async def test_choices_of_several_prompts_stream_together(demo: ServerProcess) -> None:
    asked: Any = {"model": "demo", "prompt": ["Red, green and", "One, two,"], "n": 2, "seed": 5, "max_tokens": 8}
    async with connected(demo, strict=False) as client:
        whole = await client.completions.create(**asked)
        texts = [""] * 4
        async for chunk in await client.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4


async def test_streams_that_are_left_leave_nothing(demo: ServerProcess) -> None:
    async def leave_after(client: AsyncOpenAI, count: int) -> None:
        stream = await client.chat.completions.create(
            messages=[{"role": "user", "content": f"Write a long story about the number {count}."}],
            model="demo",
            stream=True,
            extra_body={"ignore_eos": True},  # thousands of tokens: only a cancel ends it within the time of this test
        )
        async with stream:
            async for _ in stream:
                count -= 1
                if count < 0:
                    break

    before = complete(demo.url, "The sun rises in the east and")
    async with connected(demo) as client:
        await asyncio.gather(*(leave_after(client, count) for count in range(6)))
        assert_idle(demo.url)
        assert before == complete(demo.url, "The sun rises in the east and")


@pytest.mark.parametrize("prompt", ["😀😁😂🤣😃😄😅", "日本語の文章です。東京は日本の", "Привет, как дела? Я"])
async def test_characters_of_several_tokens_come_whole(demo: ServerProcess, prompt: str) -> None:
    asked: Any = {**GREEDY, "prompt": prompt, "max_tokens": 24, "logprobs": 0}
    async with connected(demo, strict=False) as client:
        whole = (await client.completions.create(**asked)).choices[0]
        chunks = [chunk.choices[0] async for chunk in await client.completions.create(**asked, stream=True)]
    assert "\ufffd" in "".join((whole.logprobs and whole.logprobs.tokens) or ())  # tokens that are parts of characters
    assert not any("\ufffd" in chunk.text for chunk in chunks[:-1])
    assert "".join(chunk.text for chunk in chunks) == whole.text
    offsets = [at for chunk in chunks for at in (chunk.logprobs and chunk.logprobs.text_offset) or ()]
    assert whole.logprobs is not None and offsets == whole.logprobs.text_offset and len(offsets) == 24


async def test_typed_errors_and_time_limits(demo: ServerProcess) -> None:
    async with connected(demo) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(prompt=[1] * 8192, **GREEDY)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.3).completions.create(
                prompt="Count:", max_tokens=4000, extra_body={"ignore_eos": True}, **GREEDY
            )
    assert_idle(demo.url)
