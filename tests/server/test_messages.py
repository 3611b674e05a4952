"""/v1/messages with the anthropic SDK as client, whose types check every answer and every event, strictly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter

from engine.errors import Overloaded
from tests.server import sdk
from tests.server.fake_engine import FakeEngine
from tests.server.harness import Connection, Json, make_app, serving, started
from tests.server.sdk import anthropic_client

pytestmark = pytest.mark.asyncio
URL, COUNT_URL = "/v1/messages", "/v1/messages/count_tokens"
EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
ANSWER = "Hello, wörld!"
HI: Any = [{"role": "user", "content": "hi"}]
BODY: Json = {"model": "tiny", "max_tokens": 50, "messages": HI}


def named_events(text: str) -> list[Json]:
    return sdk.named_events(text, EVENT, ("ping", "error"))


def error_of(response: httpx2.Response | Any, status: int) -> Json:
    """The error object of a response, in Anthropic's shape."""
    assert response.status_code == status, (response.status_code, response.text)
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    error: Json = body["error"]
    assert set(error) == {"type", "message"} and error["message"]
    return error


async def test_create() -> None:
    async with anthropic_client(FakeEngine(), api_key="k") as client:
        answer = await client.messages.create(model="tiny", max_tokens=50, messages=HI, extra_body={"temperature": 0.5})
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "tiny")
    assert answer.id.startswith("msg_") and answer._request_id
    (block,) = answer.content
    assert block.type == "text" and block.text == ANSWER
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    usage = answer.usage
    assert (usage.output_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (11, 2, 0)


async def test_what_reaches_the_engine() -> None:
    engine = FakeEngine()
    async with anthropic_client(engine) as client:
        await client.messages.create(
            model="tiny",
            max_tokens=50,
            system=[
                {"type": "text", "text": "s"},
                {"type": "text", "text": "t", "cache_control": {"type": "ephemeral"}},
            ],
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
                {"role": "user", "content": "d"},
            ],
            stop_sequences=["x", "yy"],
            metadata={"user_id": "u"},
            thinking={"type": "disabled"},
            extra_body={"seed": 3, "min_p": 0.1, "top_p": 0.5, "top_k": 5},
        )
    (request,) = engine.submitted
    prompt = engine.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
    assert prompt == "<system>s\nt<user>a\nb<assistant>c<user>d<assistant>"
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.stop, sampling.seed) == (50, ("x", "yy"), 3)
    assert (sampling.min_p, sampling.top_p, sampling.top_k) == (0.1, 0.5, 5)


async def test_a_last_turn_of_the_assistant_is_gone_on_with() -> None:
    engine = FakeEngine()
    async with anthropic_client(engine) as client:
        started_with: Any = [*HI, {"role": "assistant", "content": "Well"}]
        await client.messages.create(model="tiny", max_tokens=5, messages=started_with)
    prompt = engine.tokenizer.decode(engine.submitted[0].prompt_ids, skip_special_tokens=False)
    assert prompt == "<user>hi<assistant>Well"


async def test_the_events_of_a_stream_in_order() -> None:
    async with serving(FakeEngine(answer="ab")) as client:
        events = named_events((await client.post(URL, json={**BODY, "stream": True})).text)
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    first, last = events[0]["message"], events[-2]
    assert first["content"] == [] and first["stop_reason"] is None and first["usage"]["input_tokens"] == 19
    assert last["delta"] == {"stop_reason": "end_turn", "stop_sequence": None, "stop_details": None}
    assert last["usage"]["input_tokens"] + last["usage"]["cache_read_input_tokens"] == 19


async def test_the_stream_helper_says_what_a_whole_answer_says() -> None:
    async with anthropic_client(FakeEngine()) as client:
        whole = await client.messages.create(model="tiny", max_tokens=50, messages=HI)
        async with client.messages.stream(model="tiny", max_tokens=50, messages=HI) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
    assert text == ANSWER
    assert final.to_dict() | {"id": 0} == whole.to_dict() | {"id": 0, "content": final.to_dict()["content"]}
    assert final.content[0].type == "text" and final.content[0].text == text


@pytest.mark.parametrize(
    "fields, reason, stop",
    [({"max_tokens": 2}, "max_tokens", None), ({"stop_sequences": ["wör"]}, "stop_sequence", "wör")],
)
async def test_why_it_stopped(fields: Json, reason: str, stop: str | None) -> None:
    async with serving() as client:
        whole = (await client.post(URL, json={**BODY, **fields})).json()
        events = named_events((await client.post(URL, json={**BODY, **fields, "stream": True})).text)
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, stop)
    assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": stop, "stop_details": None}


