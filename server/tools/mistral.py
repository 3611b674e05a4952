"""Calls as Mistral's models write them.

Up to the tokenizers of version 7: [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]. From version 11 on
[TOOL_CALLS]name[ARGS]{...} for each call, at times with [CALL_ID] and an id in front of [ARGS], or without [ARGS].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from server.fragments import Fragment
from server.tools.calls import CallReader, Calls, Offer
from server.tools.form import Written
from server.tools.grammar import Shape, any_of, json_calls, json_rule, lark, literal
from server.tools.json_reader import SPACE, JsonReader
from server.tools.prose import Prose, pieces

BEGIN, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_MAX_HEAD = 256  # characters between the mark and the arguments


class Mistral:
    """See `form.Form`. Which of the two is written is seen by the vocabulary: the newer one has [ARGS]."""

    marks = (BEGIN, ARGUMENTS, CALL_ID)
    instructions = (
        f"To call functions, write {BEGIN} and a JSON list of objects, each with a name and arguments:\n"
        f'{BEGIN}[{{"name": "a function", "arguments": {{"a parameter": "a value"}}}}]'
    )

    def parser(self, offer: Offer) -> MistralParser:
        return MistralParser(offer)

    def grammar(self, shape: Shape) -> str:
        named = ARGUMENTS in shape.special
        if named:
            number = f"({shape.mark(CALL_ID)} /[a-zA-Z0-9]{{1,32}}/)? " if CALL_ID in shape.special else ""
            rules = [
                f"f{i}: {literal(function.name)} {number}{shape.mark(ARGUMENTS)} {json_rule(function.schema)}"
                for i, function in enumerate(shape.functions)
            ]
            calls = shape.repeated(any_of(shape.functions), shape.mark(BEGIN))
        else:
            rules = json_calls(shape.functions, "arguments")
            calls = f'" "? "[" {shape.repeated(any_of(shape.functions), "/, ?/")} "]"'
        if shape.answer == "":
            return lark("start: TEXT | head calls", shape.head(BEGIN), f"calls: {calls}", *rules)
        answer = f" | {shape.answer}" if shape.answer else ""
        return lark(f"start: {shape.mark(BEGIN)} calls{answer}", f"calls: {calls}", *rules)

    def written(self, calls: Sequence[Written]) -> str:
        listed = (f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}' for name, arguments in calls)
        return f"{BEGIN}[{', '.join(listed)}]"


class MistralParser:
    def __init__(self, offer: Offer) -> None:
        self._prose = Prose(BEGIN)
        self._calls = Calls(offer)
        self._mark = "" if offer.special else BEGIN
        self._raw = ""  # since the mark, as long as it may turn out to be no call
        self._listed = CallReader(self._calls)
        self._arguments = JsonReader()
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
        if self._state == self._in_list and not self._listed.begun:
            self._prose.say(self._raw + self._listed.raw, found)
        elif self._state in (self._open, self._head):
            self._prose.say(self._raw, found)
        self._prose.end(found)
        return found

    def _free(self, text: str, at: int, found: list[Fragment]) -> int:
        if self._calls.full:
            self._prose.say(text[at:], found)
            return len(text)
        at, mark = self._prose.read(text, at, found)
        if mark:
            self._raw, self._state = self._mark, self._open
        return at

    def _open(self, text: str, at: int, found: list[Fragment]) -> int:  # noqa: ARG002  all states are called alike
        character = text[at]
        if character not in SPACE and character != "[":
            self._state = self._head
            return at
        if len(self._raw) < _MAX_HEAD:
            self._raw += character
        if character == "[":
            self._listed, self._state = CallReader(self._calls), self._in_list
        return at + 1

    # ---- a list ----------------------------------------------------------------------------------------------

    def _in_list(self, text: str, at: int, found: list[Fragment]) -> int:
        at = self._listed.read(text, at, found)
        if self._listed.begun:
            self._prose.called()
        if self._listed.broken:
            if not self._listed.begun:
                self._prose.say(self._raw + self._listed.raw, found)
            self._state = self._free
        elif self._listed.done:
            self._state = self._between
        return at

    def _between(self, text: str, at: int, found: list[Fragment]) -> int:  # noqa: ARG002
        if text[at] == "," and not self._calls.full:
            self._raw, self._listed, self._state = ",", CallReader(self._calls), self._in_list
        elif text[at] not in SPACE:
            self._state = self._free
            return at + (text[at] == "]")
        return at + 1

    # ---- a name and arguments --------------------------------------------------------------------------------

    def _head(self, text: str, at: int, found: list[Fragment]) -> int:
        """Up to the brace that opens the arguments."""
        if text[at] != "{" and len(self._raw) < _MAX_HEAD:
            self._raw += text[at]
            return at + 1
        head = self._raw.removeprefix(self._mark).rstrip(SPACE).removesuffix(ARGUMENTS)
        name = head.partition(CALL_ID)[0].strip(SPACE)
        if text[at] == "{" and name in self._calls.offer.names:
            self._prose.called()
            found.append(self._calls.begin(name))
            self._arguments, self._state = JsonReader(), self._object
        else:
            self._prose.say(self._raw, found)
            self._state = self._free
        return at

    def _object(self, text: str, at: int, found: list[Fragment]) -> int:
        at, piece = self._arguments.read(text, at)
        if piece:
            found.append(self._calls.more(piece))
        if self._arguments.done or self._arguments.broken:
            self._state = self._free
        return at
