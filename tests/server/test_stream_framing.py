"""Server-sent events and chunk shapes: points 1 to 16 of the wire format."""

from __future__ import annotations

import asyncio
import json

import pytest

from engine.types import Request
from tests.server.fake_engine import EOS, FakeEngine
from tests.server.harness import (
    CHAT,
    CHAT_URL,
    COMPLETION,
    COMPLETION_URL,
    Connection,
    chat_text,
    error_of,
    events,
    make_app,
    serving,
    started,
    stream,
)

pytestmark = pytest.mark.asyncio


async def test_chat_stream_to_the_byte() -> None:
    async with serving(FakeEngine(answer="hi\n")) as client:
        response = await client.post(CHAT_URL, json={**CHAT, "stream": True, "logit_bias": {}})
    chunks = events(response.text)
    head = json.dumps({key: chunks[0][key] for key in ("id", "object", "created", "model", "system_fingerprint")})
    head = head[:-1].replace(": ", ":").replace(", ", ",")
    texts = [choice["delta"]["content"] for chunk in chunks[1:-1] for choice in chunk["choices"]]
    lines = [
        '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}',
        *(
            f'{{"index":0,"delta":{{"content":{json.dumps(text)}}},"logprobs":null,"finish_reason":null}}'
            for text in texts
        ),
        '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}',
    ]
    expected = "".join(f'data: {head},"choices":[{line}]}}\n\n' for line in lines) + "data: [DONE]\n\n"
    assert response.text == expected


