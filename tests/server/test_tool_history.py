"""What a model is told of tools, calls and results: by its own template, or in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.tokenizer.chat_template import ChatTemplate
from engine.types import ModelInfo
from server.schemas_tools import Tool
from server.tools.history import conversation
from tests.server.fake_engine import FakeEngine, make_tokenizer
from tests.server.harness import CHAT_URL, Json, error_of, serving

INFO = ModelInfo("m", "m", 512, 260, (257,), 16, 100, 0, "fp16", "ar", tool_parser="hermes")
TOOL = Tool.model_validate(
    {"type": "function", "function": {"name": "f", "description": "Does f.", "strict": True, "parameters": None}}
)


def call(name: str, call_id: str, arguments: object) -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


HISTORY: list[dict[str, object]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Go."},
    {"role": "assistant", "content": "", "tool_calls": [call("f", "call_1", {"a": "é"}), call("g", "call_2", {})]},
    {"role": "tool", "content": "one", "tool_call_id": "call_1"},
    {"role": "tool", "content": "two", "tool_call_id": "call_2"},
    {"role": "assistant", "content": "Done."},
]


def test_in_words() -> None:
    messages, tools = conversation(HISTORY, [TOOL], INFO)
    assert tools is None
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    system = str(messages[0]["content"])
    assert system.startswith("Be kind.\n\nYou can call functions")
    assert '{"name": "f", "description": "Does f.", "parameters": {"type": "object", "properties": {}}}' in system
    assert messages[2]["content"] == (
        '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    )
    assert messages[3]["content"] == "The function f returned:\none\n\nThe function g returned:\ntwo"
    assert all(set(message) == {"role", "content"} for message in messages)


def test_in_words_without_a_system_message() -> None:
    messages, _ = conversation(HISTORY[1:], [TOOL], INFO)
    assert [message["role"] for message in messages[:2]] == ["system", "user"]
    untold, _ = conversation(HISTORY[1:2], [], INFO)
    assert untold == HISTORY[1:2]


@pytest.mark.parametrize(
    "form, expected",
    [
        ("llama3_json", '{"name": "f", "parameters": {"a": "é"}}; {"name": "g", "parameters": {}}'),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": "é"}}, {"name": "g", "arguments": {}}]'),
        ("pythonic", "[f(a='é'), g()]"),
    ],
)
def test_in_words_of_other_forms(form: str, expected: str) -> None:
    messages, _ = conversation(HISTORY, [TOOL], replace(INFO, tool_parser=form))
    assert messages[2]["content"] == expected


def test_by_the_template() -> None:
    messages, tools = conversation(HISTORY, [TOOL], replace(INFO, tool_template=True))
    assert messages == HISTORY
    described = {"name": "f", "description": "Does f.", "parameters": {"type": "object", "properties": {}}}
    assert tools == [{"type": "function", "function": described}]


def test_llama_gets_one_call_at_a_time() -> None:
    messages, _ = conversation(HISTORY, [TOOL], replace(INFO, tool_parser="llama3_json", tool_template=True))
    assert [message["role"] for message in messages] == ["system", "user", *["assistant", "tool"] * 2, "assistant"]
    assert [len(calls) for message in messages if isinstance(calls := message.get("tool_calls"), list)] == [1, 1]
    assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == ["call_1", "call_2"]


def test_mistral_gets_short_ids() -> None:
    messages, _ = conversation(HISTORY, [TOOL], replace(INFO, tool_parser="mistral", tool_template=True))
    calls: Any = messages[2]["tool_calls"]
    ids = [one["id"] for one in calls]
    assert ids == [messages[3]["tool_call_id"], messages[4]["tool_call_id"]]
    assert all(len(one) == 9 and one.isalnum() for one in ids) and len(set(ids)) == 2


TEMPLATES = {  # the ways in which published templates look for tools, and speak of calls
    "{{ messages }}": ("hermes", False),
    "{% if tools %}<tool_call>{% endif %}": ("hermes", True),
    "{% if tools %}<tool_call>\n<function=x>{% endif %}": ("hermes", False),
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{% if tools is not none %}{{ '\"parameters\": ' }}"
    "<|start_header_id|>ipython{% endif %}": ("llama3_json", True),
    "{% if tools is not none %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]": ("mistral", True),
    "{% for t in tools %}[func_name1(params_name1=value)]{% endfor %}": ("pythonic", True),
    "{% if tools %}<|tool_call|>{% endif %}": ("hermes", False),
    "{% set tools = [] %}{% for t in tools %}<tool_call>{% endfor %}": ("hermes", False),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_form_that_a_template_speaks_of(template: str) -> None:
    tokenizer = make_tokenizer(template=template)
    assert tokenizer.tool_form("auto") == TEMPLATES[template]
    assert tokenizer.tool_form("none") == ("", False)
    assert tokenizer.tool_form("pythonic") == ("pythonic", ChatTemplate({"default": template}, {}).reads("tools"))
    assert make_tokenizer(template=None).tool_form("auto") == ("", False)


@pytest.mark.asyncio
async def test_point_39_history_over_http() -> None:
    """null contents beside calls, results in parts, and what is wrong with a history by name."""
    engine = FakeEngine(max_model_len=2048)
    calls = [call("f", "call_1", '{"a": 1}')]
    asked: list[Json] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": None, "tool_calls": calls},
    ]
    result: Json = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "one"}]}
    async with serving(engine) as client:
        good = await client.post(CHAT_URL, json={"messages": [*asked, result]})
        assert good.status_code == 200, good.text
        for messages, param in (
            ([*asked, {**result, "tool_call_id": "call_2"}], "messages[3].tool_call_id"),
            ([*asked, {"role": "tool", "content": "one"}], "messages[3].tool_call_id"),
            ([*asked, {**result, "content": None}], "messages[3].content"),
            ([*asked[:2], {"role": "assistant", "content": None}], "messages[2].content"),
            ([*asked[:2], {**asked[2], "tool_calls": [{"id": "x"}]}], "messages[2].tool_calls[0].function"),
            ([*asked[:2], {**asked[2], "tool_calls": [call("f", "c", {"a": 1})]}],
             "messages[2].tool_calls[0].function.arguments"),
        ):  # fmt: skip
            assert error_of(await client.post(CHAT_URL, json={"messages": messages}), 400)["param"] == param
    prompt = engine.tokenizer.decode(engine.submitted[0].prompt_ids, False)
    assert '<system>Be kind.<user>Go.<assistant><tool_call>\n{"name": "f", "arguments": {"a": 1}}' in prompt
    assert "<user>The function f returned:\none<assistant>" in prompt


@pytest.mark.asyncio
async def test_a_template_that_refuses_system_messages() -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    engine = FakeEngine(max_model_len=2048, tokenizer=make_tokenizer(template=template))
    tool = {"type": "function", "function": {"name": "f"}}
    asked = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Go."}]
    async with serving(engine) as client:
        good = await client.post(CHAT_URL, json={"messages": asked, "tools": [tool]})
        assert good.status_code == 200, good.text
        own = [{"role": "system", "content": "Be kind."}, *asked]
        error = error_of(await client.post(CHAT_URL, json={"messages": own, "tools": [tool]}), 400)
    assert error["param"] == "messages" and "no system" in error["message"]
    prompt = engine.tokenizer.decode(engine.submitted[0].prompt_ids, False)
    assert prompt.startswith("<assistant>Hi.<user>You can call functions") and prompt.endswith("\n\nGo.")
