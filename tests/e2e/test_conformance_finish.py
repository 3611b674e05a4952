"""Points 17 to 21 of the wire's conformance list, how answers end; and 70, the names of thoughts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.e2e.process import ServerProcess
from tests.e2e.scripted import ScriptedServer
from tests.e2e.streams import CHAT, COMPLETIONS, MESSAGES, chunks, client_of, of_choice, whole
from tests.e2e.wire import Json
from tests.server.fake_engine import EOS, FakeEngine, make_tokenizer

PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
WORDS = {"stop", "length", "tool_calls", "content_filter", "function_call"}


@PATHS
def test_point_17_the_words_are_openais(scripted: ScriptedServer, tiny: ServerProcess, path: str) -> None:
    for server, fields in (
        (scripted, {}),
        (scripted, {"max_tokens": 2}),
        (scripted, {"stop": "w"}),
        (scripted, {"stop_token_ids": [EOS]}),
        (scripted, {"repetition_detection": {"max_pattern_size": 1, "min_count": 2}}),
        (tiny, {"max_tokens": 3, "ignore_eos": True}),
    ):
        assert whole(server, path, **fields)["choices"][0]["finish_reason"] in WORDS
        assert of_choice(chunks(server, path, **fields))[-1]["finish_reason"] in WORDS


@PATHS
def test_point_18_stop_and_length(scripted: ScriptedServer, path: str) -> None:
    for fields, reason in (
        ({}, "stop"),  # the model's own end
        ({"stop": "wö"}, "stop"),
        ({"stop_token_ids": [EOS]}, "stop"),
        ({"max_tokens": 2}, "length"),
    ):
        assert whole(scripted, path, **fields)["choices"][0]["finish_reason"] == reason
        assert of_choice(chunks(scripted, path, **fields))[-1]["finish_reason"] == reason


@PATHS
def test_point_18_the_end_of_the_context_is_length(tiny: ServerProcess, path: str) -> None:
    prompt = "x" * 500
    body = {"messages": [{"role": "user", "content": prompt[:480]}]} if path == CHAT else {"prompt": prompt}
    answer = whole(tiny, path, **body, ignore_eos=True, max_tokens=400)
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == 512


def test_point_19_calls_of_tools_end_an_answer_in_their_own_way() -> None:
    """`auto` and `required` say tool_calls, a named function says stop; streams agree."""
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    named = {"type": "function", "function": {"name": "f"}}
    with ScriptedServer(FakeEngine(answer=call, max_model_len=4096)) as server:
        asked: Json = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}
        for choice, word in (("auto", "tool_calls"), ("required", "tool_calls"), (named, "stop"), (None, "tool_calls")):
            answer = whole(server, CHAT, **asked, tool_choice=choice)["choices"][0]
            assert answer["finish_reason"] == word and answer["message"]["tool_calls"][0]["function"]["name"] == "f"
            assert of_choice(chunks(server, CHAT, **asked, tool_choice=choice))[-1]["finish_reason"] == word
        assert whole(server, CHAT, **asked, max_tokens=9)["choices"][0]["finish_reason"] == "length"
        server.engine.answer = "No call."
        assert whole(server, CHAT, **asked)["choices"][0]["finish_reason"] == "stop"


@PATHS
def test_point_20_what_stopped_it_is_told(scripted: ScriptedServer, path: str) -> None:
    for fields, reason in (
        ({}, None),
        ({"stop": ["zz", "wör"]}, "wör"),
        ({"stop_regex": "w.r"}, "w.r"),
        ({"max_tokens": 1}, None),
    ):
        choice = whole(scripted, path, **fields)["choices"][0]
        assert choice["stop_reason"] == reason
        assert of_choice(chunks(scripted, path, **fields))[-1]["stop_reason"] == reason
    scripted.engine.answer = [7, 5, 6, EOS]
    assert whole(scripted, path, stop_token_ids=[5])["choices"][0]["stop_reason"] == 5


def test_point_21_the_last_chunk_of_a_completion_has_the_end(scripted: ScriptedServer) -> None:
    events = chunks(scripted, COMPLETIONS)
    assert {event["object"] for event in events} == {whole(scripted, COMPLETIONS)["object"]} == {"text_completion"}
    assert [choice["finish_reason"] for choice in of_choice(events)][-1] == "stop"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_point_70_thoughts_stand_under_both_names() -> None:
    """For clients of either kind; the SDK keeps what it has no type for."""
    tokenizer = make_tokenizer(marks=("<think>", "</think>"))
    engine = FakeEngine(answer="<think>\nWhy?\n</think>\n\nSo.", tokenizer=tokenizer)
    name, marks = tokenizer.thinking_form("think")
    engine.info = replace(engine.info, reasoning_parser=name, thinking=marks, vocab_size=tokenizer.vocab_size)
    with ScriptedServer(engine) as server, client_of(server) as client:
        asked: Any = {"model": "tiny", "messages": MESSAGES}
        message: Any = client.chat.completions.create(**asked).choices[0].message
        assert (message.content, message.reasoning, message.reasoning_content) == ("So.", "Why?", "Why?")
        told = {"content": "", "reasoning": "", "reasoning_content": ""}
        for chunk in client.chat.completions.create(**asked, stream=True):
            for field in told:
                told[field] += getattr(chunk.choices[0].delta, field, None) or ""
        assert told == {"content": "So.", "reasoning": "Why?", "reasoning_content": "Why?"}
