"""Calls as a Python list: [weather(city="Oslo", days=2), clock()]. Llama 4 and small Llama 3.2 models write so.

They stand at the very beginning of an answer, or behind <|python_start|>.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from server.fragments import Fragment
from server.tools.calls import Calls, Offer
from server.tools.form import Written
from server.tools.grammar import Function, Shape, any_of, json_rule, lark, literal, names_regex, text_without
from server.tools.json_reader import SPACE
from server.tools.prose import Prose, pieces
from server.tools.python_reader import PythonReader

BEGIN, END = "<|python_start|>", "<|python_end|>"
_MAX_NAME = 64
_COMPOSED = ("anyOf", "oneOf", "allOf", "$ref", "patternProperties", "additionalProperties")


class Pythonic:
    """See `form.Form`."""

    marks = (BEGIN, END)
    instructions = (
        "To call functions, write nothing but a Python list of calls with keyword arguments:\n"
        '[a_function(a_parameter="a value"), another_function()]'
    )

    def parser(self, offer: Offer) -> PythonicParser:
        return PythonicParser(offer)

    def grammar(self, shape: Shape) -> str:
        """The bracket and the first name are one lexeme: else they would go on as text."""
        functions = shape.functions
        rules = [rule for i, function in enumerate(functions) for rule in _function_rules(i, function)]
        rest = f' (", " {any_of(functions)})*' if shape.many else ""
        first = " | ".join(f"{literal(f'[{function.name}(')} a{i}" for i, function in enumerate(functions))
        rules.append(f'calls: ({first}){rest} "]"')
        if shape.answer != "":
            return lark(f"start: calls{f' | {shape.answer}' if shape.answer else ''}", *rules)
        end = f" {shape.mark(END)}" if END in shape.special else ""
        behind = f" | TEXT {shape.mark(BEGIN)} calls{end}" if BEGIN in shape.special else ""
        begins = rf"\[[ \t\r\n]*({names_regex(functions)})[ \t\r\n]*\("
        return lark(f"start: TEXT | calls{behind}", *rules, text=text_without(begins))

    def written(self, calls: Sequence[Written]) -> str:
        return f"[{', '.join(f'{name}({_keywords(arguments)})' for name, arguments in calls)}]"


def _keywords(arguments: str) -> str:
    try:
        values = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        values = None
    return ", ".join(f"{key}={value!r}" for key, value in values.items()) if isinstance(values, dict) else arguments


def _function_rules(number: int, function: Function) -> Iterator[str]:
    """Of one function: its call, its arguments in order, and each argument. Those that are required come first."""
    schema, own = function.schema, f"a{number}"
    properties, required = schema.get("properties"), schema.get("required")
    known = properties if isinstance(properties, Mapping) else {}
    must = [name for name in (required if isinstance(required, list) else []) if name in known and name.isidentifier()]
    may = [name for name in known if name not in must and name.isidentifier()]
    shared = {name: schema[name] for name in ("$defs", "definitions", "x-guidance") if name in schema}
    yield f"f{number}: {literal(function.name + '(')} {own}"
    for i, name in enumerate((*must, *may)):
        yield f"{own}_{i}: {literal(name + '=')} {_value_rule(known[name], shared)}"
    if not (must or may):
        free = any(schema.get(name) for name in _COMPOSED)
        yield f'{own}: ({own}_k (", " {own}_k)*)? ")"' if free else f'{own}: ")"'
        if free:
            yield f"{own}_k: /[a-zA-Z_][a-zA-Z0-9_]*=/ {json_rule(shared)}"
        return
    # Each optional one may be left out; the first of all that are there has no comma in front.
    count = len(must) + len(may)
    for i in range(len(must), count):
        yield f'{own}_from{i}: (", " {own}_{i})? {own}_from{i + 1}'
    yield f'{own}_from{count}: ")"'
    if must:
        ordered = ' ", " '.join(f"{own}_{i}" for i in range(len(must)))
        yield f"{own}: {ordered} {own}_from{len(must)}"
    else:
        yield f"{own}: {' | '.join([f'{own}_{i} {own}_from{i + 1}' for i in range(count)])} | {own}_from{count}"


def _value_rule(schema: object, shared: Mapping[str, object]) -> str:
    fields = schema if isinstance(schema, Mapping) else {}
    if fields.get("type") == "boolean" and "const" not in fields and "enum" not in fields:
        return '("True" | "False")'
    return json_rule({**shared, **fields})


class PythonicParser:
    def __init__(self, offer: Offer) -> None:
        self._prose = Prose(BEGIN, END)
        self._calls = Calls(offer)
        self._mark = "" if offer.special else BEGIN
        self._raw: list[str] = []  # since the last call, as long as what is read may turn out to be none
        self._name = ""
        self._keys: set[str] = set()  # of the call that is read
        self._value = PythonReader()
        self._state: Callable[[str, int, list[Fragment]], int] = self._start

    def feed(self, text: str) -> list[Fragment]:
        found: list[Fragment] = []
        for piece in pieces(text):
            at = 0
            while at < len(piece):
                at = self._state(piece, at, found)
        return found

    def end(self) -> list[Fragment]:
        found: list[Fragment] = []
        self._give_up(found)
        self._prose.end(found)
        return found

    def _give_up(self, found: list[Fragment]) -> None:
        """What was read is no call, or goes on as none."""
        self._prose.say("".join(self._raw), found)
        self._raw, self._state = [], self._free

    def _start(self, text: str, at: int, found: list[Fragment]) -> int:
        if text[at] in SPACE:
            self._prose.say(text[at], found)
            return at + 1
        if text[at] == "[":
            self._state = self._open
        else:
            self._state = self._free
        return at

    def _free(self, text: str, at: int, found: list[Fragment]) -> int:
        if self._calls.full:
            self._prose.say(text[at:], found)
            return len(text)
        at, mark = self._prose.read(text, at, found)
        if mark == BEGIN:
            self._raw, self._state = [self._mark], self._open
        return at

    def _open(self, text: str, at: int, found: list[Fragment]) -> int:
        if text[at] == "[":
            self._name, self._state = "", self._begin
        elif text[at] not in SPACE:
            self._give_up(found)
            return at
        self._raw.append(text[at])
        return at + 1

    def _begin(self, text: str, at: int, found: list[Fragment]) -> int:
        """The name of a function and its parenthesis."""
        character = text[at]
        name = self._name.rstrip(SPACE)
        if character == "(" and name in self._calls.offer.names:
            self._raw, self._keys = [], set()
            self._prose.called()
            found.append(self._calls.begin(name))
            self._name, self._state = "", self._key
            return at + 1
        if not self._named(character):
            self._give_up(found)
            return at
        self._raw.append(character)
        return at + 1

    def _named(self, character: str) -> bool:
        """Takes a character of a name, or space around it."""
        if character in SPACE and not self._name:
            return True
        good = character in SPACE or ((character.isalnum() or character in "_-") and self._name[-1:] not in (*SPACE,))
        if not good or len(self._name) == _MAX_NAME:
            return False
        self._name += character
        return True

    def _key(self, text: str, at: int, found: list[Fragment]) -> int:
        """The name of an argument and its equals sign, or the end of the call."""
        character, name = text[at], self._name.rstrip(SPACE)
        if character == ")" and not name:
            found.append(self._calls.more("}" if self._keys else "{}"))
            self._state = self._between
        elif character == "=" and name and name not in self._keys:
            found.append(self._calls.more(f"{', ' if self._keys else '{'}{json.dumps(name)}: "))
            self._keys.add(name)
            self._value, self._state = PythonReader(), self._argument
        elif not self._named(character):
            self._raw = [self._name]
            self._give_up(found)
            return at
        return at + 1

    def _argument(self, text: str, at: int, found: list[Fragment]) -> int:
        at, piece = self._value.read(text, at)
        if piece:
            found.append(self._calls.more(piece))
        if self._value.broken:
            self._give_up(found)
        elif self._value.done:
            self._name, self._state = "", self._behind
        return at

    def _behind(self, text: str, at: int, found: list[Fragment]) -> int:
        if text[at] in ",)":
            self._state = self._key
            return at + (text[at] == ",")
        if text[at] not in SPACE:
            self._give_up(found)
            return at
        return at + 1

    def _between(self, text: str, at: int, found: list[Fragment]) -> int:  # noqa: ARG002  all states are called alike
        """Behind a call."""
        if text[at] == "," and not self._calls.full:
            self._raw, self._name, self._state = [","], "", self._begin
        elif text[at] not in SPACE:
            self._state = self._free
            return at + (text[at] == "]")
        return at + 1
