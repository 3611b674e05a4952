"""Calls as Hermes and Qwen models write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from server.fragments import Fragment
from server.tools.calls import CallReader, Calls, Offer
from server.tools.form import Written
from server.tools.grammar import Shape, any_of, json_calls, lark
from server.tools.json_reader import SPACE
from server.tools.prose import Prose, pieces

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes:
    """See `form.Form`."""

    marks = (BEGIN, END)
    instructions = (
        f"To call a function, write a JSON object with its name and its arguments between {BEGIN} and {END}:\n"
        f'{BEGIN}\n{{"name": "a function", "arguments": {{"a parameter": "a value"}}}}\n{END}'
    )

    def parser(self, offer: Offer) -> HermesParser:
        return HermesParser(offer)

    def grammar(self, shape: Shape) -> str:
        inside = f'"\\n" {any_of(shape.functions)} "\\n" {shape.mark(END)}'
        rules = json_calls(shape.functions, "arguments")
        if shape.answer == "":
            start = f"(head {inside})* TEXT" if shape.many else f"head {inside} | TEXT"
            return lark(f"start: {start}", shape.head(BEGIN), *rules)
        calls = shape.repeated(f"{shape.mark(BEGIN)} {inside}", '"\\n"')
        return lark(f"start: {calls}{f' | {shape.answer}' if shape.answer else ''}", *rules)

    def written(self, calls: Sequence[Written]) -> str:
        return "\n".join(
            f'{BEGIN}\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n{END}' for name, arguments in calls
        )


class HermesParser:
    """The closing tag may be missing, and one pair of tags may hold several calls."""

    def __init__(self, offer: Offer) -> None:
        self._prose = Prose(BEGIN)
        self._calls = Calls(offer)
        self._mark = "" if offer.special else BEGIN
        self._reader = CallReader(self._calls)
        self._closing = ""  # of the closing tag, so far
        self._state: Callable[[str, int, list[Fragment]], int] = self._free

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
            self._prose.say(self._mark + self._reader.raw, found)
        self._prose.end(found)
        return found

    def _free(self, text: str, at: int, found: list[Fragment]) -> int:
        if self._calls.full:
            self._prose.say(text[at:], found)
            return len(text)
        at, mark = self._prose.read(text, at, found)
        if mark:
            self._begin()
        return at

    def _begin(self) -> None:
        self._reader, self._state = CallReader(self._calls), self._call

    def _call(self, text: str, at: int, found: list[Fragment]) -> int:
        at = self._reader.read(text, at, found)
        if self._reader.begun:
            self._prose.called()
        if self._reader.broken:
            if not self._reader.begun:
                self._prose.say(self._mark + self._reader.raw, found)
            self._state = self._free
        elif self._reader.done:
            self._closing, self._state = "", self._close
        return at

    def _close(self, text: str, at: int, found: list[Fragment]) -> int:
        character = text[at]
        if not self._closing and character in SPACE:
            return at + 1
        if not self._closing and character == "{" and not self._calls.full:
            self._begin()
            return at
        if not END.startswith(self._closing + character):
            self._state = self._free
            self._prose.read(self._closing, 0, found)  # shorter than any mark
            return at
        self._closing += character
        if self._closing == END:
            self._state = self._free
        return at + 1
