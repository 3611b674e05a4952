"""Points 36 to 41 of the wire's conformance list: tool calls, over a real socket with a scripted model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.e2e.scripted import ScriptedServer
from tests.e2e.wire import error_of, post
from tests.server.fake_engine import FakeEngine
from tests.server.harness import events

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "hi"}]


class Weather(BaseModel):
    city: str


class Clock(BaseModel):
    zone: str


TOOLS: Any = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Clock)]
FIELDS: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "parallel_tool_calls": True}
ARGUMENTS = ('{"city": "Zürich \\"x\\""}', '{"zone": "UTC"}')
CALLS = "".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>\n'
    for name, arguments in zip(("Weather", "Clock"), ARGUMENTS, strict=True)
)


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(FakeEngine(answer=CALLS, max_model_len=4096)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ScriptedServer) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30, _strict_response_validation=True
    ) as client:
        yield client


def parts_of(server: ScriptedServer) -> list[dict[str, Any]]:
    chunks = events(post(server.url, CHAT, {**FIELDS, "stream": True}).text)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [part for choice in choices for part in choice["delta"].get("tool_calls", ())]


def test_point_36_fragments_of_calls(server: ScriptedServer) -> None:
    begun: dict[int, str] = {}
    for part in parts_of(server):
        if part["index"] in begun:
            assert set(part) == {"index", "function"} and set(part["function"]) == {"arguments"}
            continue
        assert part["index"] == len(begun)
        assert set(part) == {"index", "id", "type", "function"} and part["type"] == "function"
        assert set(part["function"]) == {"name", "arguments"} and part["function"]["arguments"] == ""
        begun[part["index"]] = part["id"]
    assert len(set(begun.values())) == len(begun) == 2
    assert all(call_id.startswith("call_") for call_id in begun.values())


def test_point_37_arguments_are_text(server: ScriptedServer) -> None:
    texts = ["", ""]
    for part in parts_of(server):
        assert isinstance(part["function"]["arguments"], str)
        texts[part["index"]] += part["function"]["arguments"]
    (choice,) = post(server.url, CHAT, FIELDS).json()["choices"]
    assert texts == [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == list(ARGUMENTS)
    assert json.loads(texts[0]) == {"city": 'Zürich "x"'}


def test_point_38_whole_messages(server: ScriptedServer, client: OpenAI) -> None:
    (choice,) = post(server.url, CHAT, FIELDS).json()["choices"]
    assert choice["message"]["content"] is None and choice["message"]["refusal"] is None
    assert [call["type"] for call in choice["message"]["tool_calls"]] == ["function"] * 2
    (plain,) = post(server.url, CHAT, {**FIELDS, "tool_choice": "none"}).json()["choices"]
    assert "tool_calls" not in plain["message"] and plain["message"]["content"] == CALLS
    typed = client.chat.completions.create(**FIELDS).choices[0]
    assert len(typed.message.tool_calls or ()) == 2 and typed.finish_reason == "tool_calls"


def test_point_39_history(server: ScriptedServer, client: OpenAI) -> None:
    """Calls and results as the SDK gives them back, and arguments as mappings for the template."""
    message = client.chat.completions.create(**FIELDS).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in message.tool_calls or ()]
    history = [*MESSAGES, message.to_dict(), *results]
    assert client.chat.completions.create(**{**FIELDS, "messages": history}).choices[0].message.tool_calls
    prompt = server.engine.tokenizer.decode(server.engine.submitted[-1].prompt_ids, False)
    assert '"arguments": {"city": "Zürich \\"x\\""}}' in prompt and "returned:\nfine" in prompt
    wrong = [*MESSAGES, message.to_dict(), {"role": "tool", "tool_call_id": "call_other", "content": "fine"}]
    assert error_of(post(server.url, CHAT, {**FIELDS, "messages": wrong}))["param"] == "messages[2].tool_call_id"


def test_point_40_choices_and_their_defaults(server: ScriptedServer) -> None:
    assert error_of(post(server.url, CHAT, {**FIELDS, "tools": []}))["param"] == "tools"
    for choice in ({"type": "function", "function": {"name": "Other"}}, "required", "auto"):
        fields = {**FIELDS, "tool_choice": choice}
        if isinstance(choice, str):
            del fields["tools"]
        assert error_of(post(server.url, CHAT, fields))["param"] == "tool_choice"
    (with_tools,) = post(server.url, CHAT, {**FIELDS, "tool_choice": None}).json()["choices"]
    (without,) = post(server.url, CHAT, {"messages": MESSAGES}).json()["choices"]
    assert with_tools["message"]["tool_calls"] and "tool_calls" not in without["message"]


def test_point_41_the_stream_helper_parses(server: ScriptedServer, client: OpenAI) -> None:
    with client.chat.completions.stream(**FIELDS) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    calls = [call.function.parsed_arguments for call in final.message.tool_calls or ()]
    assert calls == [Weather(city='Zürich "x"'), Clock(zone="UTC")]
    named: Any = {"type": "function", "function": {"name": "Weather"}}
    server.engine.answer = CALLS[: CALLS.index("\n<tool_call>")]
    with client.chat.completions.stream(**FIELDS, tool_choice=named) as stream:
        final = stream.get_final_completion().choices[0]
    server.engine.answer = CALLS
    assert final.finish_reason == "stop" and len(final.message.tool_calls or ()) == 1
    with pytest.raises(openai.LengthFinishReasonError), client.chat.completions.stream(**FIELDS, max_tokens=50) as cut:
        cut.get_final_completion()
