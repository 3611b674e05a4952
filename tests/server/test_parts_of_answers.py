"""Thoughts and calls in the two endpoints that write an answer part by part: /v1/responses and /v1/messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel

from tests.server import test_messages, test_responses
from tests.server.fake_engine import FakeEngine, make_tokenizer
from tests.server.harness import Json, error_of, serving
from tests.server.sdk import anthropic_client, openai_client

pytestmark = pytest.mark.asyncio

SCHEMA: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "weather", "description": "Of a city.", "parameters": SCHEMA, "strict": True}
OTHER: Any = {**TOOL, "name": "time"}
BLOCK_TOOL: Any = {"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}
ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'
OSLO = '{"name": "time", "arguments": {"city": "Oslo"}}'
CALLS = f"Let me see.<tool_call>\n{ROME}\n</tool_call>\n<tool_call>\n{OSLO}\n</tool_call>"
THOUGHT = "<think>\nWhy not?\n</think>\n\nRome."
HI: Any = [{"role": "user", "content": "hi"}]


def answering(text: str) -> FakeEngine:
    """An engine whose model thinks in the usual form."""
    tokenizer = make_tokenizer(marks=("<think>", "</think>"))
    engine = FakeEngine(answer=text, tokenizer=tokenizer, max_model_len=4096)
    name, ids = tokenizer.thinking_form("auto")
    engine.info = replace(engine.info, reasoning_parser=name, thinking=ids, vocab_size=tokenizer.vocab_size)
    return engine


def prompt_of(engine: FakeEngine) -> str:
    return engine.tokenizer.decode(engine.submitted[-1].prompt_ids, skip_special_tokens=False)


# ---- /v1/responses -----------------------------------------------------------------------------------------


async def test_calls_are_items_of_a_response() -> None:
    async with openai_client(answering(CALLS)) as client:
        answer = await client.responses.create(model="tiny", input="hi", tools=[TOOL, OTHER], parallel_tool_calls=True)
    text, rome, oslo = answer.output
    assert text.type == "message" and answer.output_text.strip() == "Let me see."
    assert rome.type == "function_call" and oslo.type == "function_call"
    assert [(call.name, json.loads(call.arguments)) for call in (rome, oslo)] == [
        ("weather", {"city": "Rome"}),
        ("time", {"city": "Oslo"}),
    ]
    assert rome.call_id != oslo.call_id and rome.status == "completed"
    assert [tool.name for tool in answer.tools if tool.type == "function"] == ["weather", "time"]


async def test_the_events_of_calls() -> None:
    async with serving(answering(CALLS)) as client:
        events = await test_responses.streamed(client, tools=[TOOL, OTHER], parallel_tool_calls=True)
    last = events[-1]["response"]
    for place in (1, 2):
        own = [event for event in events if event.get("output_index") == place]
        kinds = [event["type"].removeprefix("response.") for event in own]
        assert kinds[0] == "output_item.added" and kinds[-2:] == ["function_call_arguments.done", "output_item.done"]
        assert set(kinds[1:-2]) == {"function_call_arguments.delta"}
        assert own[0]["item"]["arguments"] == "" and own[0]["item"]["status"] == "in_progress"
        arguments = "".join(event["delta"] for event in own[1:-2])
        assert arguments == own[-2]["arguments"] == last["output"][place]["arguments"]
        assert last["output"][place] == own[-1]["item"] and own[0]["item"]["call_id"] == own[-1]["item"]["call_id"]


async def test_a_call_and_its_result_go_back_into_the_conversation() -> None:
    engine = answering(f"<tool_call>\n{ROME}\n</tool_call>")
    async with openai_client(engine) as client:
        first = await client.responses.create(model="tiny", input="hi", tools=[TOOL])
        (call,) = first.output
        assert call.type == "function_call"
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        engine.answer = "It is sunny."
        by_id = await client.responses.create(model="tiny", input=[result], tools=[TOOL], previous_response_id=first.id)
        prompt = prompt_of(engine)
        echoed: Any = [{"role": "user", "content": "hi"}, call.to_dict(), result]
        await client.responses.create(model="tiny", input=echoed, tools=[TOOL], store=False)
    assert by_id.output_text == "It is sunny."
    assert '"city": "Rome"' in prompt and "sunny" in prompt and prompt == prompt_of(engine)


async def test_what_tool_choice_asks_for() -> None:
    engine = answering(f"<tool_call>\n{ROME}\n</tool_call>")
    choices: Sequence[Any] = (
        "required",
        {"type": "function", "name": "weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
    )
    async with openai_client(engine) as client:
        for choice in choices:
            answer = await client.responses.create(model="tiny", input="hi", tools=[TOOL, OTHER], tool_choice=choice)
            assert engine.submitted[-1].sampling.grammar is not None
            told = answer.tool_choice
            assert (told if isinstance(told, str) else told.to_dict()) == choice
        await client.responses.create(model="tiny", input="hi", tools=[TOOL], tool_choice="none")
        assert engine.submitted[-1].sampling.grammar is None
        await client.responses.create(model="tiny", input="hi", tools=[], tool_choice="auto")
        assert prompt_of(engine) == "<user>hi<assistant>"


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"tools": [{**TOOL, "name": "no good"}]}, "tools[0].name"),
        ({"tools": [TOOL, {**OTHER, "parameters": {"type": 3}}]}, "tools[1].parameters"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 3}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_errors_of_tools_and_formats_name_the_field(fields: Json, param: str) -> None:
    async with serving(answering("")) as client:
        response = await client.post(test_responses.URL, json={"input": "hi", **fields})
    error = error_of(response, 400)
    assert error["param"] is not None and error["param"].startswith(param), error
    assert "function." not in error["message"] and "response_format" not in error["message"], error


class Capital(BaseModel):
    name: str
    people: int


async def test_parse_with_a_type() -> None:
    engine = answering('{"name": "Rome", "people": 3}')
    async with openai_client(engine) as client:
        answer = await client.responses.parse(model="tiny", input="hi", text_format=Capital)
        async with client.responses.stream(model="tiny", input="hi", text_format=Capital) as stream:
            final = await stream.get_final_response()
    assert answer.output_parsed == final.output_parsed == Capital(name="Rome", people=3)
    grammar = engine.submitted[0].sampling.grammar
    assert grammar is not None and grammar.kind == "json" and "people" in grammar.text
    assert answer.text is not None and answer.text.format is not None and answer.text.format.type == "json_schema"


class weather(BaseModel):
    city: str


async def test_parse_with_a_tool() -> None:
    described = pydantic_function_tool(weather)["function"]
    tool: Any = {"type": "function", **described}
    async with openai_client(answering(f"<tool_call>\n{ROME}\n</tool_call>")) as client:
        answer = await client.responses.parse(model="tiny", input="hi", tools=[tool])
    (call,) = answer.output
    assert call.type == "function_call" and call.parsed_arguments is not None
    assert json.loads(call.arguments) == {"city": "Rome"}


async def test_thoughts_are_an_item_of_a_response() -> None:
    engine = answering(THOUGHT)
    async with openai_client(engine) as client:
        answer = await client.responses.create(
            model="tiny", input="hi", reasoning={"effort": "high"}, include=["message.output_text.logprobs"]
        )
        thought, text = answer.output
        assert thought.type == "reasoning" and thought.content is not None and thought.summary == []
        assert (thought.content[0].text.strip(), answer.output_text) == ("Why not?", "Rome.")
        assert answer.usage is not None and answer.usage.output_tokens_details.reasoning_tokens > 5
        assert text.type == "message" and text.content[0].type == "output_text"
        scores = text.content[0].logprobs
        assert scores is not None and bytes(b for s in scores for b in s.bytes).decode().endswith("Rome.<eos>")
        engine.answer = "So."
        await client.responses.create(model="tiny", input="and?", previous_response_id=answer.id)
    assert prompt_of(engine).endswith("Rome.<user>and?<assistant>")


async def test_the_events_of_thoughts() -> None:
    async with serving(answering(THOUGHT)) as client:
        events = await test_responses.streamed(client)
    kinds = [event["type"].removeprefix("response.") for event in events if event.get("output_index") == 0]
    assert kinds[:2] == ["output_item.added", "content_part.added"]
    assert kinds[-3:] == ["reasoning_text.done", "content_part.done", "output_item.done"]
    assert set(kinds[2:-3]) == {"reasoning_text.delta"}
    told = "".join(event["delta"] for event in events if event["type"] == "response.reasoning_text.delta")
    assert told == events[-1]["response"]["output"][0]["content"][0]["text"]


async def test_an_answer_that_is_cut_in_its_thought() -> None:
    async with openai_client(answering(THOUGHT)) as client:
        answer = await client.responses.create(model="tiny", input="hi", max_output_tokens=4)
    (item,) = answer.output
    assert answer.status == "incomplete" and item.type == "reasoning" and item.status == "incomplete"


async def test_truncation_leaves_out_the_oldest_turns() -> None:
    engine = FakeEngine(max_model_len=300)
    turns: list[Any] = [{"role": "system", "content": "keep"}]
    for i in range(6):
        turns += [{"role": "user", "content": f"{i}" * 50}, {"role": "assistant", "content": "ok"}]
    turns.append({"role": "user", "content": "last"})
    async with serving(engine) as client:
        body: Json = {"input": turns, "truncation": "auto", "max_output_tokens": 5}
        answer = await client.post(test_responses.URL, json=body)
        assert answer.status_code == 200 and answer.json()["truncation"] == "auto", answer.text
        prompt = prompt_of(engine)
        assert prompt.startswith("<system>keep<user>" + "3" * 50) and prompt.endswith("<user>last<assistant>")
        assert len(prompt) < 300
        for refused in ({**body, "truncation": "disabled"}, {**body, "input": "x" * 400}):
            error = error_of(await client.post(test_responses.URL, json=refused), 400)
            assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


# ---- /v1/messages ------------------------------------------------------------------------------------------


async def test_calls_are_blocks_of_a_message() -> None:
    many: Any = {"type": "auto", "disable_parallel_tool_use": False}
    asked: Any = {"model": "tiny", "max_tokens": 300, "messages": HI, "tool_choice": many}
    asked["tools"] = [BLOCK_TOOL, {**BLOCK_TOOL, "name": "time"}]
    async with anthropic_client(answering(CALLS)) as client:
        answer = await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            final = await stream.get_final_message()
    both: tuple[Any, ...] = (answer, final)
    for message in both:
        text, rome, oslo = message.content
        assert text.type == "text" and text.text.strip() == "Let me see."
        assert rome.type == "tool_use" and (rome.name, rome.input) == ("weather", {"city": "Rome"})
        assert oslo.type == "tool_use" and (oslo.name, oslo.input) == ("time", {"city": "Oslo"})
        assert message.stop_reason == "tool_use" and rome.id != oslo.id


async def test_a_result_goes_back_into_the_conversation() -> None:
    engine = answering("It is sunny.")
    turns: Any = [
        *HI,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Why not?", "signature": ""},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "well?"},
            ],
        },
    ]
    async with anthropic_client(engine) as client:
        await client.messages.create(model="tiny", max_tokens=20, messages=turns, tools=[BLOCK_TOOL])
        prompt = prompt_of(engine)
        turns[-1]["content"][0] |= {"is_error": True, "content": "no such city"}
        await client.messages.create(model="tiny", max_tokens=20, messages=turns, tools=[BLOCK_TOOL])
    assert prompt.index("Let me see.") < prompt.index('"city": "Rome"', prompt.index("Let me see."))
    assert prompt.index("sunny") < prompt.index("<user>well?<assistant>")
    assert "Error: no such city" in prompt_of(engine)


@pytest.mark.parametrize("choice, held", [("any", True), ("tool", True), ("auto", False), ("none", False)])
async def test_what_the_choice_of_a_tool_asks_for(choice: str, held: bool) -> None:
    engine = answering(f"<tool_call>\n{ROME}\n</tool_call>")
    named = {"name": "weather"} if choice == "tool" else {}
    asked: Any = {"type": choice, **named} | ({} if choice == "none" else {"disable_parallel_tool_use": True})
    async with anthropic_client(engine) as client:
        answer = await client.messages.create(
            model="tiny", max_tokens=300, messages=HI, tools=[BLOCK_TOOL], tool_choice=asked
        )
    assert (engine.submitted[0].sampling.grammar is not None) is held or choice == "auto"
    assert (answer.stop_reason == "tool_use") is (choice != "none")


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"tools": [{**BLOCK_TOOL, "name": "no good"}]}, "tools[0].name"),
        ({"tools": [BLOCK_TOOL, {**BLOCK_TOOL, "name": "time", "input_schema": {"type": 3}}]}, "tools[1].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [BLOCK_TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 3}}}}, "output_config.format.schema"),
        ({"output_config": {"effort": "enormous"}}, "output_config.effort"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_errors_of_tools_name_the_field_of_a_message(fields: Json, named: str) -> None:
    async with serving(answering("")) as client:
        response = await client.post(test_messages.URL, json={**test_messages.BODY, **fields})
    error = test_messages.error_of(response, 400)
    assert named in error["message"] and "function." not in error["message"], error


async def test_thoughts_are_a_block_of_a_message() -> None:
    engine = answering(THOUGHT)
    budget: Any = {"type": "enabled", "budget_tokens": 100}
    async with anthropic_client(engine) as client:
        answer = await client.messages.create(model="tiny", max_tokens=300, messages=HI, thinking=budget)
        async with client.messages.stream(model="tiny", max_tokens=300, messages=HI, thinking=budget) as stream:
            final = await stream.get_final_message()
    both: tuple[Any, ...] = (answer, final)
    for message in both:
        thought, text = message.content
        assert thought.type == "thinking" and thought.thinking.strip() == "Why not?"
        assert text.type == "text" and text.text == "Rome."
        assert message.stop_reason == "end_turn"
    thinking = engine.submitted[0].sampling.thinking
    assert thinking is not None and thinking.tokens == 100


async def test_a_budget_is_no_error_where_the_model_does_not_think() -> None:
    async with serving() as client:
        body = {**test_messages.BODY, "max_tokens": 50, "thinking": {"type": "enabled", "budget_tokens": 20}}
        assert (await client.post(test_messages.URL, json=body)).status_code == 200
