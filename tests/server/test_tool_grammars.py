"""Answers drawn at random under each form's grammar: what comes is read as calls that fit, whatever was drawn."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine.grammar import Grammar
from engine.structured.matcher import Matcher
from engine.structured.vocabulary import Vocabulary
from engine.tokenizer.tokenizer import Tokenizer
from server.fragments import Fragment
from server.parts import message
from server.tools.calls import Offer
from server.tools.forms import FORMS
from server.tools.grammar import Function, Shape
from tests.server.fake_engine import make_tokenizer

SPACING = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}}
WORD = {"type": "string", "maxLength": 3}
SCHEMAS: dict[str, dict[str, Any]] = {
    "get": {
        "type": "object",
        "properties": {
            "city": WORD,
            "days": {"type": "integer", "minimum": 0, "maximum": 20},
            "now": {"type": "boolean"},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
    "get_x": {
        "type": "object",
        "properties": {"a": {"enum": [1, "two", None]}, "b": {"type": "array", "items": WORD, "maxItems": 2}},
        "additionalProperties": False,
    },
    "clock": {"type": "object", "properties": {}, "additionalProperties": False},
    "tree": {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}},
        "required": ["root"],
        "additionalProperties": False,
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"is": WORD, "next": {"$ref": "#/$defs/node"}},
                "required": ["is"],
                "additionalProperties": False,
            }
        },
    },
}
FUNCTIONS = tuple(Function(name, {**schema, **SPACING}) for name, schema in SCHEMAS.items())
ANSWER = {**SPACING, "type": "object", "properties": {"q": {"type": "boolean"}}, "required": ["q"],
          "additionalProperties": False}  # fmt: skip
MARKS = tuple(mark for form in FORMS.values() for mark in form.marks)


@cache
def tokens() -> tuple[Tokenizer, Vocabulary]:
    tokenizer = make_tokenizer(marks=MARKS)
    return tokenizer, Vocabulary.of(tokenizer, tokenizer.vocab_size)


def draw(form: str, shape: Shape, seed: int, begin: str = "") -> str:
    """A random answer that goes on from `begin`; ends are taken one time in two, and most characters are JSON's."""
    tokenizer, vocabulary = tokens()
    matcher = Matcher.compile(Grammar("lark", FORMS[form].grammar(shape)), vocabulary)
    generator, row = random.Random(seed), np.zeros(vocabulary.words, dtype=np.uint32)
    ids = tokenizer.encode(begin, add_special_tokens=False) if begin else []
    assert all(matcher.consume(token) for token in ids), begin
    plain = {token for token in range(256) if tokenizer.token_text(token) in "aZ\"\\{}[]():=,;.' 10\n"}
    for _ in range(2000):
        assert matcher.fill(row), matcher.error
        allowed = set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())
        ends = allowed & set(vocabulary.eos_ids)
        if ends and (allowed == ends or generator.random() < 0.5):
            return tokenizer.decode(ids, skip_special_tokens=False)
        common = (allowed & plain) if generator.random() < 0.9 else set()
        ids.append(generator.choice(sorted(common or allowed - ends)))
        assert matcher.consume(ids[-1])
    raise AssertionError("no end: " + tokenizer.decode(ids, skip_special_tokens=False)[-200:])


def read(form: str, text: str, special: bool) -> tuple[str | None, list[tuple[str, object]]]:
    parser = FORMS[form].parser(Offer(frozenset(SCHEMAS), special=special))
    found: list[Fragment] = []
    for character in text:
        found += parser.feed(character)
    fields: Any = message([*found, *parser.end()])
    calls = [call["function"] for call in fields.get("tool_calls", [])]
    return fields["content"], [(call["name"], json.loads(call["arguments"])) for call in calls]


@pytest.mark.parametrize("special", [True, False], ids=["special", "text"])
@pytest.mark.parametrize("form", FORMS)
def test_calls_that_must_come(form: str, special: bool) -> None:
    ids = {mark: tokens()[0].added_id(mark) for mark in FORMS[form].marks} if special else {}
    seen: set[str] = set()
    for seed in range(24):
        shape = Shape(FUNCTIONS, seed % 2 == 0, None, {mark: token for mark, token in ids.items() if token is not None})
        text = draw(form, shape, seed)
        content, calls = read(form, text, special)
        assert content is None, text
        assert calls and (len(calls) == 1 or shape.many)
        for name, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[name])
            seen.add(name)
    assert len(seen) >= 3


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_is_begun_in_free_text_fits(form: str) -> None:
    ids = {mark: tokens()[0].added_id(mark) for mark in FORMS[form].marks}
    shape = Shape(FUNCTIONS, False, "", {mark: token for mark, token in ids.items() if token is not None})
    begins = {"llama3_json": ['{"name":', "Well <|python_tag|>"], "pythonic": ["[get(", "Well <|python_start|>["]}
    for begin in begins.get(form, ["Well " + FORMS[form].marks[0]]):
        for seed in range(6):
            content, calls = read(form, draw(form, shape, seed, begin), special=True)
            assert len(calls) == 1 and content in (None, "Well")
            jsonschema.validate(calls[0][1], SCHEMAS[calls[0][0]])


@pytest.mark.parametrize("form", FORMS)
def test_free_text_is_free(form: str) -> None:
    tokenizer, vocabulary = tokens()
    shape = Shape(FUNCTIONS, True, "", {})
    for text in ("Hello!", "", '{"key": [1, 2]}', "[1, 2] and {3}", "a < b <tool", "[get it?]", "\n\n{", "'\"\\ é 😀"):
        matcher = Matcher.compile(Grammar("lark", FORMS[form].grammar(shape)), vocabulary)
        assert all(matcher.consume(token) for token in tokenizer.encode(text, add_special_tokens=False)), text
        assert matcher.accepting, text


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_in_json_or_calls(form: str) -> None:
    shape = Shape(FUNCTIONS, False, f"%json {json.dumps(ANSWER)}", {})
    seen = set()
    for seed in range(20):
        content, calls = read(form, draw(form, shape, seed), special=False)
        seen.add(bool(calls))
        if calls:
            jsonschema.validate(calls[0][1], SCHEMAS[calls[0][0]])
        else:
            jsonschema.validate(json.loads(content or ""), ANSWER)
    assert seen == {True, False}


@pytest.mark.parametrize("form", FORMS)
def test_written_history_is_read_back(form: str) -> None:
    arguments = {"city": 'O\'s "lo"\n', "days": 2, "now": True, "more": [None, 1.5, {"k": False}]}
    text = FORMS[form].written([("get", json.dumps(arguments)), ("clock", "{}")])
    assert read(form, text, special=False) == (None, [("get", arguments), ("clock", {})])
