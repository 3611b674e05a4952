"""Tools with the openai SDK against the demo model, which is small: what it calls is right because it must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.e2e.process import ServerProcess
from tests.e2e.wire import assert_idle, post


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=24)
    unit: Literal["celsius", "fahrenheit"]


class SendMail(BaseModel):
    """Send a mail to a person."""

    to: str = Field(max_length=24)
    urgent: bool


class Person(BaseModel):
    name: str = Field(max_length=24)
    age: int = Field(ge=0, le=150)


TOOLS: Any = [openai.pydantic_function_tool(GetWeather), openai.pydantic_function_tool(SendMail)]
PLAIN_TOOLS: Any = [{"type": "function", "function": {"name": "now", "description": "The time of day."}}, TOOLS[0]]
QUESTION: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
GREEDY: Any = {"model": "demo", "temperature": 0, "max_tokens": 128}
NAMED: Any = {"type": "function", "function": {"name": "SendMail"}}
MODELS: dict[str, type[BaseModel]] = {"GetWeather": GetWeather, "SendMail": SendMail}


@pytest.fixture(scope="module")
def client(demo: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{demo.url}/v1", api_key="any", max_retries=0, timeout=120, _strict_response_validation=True
    ) as client:
        yield client
    assert_idle(demo.url)


def checked(call: Any) -> tuple[str, BaseModel]:
    assert call.type == "function" and call.id.startswith("call_")
    return call.function.name, MODELS[call.function.name].model_validate_json(call.function.arguments)


@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])
def test_calls_fit_their_schemas_and_streams_equal_whole_answers(client: OpenAI, choice: Any) -> None:
    common: Any = {"messages": QUESTION, "tools": TOOLS, "tool_choice": choice, **GREEDY}
    whole = client.chat.completions.create(**common).choices[0]
    with client.chat.completions.stream(**common) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == whole.finish_reason
    assert (streamed.message.content or None) == whole.message.content
    calls = [checked(call) for call in whole.message.tool_calls or []]
    assert [checked(call) for call in streamed.message.tool_calls or []] == calls
    assert len(calls) == 1 or choice == "auto"
    assert choice != NAMED or calls[0][0] == "SendMail"
    assert whole.finish_reason == ("tool_calls" if calls and choice != NAMED else "stop")


def test_several_calls_in_one_answer(client: OpenAI) -> None:
    """This model does not stop by itself where it is told that it may go on: all calls that are whole fit."""
    fields: Any = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": True, **GREEDY}
    answer = client.chat.completions.create(messages=QUESTION, **fields)
    calls = answer.choices[0].message.tool_calls or []
    assert len(calls) > 1 and len({call.id for call in calls}) == len(calls)
    cut = answer.choices[0].finish_reason == "length"
    assert all(map(checked, calls[:-1] if cut else calls))


def test_events_of_the_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(messages=QUESTION, tools=TOOLS, tool_choice=NAMED, **GREEDY) as stream:
        events = list(stream)
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert [(event.name, event.index) for event in done] == [("SendMail", 0)]
    assert "".join(event.arguments_delta for event in pieces) == done[0].arguments
    assert len(pieces) > 2 and isinstance(done[0].parsed_arguments, SendMail)


def test_the_parse_helper(client: OpenAI) -> None:
    fields: Any = {"tools": TOOLS, **GREEDY}
    answer = client.chat.completions.parse(messages=QUESTION, tool_choice="required", **fields)
    calls = answer.choices[0].message.tool_calls
    assert calls and all(isinstance(call.function.parsed_arguments, MODELS[call.function.name]) for call in calls)
    person = client.chat.completions.parse(
        messages=[{"role": "user", "content": "Invent a person."}], response_format=Person, **GREEDY
    )
    assert isinstance(person.choices[0].message.parsed, Person)


def test_tools_and_a_response_format(client: OpenAI) -> None:
    """Either calls, or an answer that fits the format."""
    fields: Any = {"tools": TOOLS, **GREEDY}
    answer = client.chat.completions.parse(messages=QUESTION, response_format=Person, **fields)
    message = answer.choices[0].message
    assert isinstance(message.parsed, Person) if message.content else message.tool_calls


def test_choices_of_one_prompt_and_seeds(client: OpenAI) -> None:
    fields: Any = {"messages": QUESTION, "tools": TOOLS, "tool_choice": "required", "max_tokens": 128}
    fields |= {"model": "demo", "seed": 5, "n": 3, "temperature": 1.0}
    first, again = (client.chat.completions.create(**fields) for _ in range(2))

    def told(answer: Any) -> list[Any]:
        return [[checked(call) for call in choice.message.tool_calls] for choice in answer.choices]

    assert told(first) == told(again)
    ids = [call.id for choice in first.choices for call in choice.message.tool_calls or []]
    assert len(ids) == len(set(ids)) == 3


def test_without_drafts_the_calls_are_the_same(client: OpenAI) -> None:
    fields: Any = {"messages": QUESTION, "tools": TOOLS, "tool_choice": "required", **GREEDY}
    drafted = client.chat.completions.create(**fields)
    plain = client.chat.completions.create(**fields, extra_body={"speculation": {"enabled": False}})
    for one, other in zip(
        drafted.choices[0].message.tool_calls or [], plain.choices[0].message.tool_calls or [], strict=True
    ):
        assert checked(one) == checked(other)


def test_an_agent(client: OpenAI) -> None:
    """Call, result, answer: the whole loop, with a history that has both."""
    messages: list[Any] = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    fields: Any = {"tools": TOOLS, **GREEDY}
    first = client.chat.completions.create(
        messages=messages, tool_choice={"type": "function", "function": {"name": "GetWeather"}}, **fields
    )
    message = first.choices[0].message
    assert message.tool_calls and message.content is None
    messages.append(message.to_dict())
    for call in message.tool_calls:
        assert call.type == "function"
        found = f"It is 21 degrees and sunny in {json.loads(call.function.arguments)['city']}."
        messages.append({"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": found}]})
    last = client.chat.completions.create(messages=messages, **{**fields, "tool_choice": "none"})
    assert last.choices[0].message.content and last.choices[0].message.tool_calls is None
    assert "sunny" in last.choices[0].message.content or "21" in last.choices[0].message.content


def test_allowed_tools(client: OpenAI) -> None:
    allowed: Any = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]},
    }
    answer = client.chat.completions.create(messages=QUESTION, tools=PLAIN_TOOLS, tool_choice=allowed, **GREEDY)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function" and (call.function.name, call.function.arguments) == ("now", "{}")


def test_what_the_prompt_says_of_tools(demo: ServerProcess) -> None:
    plain, told = (
        post(demo.url, "/tokenize", {"messages": QUESTION, **fields}).json()["count"]
        for fields in ({}, {"tools": TOOLS})
    )
    assert told > plain + 50


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        (
            {"tools": [*TOOLS, {"type": "function", "function": {"name": "f", "parameters": {"type": "foo"}}}]},
            "tools[2].function.parameters",
        ),
    ],
)
def test_mistakes_are_named(client: OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=QUESTION, **GREEDY, **fields)
    assert caught.value.param == param
