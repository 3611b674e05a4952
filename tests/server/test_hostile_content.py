"""Prompts, conversations and fields that are wrong, unsupported or meant to do harm."""

from __future__ import annotations

import pytest

from tests.server.fake_engine import VOCAB, FakeEngine, make_tokenizer
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Json, error_of, serving

pytestmark = pytest.mark.asyncio

PROMPTS: list[object] = [
    "", [], [[]], [""], None, 5, True, {}, {"a": 1}, [1, "a"], ["a", 1], [[1], "a"], [[1], 2], [["a"]], [[[1]]],
    [True], [[True]], [1.5], [None], [[None]], ["a", ""], [[1], []], [-1], [VOCAB], [2**40], [[2**70]], [1, True],
    ["a"] * 1025, [[1]] * 10_000, [1] * 2_000, [1, -1],
]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: repr(prompt)[:40])
async def test_prompts_that_are_refused(prompt: object) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        error = error_of(await client.post(COMPLETION_URL, json={"prompt": prompt}), 400)
    assert error["param"] == "prompt", error
    assert engine.submitted == []


async def test_a_missing_prompt() -> None:
    async with serving() as client:
        error = error_of(await client.post(COMPLETION_URL, json={"model": "tiny"}), 400)
    assert (error["param"], error["code"]) == ("prompt", "missing_required_parameter")


def user(content: object) -> Json:
    return {"role": "user", "content": content}


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES: list[tuple[object, str]] = [
    ([], "messages"),
    (None, "messages"),
    ("hi", "messages"),
    ({}, "messages"),
    ([None], "messages[0]"),
    (["hi"], "messages[0]"),
    ([{}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([user(None)], "messages[0].content"),
    ([{"role": "assistant", "content": None}], "messages[0].content"),
    ([{"role": "assistant", "content": None, "tool_calls": []}], "messages[0].content"),
    ([{"role": "boom", "content": "x"}], "messages[0].role"),
    ([{"role": "function", "content": "x", "name": "f"}], "messages[0].role"),
    ([{"role": "USER", "content": "x"}], "messages[0].role"),
    ([{"role": ["user"], "content": "x"}], "messages[0].role"),
    ([user(5)], "messages[0].content"),
    ([user({"type": "text", "text": "x"})], "messages[0].content"),
    ([user([["x"]])], "messages[0].content"),
    ([user([[{"type": "text", "text": "x"}]])], "messages[0].content"),
    ([user([{"type": "text"}])], "messages[0].content"),
    ([user([{"type": "text", "text": ["x"]}])], "messages[0].content"),
    ([user([{"text": "x"}])], "messages[0].content"),
    ([user([{"type": {}, "text": "x"}])], "messages[0].content"),
    ([user([{"type": "video", "video": "x"}])], "messages[0].content"),
    ([user([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}])], "messages[0].content"),
    ([user("x"), {"role": "tool", "content": "x"}], "messages[1].tool_call_id"),
    ([user("x"), {"role": "tool", "content": "x", "tool_call_id": "none"}], "messages[1].tool_call_id"),
    ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
    ([{"role": "assistant", "tool_calls": [{**CALL, "type": "x"}]}], "messages[0].tool_calls[0].type"),
    (
        [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}],
        "messages[0].tool_calls[0].function.arguments",
    ),
    ([user("x")] * 5000, "messages"),
]
URLS = ("file:///etc/passwd", "http://169.254.169.254/latest", "http://localhost:1/", "data:image/png;base64,AAAA")


@pytest.mark.parametrize("messages, param", MESSAGES, ids=lambda value: repr(value)[:60])
async def test_messages_that_are_refused(messages: object, param: str) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        assert error_of(await client.post(CHAT_URL, json={"messages": messages}), 400)["param"] == param
        assert error_of(await client.post("/tokenize", json={"messages": messages}), 400)["param"] in (param, "prompt")
    assert engine.submitted == []


@pytest.mark.parametrize("url", URLS)
async def test_images_are_refused_and_never_fetched(url: str) -> None:
    async with serving() as client:
        body = {"messages": [user([{"type": "image_url", "image_url": {"url": url}}])]}
        error = error_of(await client.post(CHAT_URL, json=body), 400)
    assert error["code"] == "unsupported_parameter" and "image_url" in error["message"]
    assert url not in error["message"]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