async def test_count_tokens() -> None:
    engine = FakeEngine()
    async with anthropic_client(engine) as client:
        counted = await client.messages.count_tokens(model="tiny", messages=HI, system="s")
        answer = await client.messages.create(model="tiny", messages=HI, system="s", max_tokens=5)
        whole: Json = {**BODY, "stream": True, "speculation": {"enabled": False}, "logprobs": 3}
        assert (await client.post(COUNT_URL, cast_to=object, body=whole)) == {"input_tokens": 19}
    usage = answer.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert len(engine.submitted) == 1


BAD: Sequence[tuple[Json, str]] = (
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": None}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "no"}]}]},
        "messages[0].content[0].tool_use_id",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": "{}"}]}]},
        "messages[0].content[0].input",
    ),
    ({"system": 3}, "system"),
    ({"system": [{"type": "image"}]}, "system[0]"),
    ({"temperature": 1.5}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
    ({"stop": ["a"]}, "stop"),
    ({"thinking": {"type": "enabled", "budget_tokens": 50}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "sometimes"}}, "thinking.type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"mcp_servers": []}, "mcp_servers"),
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"diffusion": {"trace": True}}, "diffusion.trace"),
    ({"logit_bias": {"999": 1}}, "logit_bias"),
)


@pytest.mark.parametrize("body, named", BAD, ids=lambda value: value if isinstance(value, str) else "")
async def test_bad_requests_name_the_field(body: Json, named: str) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        response = await client.post(URL, json={**BODY, **body})
    error = error_of(response, 400)
    assert error["type"] == "invalid_request_error" and named in error["message"], error
    assert engine.submitted == []


async def test_a_prompt_that_does_not_fit() -> None:
    async with serving() as client:
        response = await client.post(URL, json={**BODY, "messages": [{"role": "user", "content": "x" * 600}]})
    assert "maximum context length is 512 tokens" in error_of(response, 400)["message"]


async def test_errors_that_no_route_makes() -> None:
    async with serving(api_key="right", max_body_bytes=1000) as client:
        good = {"x-api-key": "right", "anthropic-version": "2023-06-01"}
        for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong", "x-api-key": "right"}):
            for url in (URL, COUNT_URL):
                assert error_of(await client.post(url, json=BODY, headers=headers), 401)["type"] == (
                    "authentication_error"
                )
        assert error_of(await client.get(URL, headers=good), 405)["type"] == "invalid_request_error"
        assert error_of(await client.get(f"{URL}/batches", headers=good), 404)["type"] == "not_found_error"
        assert error_of(await client.post(URL, json={**BODY, "model": "no"}, headers=good), 404)["type"] == (
            "not_found_error"
        )
        assert error_of(await client.post(URL, json={"x": "x" * 2000}, headers=good), 413)["type"] == (
            "request_too_large"
        )
        assert error_of(await client.post(URL, content=b"{", headers=good), 415)["type"] == "invalid_request_error"
        json_type = {**good, "content-type": "application/json"}
        assert error_of(await client.post(URL, content=b"{", headers=json_type), 400)["type"] == (
            "invalid_request_error"
        )
        assert (await client.post(URL, json=BODY, headers=good)).status_code == 200
        assert "error" in (await client.get("/v1/messagesx", headers=good)).json()  # a path of another family


async def test_a_server_that_is_full() -> None:
    engine = FakeEngine()
    engine.refusal = Overloaded("full", "queue", 3)
    async with anthropic_client(engine) as client:
        with pytest.raises(anthropic.InternalServerError) as raised:
            await client.messages.create(model="tiny", max_tokens=5, messages=HI)
    assert raised.value.status_code == 503 and raised.value.response.headers["retry-after"] == "3"
    assert raised.value.type == "overloaded_error" and raised.value.request_id


async def test_an_error_after_the_start() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    async with started(make_app(engine, keep_alive_seconds=0.01)) as app:
        connection = Connection(app, URL, {**BODY, "stream": True})
        await connection.next()
        begun = (await connection.next())["body"].decode()
        while (await connection.next()).get("body") != b": keep-alive\n\n":
            pass
        engine.error(engine.submitted[0].id)
        events = named_events(begun + (await connection.rest()).decode())
    assert events[-1]["type"] == "error" and events[-1]["error"]["type"] == "api_error"
    assert "/secret" not in str(events)


async def test_a_client_that_leaves() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    async with started(make_app(engine)) as app:
        connection = Connection(app, URL, {**BODY, "stream": True})
        await connection.next()
        await connection.leave()
        assert len(engine.aborted) == 1
        engine.flowing.set()
