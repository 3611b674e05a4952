"""What models write, read as content and calls: real formats, broken ones, every way to cut a text, and garbage."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.fragments import Fragment, Parser
from server.tools.calls import Offer
from server.tools.hermes import HermesParser
from server.tools.llama3_json import Llama3JsonParser
from server.tools.mistral import MistralParser
from server.tools.pythonic import PythonicParser

PARSERS: dict[str, Callable[[Offer], Parser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
}
NAMES = frozenset(("weather", "clock", "get-data_2"))
OFFER = Offer(NAMES)
Found = tuple[str, list[tuple[str, str]]]


def read(form: str, pieces: Iterable[str], offer: Offer = OFFER) -> Found:
    """Content, and the calls with their arguments; checks what holds of all fragments."""
    parser, found = PARSERS[form](offer), list[Fragment]()
    for piece in pieces:
        found += parser.feed(piece)
    found += parser.end()
    calls: list[tuple[str, list[str]]] = []
    ids = []
    for fragment in (fragment for fragment in found if fragment.kind == "call"):
        if fragment.id:
            assert (fragment.index, fragment.text) == (len(calls), "")
            calls.append((fragment.name, []))
            ids.append(fragment.id)
        else:
            assert fragment.index == len(calls) - 1 and fragment.text and not fragment.name
            calls[-1][1].append(fragment.text)
    assert len(set(ids)) == len(ids) and all(i.startswith("call_") for i in ids)
    assert all(fragment.text for fragment in found if fragment.kind == "content")
    content = "".join(fragment.text for fragment in found if fragment.kind == "content")
    return content, [(name, "".join(parts)) for name, parts in calls]


def parsed(found: Found) -> tuple[str, list[tuple[str, object]]]:
    return found[0], [(name, json.loads(arguments)) for name, arguments in found[1]]


OSLO: tuple[str, object] = ("weather", {"city": "Oslo", "days": 2})
CLOCK: tuple[str, object] = ("clock", {})
JSON_OSLO = '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'
JSON_CLOCK = '{"name": "clock", "arguments": {}}'
HERMES = f"<tool_call>\n{JSON_OSLO}\n</tool_call>"

CASES: list[tuple[str, str, str, list[tuple[str, object]]]] = [
    ("hermes", HERMES, "", [OSLO]),
    ("hermes", f"Let me see.\n\n{HERMES}\n<tool_call>\n{JSON_CLOCK}\n</tool_call>", "Let me see.", [OSLO, CLOCK]),
    ("hermes", f"\n\n{HERMES}\nDone.  ", "Done.  ", [OSLO]),
    ("hermes", f"<tool_call>{JSON_OSLO}", "", [OSLO]),  # cut before the closing tag
    ("hermes", f"<tool_call>{JSON_OSLO}{JSON_CLOCK}</tool_call>", "", [OSLO, CLOCK]),
    ("hermes", f"<tool_call>{JSON_OSLO}\n<tool_call>{JSON_CLOCK}</tool_call>", "", [OSLO, CLOCK]),
    ("hermes", f"<tool_call>{JSON_OSLO}</tool", "", [OSLO]),
    ("hermes", f"<tool_call> <tool_call>{JSON_OSLO}</tool_call>", "<tool_call>", [OSLO]),
    ("hermes", '<tool_call>{"arguments": {"city": "Oslo", "days": 2}, "name": "weather"}</tool_call>', "", [OSLO]),
    ("hermes", '<tool_call>{"id": 7.5e1, "name": "clock", "x": [null]}</tool_call>', "", [CLOCK]),
    ("hermes", '<tool_call>{"name": "clock", "arguments": null}</tool_call>', "", [CLOCK]),
    ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\", \\"days\\": 2}"}', "", [OSLO]),
    ("hermes", '<tool_call>{"name": "clock", "arguments": {"a": "x\ny\\u00e9\\""}}', "", [("clock", {"a": 'x\nyé"'})]),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "same", []),
    ("hermes", '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>', "same", []),
    ("hermes", "<tool_call>no JSON at all</tool_call> ", "same", []),
    ("hermes", '<tool_call>{"name": "wea', "same", []),
    ("hermes", "a < b <tool_call", "same", []),
    ("hermes", "  just text \n", "same", []),
    ("llama3_json", '{"name": "weather", "parameters": {"city": "Oslo", "days": 2}}', "", [OSLO]),
    ("llama3_json", f"<|python_tag|>{JSON_OSLO}; {JSON_CLOCK}", "", [OSLO, CLOCK]),
    ("llama3_json", f"\n {JSON_OSLO};{JSON_CLOCK}\n", "", [OSLO, CLOCK]),
    ("llama3_json", f"{JSON_OSLO}; and that is it", "; and that is it", [OSLO]),
    ("llama3_json", '{"type": "function", "name": "clock", "parameters": {}}', "", [CLOCK]),
    ("llama3_json", f"I call <|python_tag|>{JSON_CLOCK}", "I call", [CLOCK]),
    ("llama3_json", f"Not at the start: {JSON_CLOCK}", "same", []),
    ("llama3_json", '{"name": "Bob", "age": 3}', "same", []),
    ("llama3_json", '<|python_tag|>brave_search.call(query="x")', "same", []),
    ("mistral", f"[TOOL_CALLS] [{JSON_OSLO}, {JSON_CLOCK}]", "", [OSLO, CLOCK]),
    ("mistral", f"[TOOL_CALLS][{JSON_OSLO}]", "", [OSLO]),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "days": 2}[TOOL_CALLS]clock[ARGS]{}', "", [OSLO, CLOCK]),
    ("mistral", 'So:[TOOL_CALLS]weather[CALL_ID]Ab3[ARGS]{"city": "Oslo", "days": 2}', "So:", [OSLO]),
    ("mistral", '[TOOL_CALLS]weather{"city": "Oslo", "days": 2}', "", [OSLO]),
    ("mistral", "[TOOL_CALLS]rm[ARGS]{}", "same", []),
    ("mistral", "[TOOL_CALLS] [1, 2]", "same", []),
    ("mistral", "[TOOL_CALLS]", "same", []),
    ("mistral", "see [TOOL_", "same", []),
    ("pythonic", "[weather(city='Oslo', days=2), clock()]", "", [OSLO, CLOCK]),
    ("pythonic", '<|python_start|>[weather(city="Oslo", days=2)]<|python_end|>', "", [OSLO]),
    ("pythonic", '[ weather ( city = "Oslo" , days = +2 , ) ]', "", [OSLO]),
    ("pythonic", "[clock(a=[1, -2.5, .5, 3., (True,)], b={'k': None, \"l\": false,}, c='')]", "",
     [("clock", {"a": [1, -2.5, 0.5, 3.0, [True]], "b": {"k": None, "l": False}, "c": ""})]),
    ("pythonic", r"""[clock(a="\x41\u00e9\101\U0001F600\n\d'", b='"\'\ud83d\ude00')]""", "",
     [("clock", {"a": "AéA😀\n\\d'", "b": "\"'😀"})]),
    ("pythonic", "[1, 2, 3]", "same", []),
    ("pythonic", "[rm(path='/')]", "same", []),
    ("pythonic", "x = [clock()]", "same", []),
    ("pythonic", "[weather", "same", []),
]  # fmt: skip


@pytest.mark.parametrize("form, text, content, calls", CASES)
def test_forms(form: str, text: str, content: str, calls: list[tuple[str, object]]) -> None:
    expected = (text if content == "same" else content, calls)
    assert parsed(read(form, [text])) == expected
    assert parsed(read(form, text)) == expected  # character by character


@pytest.mark.parametrize(
    "form, text",
    [
        ("hermes", '<tool_call>{"name": "clock", "arguments": {"a": open("x")}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "clock", "arguments": {"a": 01}}</tool_call>'),
        ("llama3_json", '{"name": "clock", "parameters": {"a": open("x")}}'),
        ("mistral", '[TOOL_CALLS]clock[ARGS]{"a": open("x")}'),
        ("pythonic", '[clock(a=open("x"))]'),
        ("pythonic", '[clock(__import__("os").system("x"))]'),
        ("pythonic", '[clock(a=1, a=open("x"))]'),
        ("pythonic", '[clock(a=1 + open("x"))]'),
        ("pythonic", '[clock(a={open("x")})]'),
        ("pythonic", '[clock(a=f"{open}")]'),
    ],
)
def test_a_call_that_breaks_off_is_no_valid_json_and_the_rest_is_content(form: str, text: str) -> None:
    content, calls = read(form, [text])
    assert [name for name, _ in calls] == ["clock"]
    with pytest.raises(json.JSONDecodeError):
        json.loads(calls[0][1])
    assert content and content in text


@pytest.mark.parametrize("form", PARSERS)
def test_no_more_calls_than_allowed(form: str) -> None:
    text = {
        "hermes": HERMES + HERMES,
        "llama3_json": f"{JSON_OSLO};{JSON_OSLO}",
        "mistral": f"[TOOL_CALLS][{JSON_OSLO}, {JSON_OSLO}]",
        "pythonic": "[weather(city='Oslo', days=2), weather(city='Oslo', days=2)]",
    }[form]
    content, calls = parsed(read(form, [text], Offer(NAMES, most=1)))
    assert calls == [OSLO]
    assert content  # what follows is told, not dropped


@pytest.mark.parametrize("form", PARSERS)
def test_marks_that_are_special_tokens_are_never_content(form: str) -> None:
    text = {"hermes": "<tool_call>x", "llama3_json": "<|python_tag|>x", "mistral": "[TOOL_CALLS]x"}
    shown = text.get(form, "<|python_start|>x")
    assert read(form, [shown]) == (shown, [])
    assert read(form, [shown], Offer(NAMES, special=True)) == ("x", [])


TOKENS = (
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_start|>"),
    *("weather", "clock", "(", ")", "[", "]", "{", "}", "city", "=", ":", ",", ";", '"', "'", "\\", "\\u12", "\n", " "),
    *("<", "1", "-2.5e3", "true", "None", "é", "\x00", "😀", '"name"', '"arguments"', '"clock"', "<tool", "x"),
    *(JSON_OSLO, JSON_CLOCK, '{"name": "clock", "arguments": {', "[clock(a="),
)
GARBAGE = st.lists(st.sampled_from(TOKENS), max_size=30).map("".join) | st.text(max_size=60)


@pytest.mark.parametrize("form", PARSERS)
@given(text=GARBAGE | st.sampled_from([case[1] for case in CASES]), cuts=st.lists(st.integers(0, 200), max_size=8))
@settings(max_examples=150, deadline=None)
def test_the_cut_of_a_text_changes_nothing(form: str, text: str, cuts: Sequence[int]) -> None:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    whole = read(form, [text])
    assert read(form, pieces) == whole == read(form, text)
    if not whole[1]:
        assert whole[0] == text  # nothing is lost where nothing was called


@pytest.mark.parametrize("form", PARSERS)
@pytest.mark.parametrize(
    "unit",
    ["<tool_call>", "[TOOL_CALLS]", "<|python_tag|>{", "[", "{", '{"name":', " ", "<", "a", '<tool_call>{"name": "a"}',
     '<tool_call>{"name": "clock", "arguments": {"a": "', "[clock(a='", "[clock(a=[", "[clock(", "1", "\\",
     "[TOOL_CALLS]clock", "[TOOL_CALLS]clock[ARGS]{}", f"{JSON_CLOCK};"],
)  # fmt: skip
def test_work_is_linear(form: str, unit: str) -> None:
    """Lines of Python that run, for texts of which one is eight times as long."""

    def lines(size: int) -> int:
        text, count = unit * (size // len(unit)), 0

        def trace(frame: FrameType, event: str, _: object) -> Any:  # as typeshed has it: itself
            nonlocal count
            count += event == "line" and "server/tools" in frame.f_code.co_filename.replace("\\", "/")
            return trace

        parser, before = PARSERS[form](OFFER), sys.gettrace()
        sys.settrace(trace)
        try:
            for i in range(0, len(text), 7):
                parser.feed(text[i : i + 7])
            parser.end()
        finally:
            sys.settrace(before)
        return count

    assert lines(3200) < 10 * lines(400) + 200
