"""The responses client of the openai SDK and the anthropic SDK against the demo model: their types, strictly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.e2e.process import ServerProcess
from tests.e2e.wire import assert_idle, post

QUESTION = "What is the capital of France?"
GREEDY: Any = {"model": "demo", "temperature": 0}
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "weather", "description": "The weather of a city.", "parameters": SCHEMA}
BLOCK_TOOL: Any = {"name": "weather", "description": "The weather of a city.", "input_schema": SCHEMA}
ASKED: Any = [{"role": "user", "content": "How is the weather in Rome?"}]


@pytest.fixture(scope="module")
def client(demo: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{demo.url}/v1", api_key="any", max_retries=0, timeout=60, _strict_response_validation=True
    ) as client:
        yield client
    assert_idle(demo.url)


@pytest.fixture(scope="module")
def claude(demo: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(
        base_url=demo.url, api_key="any", max_retries=0, timeout=60, _strict_response_validation=True
    ) as client:
        yield client
    assert_idle(demo.url)


def test_a_response_is_what_a_chat_would_say(client: OpenAI) -> None:
    answer = client.responses.create(input=QUESTION, max_output_tokens=24, **GREEDY)
    messages: Any = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(messages=messages, max_tokens=24, **GREEDY)
    assert answer.output_text == chat.choices[0].message.content and "Paris" in answer.output_text
    assert answer.usage is not None and chat.usage is not None
    assert answer.usage.total_tokens == chat.usage.total_tokens


def test_a_streamed_conversation_that_is_kept(client: OpenAI) -> None:
    with client.responses.stream(input=QUESTION, max_output_tokens=24, **GREEDY) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        first = stream.get_final_response()
    assert text == first.output_text == client.responses.retrieve(first.id).output_text
    second = client.responses.create(
        input="And of Italy?", previous_response_id=first.id, max_output_tokens=24, **GREEDY
    )
    told: Any = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And of Italy?"},
    ]
    assert second.output_text == client.responses.create(input=told, max_output_tokens=24, **GREEDY).output_text
    assert [item.type for item in client.responses.input_items.list(second.id)] == ["message"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


class Capital(BaseModel):
    city: str = Field(max_length=20)
    large: bool


def test_a_response_of_a_type(client: OpenAI) -> None:
    answer = client.responses.parse(input=QUESTION, text_format=Capital, max_output_tokens=80, **GREEDY)
    assert isinstance(answer.output_parsed, Capital)


def test_a_call_by_a_response(client: OpenAI) -> None:
    asked: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 80}
    answer = client.responses.create(input=ASKED, **asked, **GREEDY)
    call = answer.output[-1]
    assert call.type == "function_call" and call.name == "weather" and set(json.loads(call.arguments)) == {"city"}
    with client.responses.stream(input=ASKED, **asked, **GREEDY) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 20 degrees"}
    after = client.responses.create(
        input=[result], previous_response_id=answer.id, tools=[TOOL], max_output_tokens=16, **GREEDY
    )
    assert after.status in ("completed", "incomplete") and after.output


def test_a_message(claude: Anthropic) -> None:
    asked: Any = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24}
    greedy: Any = {"temperature": 0}
    answer = claude.messages.create(**asked, extra_body=greedy)
    (block,) = answer.content
    assert block.type == "text" and "Paris" in block.text and answer.stop_reason in ("end_turn", "max_tokens")
    with claude.messages.stream(**asked, extra_body=greedy) as stream:
        assert "".join(stream.text_stream) == block.text
        assert stream.get_final_message().usage.output_tokens == answer.usage.output_tokens
    del asked["max_tokens"]
    counted = claude.messages.count_tokens(**asked)
    assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    stopped = claude.messages.create(**asked, max_tokens=24, stop_sequences=["Paris"], extra_body=greedy)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Paris")


def test_a_call_by_a_message(claude: Anthropic) -> None:
    asked: Any = {"model": "demo", "messages": ASKED, "max_tokens": 80, "tools": [BLOCK_TOOL]}
    choice: Any = {"type": "tool", "name": "weather"}
    answer = claude.messages.create(**asked, tool_choice=choice, extra_body={"temperature": 0})
    call = answer.content[-1]
    assert call.type == "tool_use" and answer.stop_reason == "tool_use" and set(call.input) == {"city"}
    with claude.messages.stream(**asked, tool_choice=choice, extra_body={"temperature": 0}) as stream:
        final = stream.get_final_message().content[-1]
    assert final.type == "tool_use" and final.input == call.input
    turns: Any = [
        *ASKED,
        {"role": "assistant", "content": [call.to_dict()]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]},
    ]
    after = claude.messages.create(model="demo", messages=turns, max_tokens=16, tools=[BLOCK_TOOL])
    assert after.content


def test_what_is_wrong_is_told_in_each_shape(demo: ServerProcess) -> None:
    wrong = post(demo.url, "/v1/responses", {"input": "hi", "max_output_tokens": -1})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "max_output_tokens"
    wrong = post(demo.url, "/v1/messages", {"max_tokens": 5, "messages": []})
    assert wrong.status_code == 400 and wrong.json()["type"] == "error"
    assert wrong.json()["request_id"] == wrong.headers["request-id"]
    assert_idle(demo.url)