UNSUPPORTED: Json = {
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "structural_tag": "{}",
    "response_schema": {"type": "object"},
    "guided_decoding": {"regex": "a"},
    "grammar_triggers": [],
    "best_of": 2,
    "suffix": "x",
    "logits_processors": [],
    "prompt_embeds": "AAAA",
    "chat_template": "{{ 1 }}",
    "audio": {"voice": "x"},
    "modalities": ["text", "audio"],
    "use_beam_search": True,
    "mirostat": 2,
    "web_search_options": {},
    "documents": [],
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("url, base", [(CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION)])
async def test_unsupported_fields_are_refused_by_name(url: str, base: Json, name: str) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        error = error_of(await client.post(url, json={**base, name: UNSUPPORTED[name]}), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert engine.submitted == []


@pytest.mark.parametrize("fields", [{"tools": [TOOL]}, {"tool_choice": "auto"}])
async def test_completions_have_no_tools(fields: Json) -> None:
    async with serving() as client:
        error = error_of(await client.post(COMPLETION_URL, json={**COMPLETION, **fields}), 400)
    assert error["code"] == "unsupported_parameter" and error["param"] in fields


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
        {"response_format": "text"},
        {"response_format": {}},
        {"response_format": {"type": "regex", "pattern": "(a|a)*$"}},
        {"guided_json": 3},
        {"guided_grammar": "root ::= 'a'"},
        {"grammar": "x"},
        {"modalities": []},
    ],
)
async def test_points_40_and_61_never_an_unconstrained_200(body: Json) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        error = error_of(await client.post(CHAT_URL, json={**CHAT, **body}), 400)
    assert error["param"].partition(".")[0] in body
    assert engine.submitted == []


@pytest.mark.parametrize(
    "kwargs",
    [
        {"messages": []},
        {"add_generation_prompt": False},
        {"tools": []},
        {"bos_token": "x"},
        {"raise_exception": 1},
        {"__class__": 1},
        {"chat_template": "x"},
        5,
        "x",
        [1],
    ],
)
async def test_template_arguments_that_are_refused(kwargs: object) -> None:
    async with serving() as client:
        error = error_of(await client.post(CHAT_URL, json={**CHAT, "chat_template_kwargs": kwargs}), 400)
    assert error["param"] == "chat_template_kwargs"


async def test_template_fields() -> None:
    engine = FakeEngine()
    bodies: list[tuple[Json, str]] = [
        ({}, "<user>hi<assistant>"),
        ({"chat_template_kwargs": {"extra": "on"}}, "<user>hi[on]<assistant>"),
        ({"add_generation_prompt": False}, "<user>hi"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<user>hi"),
        ({"continue_final_message": True}, "<user>hi"),
    ]
    async with serving(engine) as client:
        for body, expected in bodies:
            assert (await client.post(CHAT_URL, json={**CHAT, **body})).status_code == 200
            assert engine.tokenizer.decode(engine.submitted[-1].prompt_ids) == expected
        both = {**CHAT, "continue_final_message": True, "add_generation_prompt": True}
        assert error_of(await client.post(CHAT_URL, json=both), 400)["param"] == "continue_final_message"


@pytest.mark.parametrize("template", ["{{ raise_exception('only cats') }}", "{{ 1/0 }}", "{{ messages[9].x.y }}"])
async def test_a_template_that_refuses(template: str) -> None:
    async with serving(FakeEngine(tokenizer=make_tokenizer(template=template))) as client:
        assert error_of(await client.post(CHAT_URL, json=CHAT), 400)["param"] == "messages"


async def test_a_model_without_a_template() -> None:
    async with serving(FakeEngine(tokenizer=make_tokenizer(template=None))) as client:
        error = error_of(await client.post(CHAT_URL, json=CHAT), 400)
        assert (await client.post(COMPLETION_URL, json=COMPLETION)).status_code == 200
    assert error["param"] == "messages" and "/v1/completions" in error["message"]
