"""Text and its ends: points 17 to 21 and 31 to 35 of the wire format."""

from __future__ import annotations

import pytest

from engine.types import Request
from tests.server.fake_engine import EOS, HELLO, WORLD, FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Json, chat_text, error_of, serving, stream

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(
    "body, reason, stop_reason",
    [
        ({}, "stop", None),
        ({"max_tokens": 2}, "length", None),
        ({"stop": "ld"}, "stop", "ld"),
        ({"stop_token_ids": [HELLO]}, "stop", HELLO),
    ],
)
async def test_points_17_18_and_20_finish_reasons(body: Json, reason: str, stop_reason: object) -> None:
    async with serving() as client:
        for url, base in ((CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION)):
            whole = (await client.post(url, json={**base, **body})).json()["choices"][0]
            chunks = [chunk["choices"][0] for chunk in await stream(client, url, {**base, **body})]
            assert (whole["finish_reason"], whole["stop_reason"]) == (reason, stop_reason)
            assert (chunks[-1]["finish_reason"], chunks[-1]["stop_reason"]) == (reason, stop_reason)
            assert all(chunk["finish_reason"] is None for chunk in chunks[:-1])


async def test_point_21_completions_have_one_object() -> None:
    async with serving() as client:
        whole = (await client.post(COMPLETION_URL, json=COMPLETION)).json()
        chunks = await stream(client, COMPLETION_URL, COMPLETION)
    assert {whole["object"], *(chunk["object"] for chunk in chunks)} == {"text_completion"}
    assert whole["id"].startswith("cmpl-")
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("answer", ["wörld", "日本語テキスト", "👩‍👩‍👧‍👦 family", "é" * 7, " leading"])
async def test_points_31_34_and_35_streams_hold_whole_characters(answer: str) -> None:
    async with serving(FakeEngine(answer=answer)) as client:
        body = {"max_tokens": 200}
        chunks = await stream(client, CHAT_URL, {**CHAT, **body})
        whole = (await client.post(CHAT_URL, json={**CHAT, **body})).json()["choices"][0]["message"]["content"]
    assert whole == chat_text(chunks) == answer
    assert not any("\ufffd" in choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


async def test_point_31_an_invalid_tail_is_flushed() -> None:
    def half(request: Request) -> list[int]:
        return [HELLO, *FakeEngine().tokenizer.encode("ö")[:1], EOS]

    async with serving(FakeEngine(answer=half)) as client:
        assert chat_text(await stream(client, CHAT_URL, CHAT)) == "Hello\ufffd"


@pytest.mark.parametrize("include, expected", [(False, "Hello, w"), (True, "Hello, wörl")])
async def test_point_32_stops_across_token_borders(include: bool, expected: str) -> None:
    body = {"stop": ["örl"], "include_stop_str_in_output": include, "logprobs": 0}
    async with serving() as client:
        whole = (await client.post(COMPLETION_URL, json={**COMPLETION, **body})).json()
        chunks = await stream(client, COMPLETION_URL, {**COMPLETION, **body})
    choice = whole["choices"][0]
    assert choice["text"] == "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    assert whole["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"]) == 8


async def test_point_32_a_stop_cancels_the_rest() -> None:
    engine = FakeEngine(answer=[HELLO, WORLD, *range(100)])
    async with serving(engine) as client:
        await client.post(CHAT_URL, json={**CHAT, "stop": " wor", "max_tokens": 90})
    assert engine.aborted == [engine.submitted[0].id]


@pytest.mark.parametrize("stop, good", [(None, True), ([], True), ("x", True), (["a", "b", "c", "d"], True)])
async def test_point_33_stops_that_are_fine(stop: object, good: bool) -> None:
    async with serving() as client:
        assert (await client.post(CHAT_URL, json={**CHAT, "stop": stop})).status_code == 200


@pytest.mark.parametrize(
    "stop, code",
    [
        (["a", "b", "c", "d", "e"], "array_above_max_length"),
        ("", "invalid_value"),
        (["a", ""], "invalid_value"),
        ("x" * 1_000_000, "invalid_value"),
        ([1], "invalid_type"),
        (7, "invalid_type"),
        ({"a": "b"}, "invalid_type"),
        ([["a"]], "invalid_type"),
    ],
)
async def test_point_33_stops_that_are_not(stop: object, code: str) -> None:
    async with serving() as client:
        error = error_of(await client.post(CHAT_URL, json={**CHAT, "stop": stop}), 400)
    assert (error["param"], error["code"]) == ("stop", code)