async def test_point_1_content_type_and_4_no_buffering() -> None:
    async with serving() as client:
        response = await client.post(CHAT_URL, json={**CHAT, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"


async def test_point_1_line_breaks_stay_inside_the_json() -> None:
    async with serving(FakeEngine(answer="a\n\nb\r\n")) as client:
        chunks = await stream(client, CHAT_URL, CHAT)
    assert chat_text(chunks) == "a\n\nb\r\n"


async def test_point_2_done_comes_after_an_error_too_and_5_errors_in_a_stream() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    async with started(make_app(engine)) as app:
        connection = Connection(app, CHAT_URL, {**CHAT, "stream": True})
        await connection.next()
        await connection.next()
        engine.error(engine.submitted[0].id)
        body = await connection.rest()
    error = events(body.decode())[-1]["error"]
    assert error["type"] == "server_error" and isinstance(error["message"], str)
    assert "/secret/path" not in body.decode() and "0x7f" not in body.decode()


@pytest.mark.parametrize("url, body", [(CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION)])
async def test_point_3_comments_while_silent(url: str, body: dict[str, object]) -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    async with started(make_app(engine, keep_alive_seconds=0.01)) as app:
        connection = Connection(app, url, {**body, "stream": True})
        while (await connection.next()).get("body") != b": keep-alive\n\n":
            pass
        engine.flowing.set()
        rest = await connection.rest()
    assert events(rest.decode())[-1]["choices"][0]["finish_reason"] == "stop"


async def test_point_4_first_chunk_comes_before_the_first_token() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    async with started(make_app(engine)) as app:
        connection = Connection(app, CHAT_URL, {**CHAT, "stream": True})
        assert (await connection.next())["status"] == 200
        assert b'"role":"assistant"' in (await connection.next())["body"]
        engine.flowing.set()
        await connection.rest()


@pytest.mark.parametrize("body", [{"n": 0}, {"messages": []}, {"model": "other"}, {"max_tokens": -1}])
async def test_point_6_errors_before_the_first_token_are_http_errors(body: dict[str, object]) -> None:
    async with serving() as client:
        response = await client.post(CHAT_URL, json={**CHAT, "stream": True, **body})
    error_of(response, 404 if "model" in body else 400)


async def test_points_7_to_10_chunks_of_several_choices() -> None:
    async with serving() as client:
        chunks = await stream(client, CHAT_URL, {**CHAT, "n": 3})
    for key in ("id", "created", "model", "object"):
        assert len({chunk[key] for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk" and chunks[0]["model"] == "tiny"
    assert chunks[0]["id"].startswith("chatcmpl-") and isinstance(chunks[0]["created"], int)
    assert len({chunk["choices"][0]["index"] for chunk in chunks[:3]}) == 3
    for index in range(3):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""} and own[0]["finish_reason"] is None
        assert [choice["finish_reason"] for choice in own[1:-1]] == [None] * (len(own) - 2)
        assert all(set(choice["delta"]) == {"content"} and choice["delta"]["content"] for choice in own[1:-1])
        assert own[-1]["finish_reason"] == "stop"
        assert chat_text(chunks, index) == "Hello, wörld!"


async def test_point_11_usage_comes_only_when_asked() -> None:
    async with serving() as client:
        plain = await stream(client, CHAT_URL, CHAT)
        asked = await stream(client, CHAT_URL, {**CHAT, "stream_options": {"include_usage": True}})
        null = await stream(client, CHAT_URL, {**CHAT, "stream_options": None})
    assert all(chunk["choices"] and "usage" not in chunk for chunk in plain + null)
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in asked[:-1])
    assert asked[-1]["choices"] == [] and asked[-1]["usage"]["completion_tokens"] == 11
    assert asked[-1]["usage"]["total_tokens"] == asked[-1]["usage"]["prompt_tokens"] + 11


async def test_point_12_stream_options_need_a_stream() -> None:
    async with serving() as client:
        response = await client.post(CHAT_URL, json={**CHAT, "stream_options": {"include_usage": True}})
    assert error_of(response, 400)["param"] == "stream_options"


async def test_point_13_continuous_usage_adds_up() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with serving() as client:
        chunks = await stream(client, COMPLETION_URL, {**COMPLETION, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == counts[-2] == 11
    assert all(chunk["usage"]["prompt_tokens"] == 2 for chunk in chunks)


async def test_point_14_usage_counts_all_choices_and_the_prompt_once() -> None:
    async with serving() as client:
        body = {**COMPLETION, "prompt": ["ab", "abc"], "n": 2}
        chunks = await stream(client, COMPLETION_URL, {**body, "stream_options": {"include_usage": True}})
        whole = (await client.post(COMPLETION_URL, json=body)).json()["usage"]
    assert chunks[-1]["usage"] == whole
    assert whole["prompt_tokens"] == 5 and whole["completion_tokens"] == 4 * 11
    assert whole["prompt_tokens_details"] == {"cached_tokens": 4}


async def test_point_15_empty_output_has_a_role_and_an_end() -> None:
    async with serving(FakeEngine(answer=[EOS])) as client:
        chunks = await stream(client, CHAT_URL, CHAT)
        whole = (await client.post(CHAT_URL, json=CHAT)).json()
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, {}]
    assert whole["choices"][0]["message"]["content"] == "" and whole["choices"][0]["finish_reason"] == "stop"


async def test_point_16_include_obfuscation_is_accepted() -> None:
    async with serving() as client:
        chunks = await stream(client, CHAT_URL, {**CHAT, "stream_options": {"include_obfuscation": False}})
    assert chat_text(chunks) == "Hello, wörld!"


async def test_a_slow_client_gets_everything() -> None:
    """Tokens pile up while the client does not read; none is lost or told twice."""

    def numbers(request: Request) -> list[int]:
        return [*(48 + i % 10 for i in range(200)), EOS]

    async with started(make_app(FakeEngine(answer=numbers))) as app:
        connection = Connection(app, CHAT_URL, {**CHAT, "stream": True, "max_tokens": 300})
        body = b""
        while (message := await connection.next()).get("more_body", True):
            body += message.get("body", b"")
            for _ in range(7):
                await asyncio.sleep(0)
    assert len(set(chat_text(events(body.decode())))) == 10
    assert len(chat_text(events(body.decode()))) == 200
