"""The readers of values against Python's own: json and ast."""

from __future__ import annotations

import ast
import json
import warnings

from hypothesis import given, settings
from hypothesis import strategies as st

from server.tools.json_reader import JsonReader
from server.tools.python_reader import PythonReader

TEXTS = st.text(st.sampled_from("aé😀\\\"'/\n\t\x00\x7fuxN0{}[],: "), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
CONTAINERS = st.lists(VALUES, max_size=4) | st.dictionaries(TEXTS, VALUES, max_size=4)
CHARACTERS = "aué\\\"'{}[](),:=0123.eE+-_ tTfnN\nx"


@st.composite
def spoiled(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> str:
    """A text with some characters gone, doubled or replaced."""
    text = draw(texts)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["", *CHARACTERS, "\\u12", "1.", "0x"])) + text[at + 1 :]
    return text


def read(reader: JsonReader | PythonReader, text: str) -> tuple[str, bool]:
    """All in single characters; what it told, and whether it took all of the text for one value."""
    found, at = [], 0
    for place in range(len(text)):
        end, piece = reader.read(text[: place + 1], at)
        found.append(piece)
        at = end
        if at <= place:
            break
    return "".join(found), reader.done and at == len(text)


@given(CONTAINERS, st.sampled_from([None, 1, 4]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_json_is_taken_as_it_is(value: object, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert read(JsonReader(), text) == (text, True)


@given(spoiled(CONTAINERS.map(json.dumps)))
@settings(max_examples=250, deadline=None)
def test_what_is_taken_is_json_and_all_json_is_taken(text: str) -> None:
    told, taken = read(JsonReader(), text)
    if taken:
        json.loads(told)
        return
    try:
        value = json.loads(text)
    except ValueError:
        return
    # json itself takes more than JSON has.
    assert not isinstance(value, dict | list) or any(word in text for word in ("NaN", "Infinity")) or text[-1] in " \n"


def plain(value: object) -> bool:
    """Is it something that JSON has, in the way this reader takes it?"""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def listed(value: object) -> object:
    if isinstance(value, list | tuple):
        return [listed(item) for item in value]
    return {key: listed(item) for key, item in value.items()} if isinstance(value, dict) else value


@given(CONTAINERS)
@settings(max_examples=80, deadline=None)
def test_python_literals_become_json(value: object) -> None:
    told, taken = read(PythonReader(), repr(value))
    assert taken and json.loads(told) == value


@given(spoiled(CONTAINERS.map(repr) | TEXTS.map(repr)))
@settings(max_examples=250, deadline=None)
def test_what_is_taken_means_what_python_means(text: str) -> None:
    told, taken = read(PythonReader(), text)
    if not taken:
        return
    value = json.loads(told)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            meant = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return  # it takes true, false, null, and line breaks in strings as well
    if plain(meant) and "\\/" not in text and "(" not in text:
        assert listed(meant) == value
