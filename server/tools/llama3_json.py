"""Calls as Llama 3.1 and 3.2 write them: {"name": ..., "parameters": {...}}, several divided by semicolons.

They stand at the very beginning of an answer, or behind <|python_tag|>.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from server.fragments import Fragment
from server.tools.calls import CallReader, Calls, Offer
from server.tools.form import Written
from server.tools.grammar import Function, Shape, any_of, json_calls, json_rule, lark, text_without
from server.tools.json_reader import SPACE
from server.tools.prose import Prose, pieces

BEGIN = "<|python_tag|>"
_CALL = r'\{[ \t\r\n]*"(name|type|parameters|arguments)"'


class Llama3Json:
    """See `form.Form`."""

    marks = (BEGIN,)
    instructions = (
        "To call a function, write nothing but a JSON object with its name and its parameters:\n"
        '{"name": "a function", "parameters": {"a parameter": "a value"}}\n'
        "Divide several calls by semicolons."
    )

    def parser(self, offer: Offer) -> Llama3JsonParser:
        return Llama3JsonParser(offer)

    def grammar(self, shape: Shape) -> str:
        calls = "calls: " + shape.repeated(any_of(shape.functions), '"; "')
        if shape.answer:  # it is JSON as well: which of them it is shows at the first key
            rules = [f"f{i}: {json_rule(_as_schema(function))}" for i, function in enumerate(shape.functions)]
            return lark(f"start: calls | {shape.answer}", calls, *rules)
        rules = json_calls(shape.functions, "parameters")
        if shape.answer is None:
            return lark("start: calls", calls, *rules)
        behind = f" | TEXT {shape.mark(BEGIN)} calls" if BEGIN in shape.special else ""
        return lark(f"start: TEXT | calls{behind}", calls, *rules, text=text_without(_CALL))

    def written(self, calls: Sequence[Written]) -> str:
        return "; ".join(f'{{"name": {json.dumps(name)}, "parameters": {arguments}}}' for name, arguments in calls)


def _as_schema(function: Function) -> dict[str, object]:
    """Of the whole call; what references point to, and how space is treated, is said at the top of a schema."""
    shared = {name: function.schema[name] for name in ("$defs", "definitions", "x-guidance") if name in function.schema}
    own = {name: value for name, value in function.schema.items() if name not in shared}
    properties = {"name": {"const": function.name}, "parameters": own}
    fields = {"properties": properties, "required": ["name", "parameters"], "additionalProperties": False}
    return {"type": "object", **fields, **shared}


class Llama3JsonParser:
    def __init__(self, offer: Offer) -> None:
        self._prose = Prose(BEGIN)
        self._calls = Calls(offer)
        self._mark = "" if offer.special else BEGIN
        self._before: list[str] = []  # what stands in front of the call that is read, and is content if it is none
        self._reader = CallReader(self._calls)
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
        if self._state == self._call and not self._reader.begun:
            self._prose.say("".join(self._before) + self._reader.raw, found)
        elif self._state == self._between:
            self._prose.say("".join(self._before), found)
        self._prose.end(found)
        return found

    def _start(self, text: str, at: int, found: list[Fragment]) -> int:
        if text[at] in SPACE:
            self._prose.say(text[at], found)
            return at + 1
        if text[at] == "{":
            self._begin([])
        else:
            self._state = self._free
        return at

    def _begin(self, before: list[str]) -> None:
        self._before, self._reader, self._state = before, CallReader(self._calls), self._call

    def _free(self, text: str, at: int, found: list[Fragment]) -> int:
        if self._calls.full:
            self._prose.say(text[at:], found)
            return len(text)
        at, mark = self._prose.read(text, at, found)
        if mark:
            self._begin([self._mark])
        return at

    def _call(self, text: str, at: int, found: list[Fragment]) -> int:
        at = self._reader.read(text, at, found)
        if self._reader.begun:
            self._prose.called()
        if self._reader.broken:
            if not self._reader.begun:
                self._prose.say("".join(self._before) + self._reader.raw, found)
            self._state = self._free
        elif self._reader.done:
            self._before, self._state = [], self._between
        return at

    def _between(self, text: str, at: int, found: list[Fragment]) -> int:
        if text[at] in SPACE or (text[at] == ";" and not self._before):
            if text[at] == ";" or self._before:
                self._before.append(text[at])
            return at + 1
        if text[at] == "{" and not self._calls.full:
            self._begin(self._before)
        else:
            self._prose.say("".join(self._before), found)
            self._state = self._free
        return at
