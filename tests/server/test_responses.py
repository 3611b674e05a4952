"""/v1/responses with the openai SDK as client, whose types check every answer and every event, strictly."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from engine.errors import Overloaded
from tests.server import sdk
from tests.server.fake_engine import EOS, FakeEngine
from tests.server.harness import Connection, Json, error_of, make_app, serving, started
from tests.server.sdk import openai_client

pytestmark = pytest.mark.asyncio
URL = "/v1/responses"
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
ANSWER = "Hello, wörld!"


def named_events(text: str) -> list[Json]:
    """Also checks that they are numbered."""
    found = sdk.named_events(text, EVENT)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


async def streamed(client: httpx2.AsyncClient | Any, **fields: object) -> list[Json]:
    response = await client.post(URL, json={"input": "hi", "stream": True, **fields})
    assert response.status_code == 200, response.text
    return named_events(response.text)


async def test_create() -> None:
    async with openai_client(FakeEngine()) as client:
        answer = await client.responses.create(
            model="tiny",
            input="hi",
            instructions="be short",
            metadata={"a": "b"},
            user="u",
            temperature=0.5,
            top_p=0.5,
            reasoning={"effort": "low", "summary": "auto"},
            text={"format": {"type": "text"}, "verbosity": "low"},
            extra_body={"seed": 1, "min_p": 0.1},
        )
    assert answer.output_text == ANSWER and answer.status == "completed" and answer.error is None
    assert answer.id.startswith("resp_") and answer.model == "tiny"
    assert answer.instructions == "be short" and answer.user == "u"
    assert answer.metadata == {"a": "b"}
    assert (answer.temperature, answer.top_p, answer.truncation, answer.tool_choice) == (0.5, 0.5, "disabled", "auto")
    assert answer.reasoning is not None and answer.reasoning.effort == "low"
    usage = answer.usage
    assert usage is not None and usage.output_tokens == 11 and usage.input_tokens_details.cached_tokens == 2
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


async def test_what_reaches_the_engine() -> None:
    engine = FakeEngine()
    async with openai_client(engine) as client:
        await client.responses.create(
            input=[
                {"role": "developer", "content": "d"},
                {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
                {
                    "id": "msg_1",
                    "type": "message",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "c", "annotations": []}],
                },
                {"role": "user", "content": "e"},
            ],
            model="tiny",
            instructions="i",
            max_output_tokens=7,
            extra_body={"seed": 3, "stop": ["zz"], "cache_salt": "s", "priority": 2},
        )
    (request,) = engine.submitted
    prompt = engine.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
    assert prompt == "<system>i<system>d<user>a\nb<assistant>c<user>e<assistant>"
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.seed, sampling.stop) == (7, 3, ("zz",))
    assert (request.cache_salt, request.priority) == ("s", 2)


async def test_the_events_of_a_stream_in_order() -> None:
    async with serving(FakeEngine(answer="ab")) as client:
        events = await streamed(client)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    first, last = events[0]["response"], events[-1]["response"]
    assert first["status"] == "in_progress" and first["output"] == [] and first["usage"] is None
    assert last["status"] == "completed" and last["id"] == first["id"]
    assert last["output"] == [events[-2]["item"]] and last["usage"]["output_tokens"] == 3
    assert {event["item_id"] for event in events[3:8]} == {events[2]["item"]["id"]}


async def test_a_stream_says_what_a_whole_answer_says() -> None:
    asked: Json = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 8}
    async with serving() as client:
        whole = (await client.post(URL, json={"input": "hi", **asked})).json()
        events = await streamed(client, **asked)
    last = events[-1]["response"]
    for response in (whole, last):
        Response.model_validate(response)
        for key in ("id", "created_at", "completed_at"):
            del response[key]
        del response["output"][0]["id"]
    assert whole == last
    (part,) = whole["output"][0]["content"]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(event["delta"] for event in deltas) == part["text"]
    told = [entry for event in deltas for entry in event["logprobs"]]
    assert part["logprobs"][: len(told)] == told and len(part["logprobs"]) == 8
    assert all(len(entry["top_logprobs"]) == 2 for entry in told)


async def test_the_stream_helper() -> None:
    async with openai_client(FakeEngine()) as client, client.responses.stream(model="tiny", input="hi") as stream:
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        final = await stream.get_final_response()
    assert text == final.output_text == ANSWER and final.status == "completed"


async def test_an_answer_that_was_cut() -> None:
    async with openai_client(FakeEngine()) as client:
        answer = await client.responses.create(model="tiny", input="hi", max_output_tokens=2)
        kinds = [
            event.type
            async for event in await client.responses.create(model="tiny", input="hi", max_output_tokens=2, stream=True)
        ]
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].type == "message" and answer.output[0].status == "incomplete"
    assert kinds[-1] == "response.incomplete"


async def test_an_empty_answer_is_an_empty_message() -> None:
    async with openai_client(FakeEngine(answer=[EOS])) as client:
        answer = await client.responses.create(model="tiny", input="hi")
    assert answer.output_text == "" and answer.output[0].type == "message"


async def test_reports_of_the_extensions() -> None:
    async with openai_client(FakeEngine(stands=(2, 0, 3))) as client:
        extra: Json = {"speculation": {"report": True}}
        answer = await client.responses.create(model="tiny", input="hi", extra_body=extra)
    assert (answer.model_extra or {})["speculation"]["rounds"] == 4


BAD: Sequence[tuple[Json, str]] = (
    ({}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": [3]}, "input"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": ["message"], "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "function_call_output", "call_id": "no", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call", "call_id": "", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": "hi", "max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "hi", "max_output_tokens": "3"}, "max_output_tokens"),
    ({"input": "hi", "max_tokens": 3}, "max_tokens"),
    ({"input": "hi", "messages": []}, "messages"),
    ({"input": "hi", "response_format": {"type": "text"}}, "response_format"),
    ({"input": "hi", "n": 2}, "n"),
    ({"input": "hi", "top_logprobs": 99}, "top_logprobs"),
    ({"input": "hi", "include": ["everything"]}, "include[0]"),
    ({"input": "hi", "background": True}, "background"),
    ({"input": "hi", "conversation": "conv_1"}, "conversation"),
    ({"input": "hi", "prompt": {"id": "p"}}, "prompt"),
    ({"input": "hi", "tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"input": "hi", "tools": [{"type": "function"}]}, "tools[0].name"),
    ({"input": "hi", "tools": "all"}, "tools"),
    ({"input": "hi", "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"input": "hi", "tool_choice": {"type": "mcp"}}, "tool_choice"),
    ({"input": "hi", "text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"input": "hi", "metadata": {"a": 1}}, "metadata.a"),
    ({"input": "hi", "truncation": "some"}, "truncation"),
    ({"input": "hi", "temperature": 3}, "temperature"),
    ({"input": "hi", "speculation": {"trace": True}}, "speculation.trace"),
    ({"input": "hi", "store": "yes"}, "store"),
    ({"input": "x" * 600}, "input"),
    ({"input": "x" * 600, "stream": True}, "input"),
    ({"input": "hi", "instructions": "x" * 600}, "input"),
    ({"input": "hi", "bad_words": 3}, "bad_words"),
    ({"input": "hi", "logit_bias": {"999": 1}}, "logit_bias"),
)


@pytest.mark.parametrize("body, param", BAD, ids=lambda value: value if isinstance(value, str) else "")
async def test_bad_requests_name_the_field(body: Json, param: str) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        response = await client.post(URL, json={"model": "tiny", **body})
    assert error_of(response, 400)["param"] == param
    assert engine.submitted == []


async def test_other_errors() -> None:
    engine = FakeEngine()
    engine.refusal = Overloaded("full", "queue", 3)
    async with openai_client(engine) as client:
        with pytest.raises(openai.NotFoundError, match="nothing"):
            await client.responses.create(model="nothing", input="hi")
        with pytest.raises(openai.InternalServerError) as raised:
            await client.responses.create(model="tiny", input="hi")
    assert raised.value.response.headers["retry-after"] == "3"


@pytest.mark.parametrize("silent", [True, False])
async def test_an_error_after_the_start(silent: bool) -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    async with started(make_app(engine, keep_alive_seconds=0.01)) as app:
        connection = Connection(app, URL, {"input": "hi", "stream": True})
        await connection.next()
        begun = (await connection.next())["body"].decode()
        while silent and (await connection.next()).get("body") != b": keep-alive\n\n":
            pass
        engine.error(engine.submitted[0].id)
        events = named_events(begun + (await connection.rest()).decode())
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-2]["code"] == "internal_error" and "/secret" not in str(events)
    failed = events[-1]["response"]
    assert failed["status"] == "failed" and failed["error"]["code"] == "server_error"


async def test_a_client_that_leaves() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    async with started(make_app(engine)) as app:
        for stream in (True, False):
            connection = Connection(app, URL, {"input": "hi", "stream": stream})
            if stream:
                await connection.next()
            while len(engine.submitted) < (1 if stream else 2):
                await asyncio.sleep(0)
            await connection.leave()
        assert len(engine.aborted) == 2 and len(app.state.service.responses) == 0
        engine.flowing.set()
