"""Calls of the tools that were offered, as fragments."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass

from server.fragments import Fragment
from server.tools.json_reader import SPACE, JsonReader

_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Offer:
    """What may be called. `special`: the form's marks are special tokens, which are never content."""

    names: frozenset[str]
    most: int | None = None  # calls of one answer
    special: bool = False


class Calls:
    """Counts the calls of one answer."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self._count = 0

    @property
    def full(self) -> bool:
        return self.offer.most is not None and self._count >= self.offer.most

    def begin(self, name: str) -> Fragment:
        """The first fragment of a new call. All others get the index of the latest one."""
        self._count += 1
        return Fragment("call", "", self._count - 1, f"call_{secrets.token_hex(12)}", name)

    def more(self, text: str) -> Fragment:
        return Fragment("call", text, self._count - 1)


class CallReader:
    """Reads one call that is a JSON object with a name and arguments, in any order, other keys aside.

    It has `begun` once the name of an offered tool and the beginning of its arguments were read; then its arguments
    are told as they come. Until then `raw` has all that was read. `broken`: it is no call, or goes on as none.
    """

    def __init__(self, calls: Calls) -> None:
        self.begun = self.done = self.broken = False
        self._calls = calls
        self._raw: list[str] = []
        self._state = "open"
        self._value = JsonReader()  # a key or a value
        self._text: list[str] = []  # of it
        self._key = self._name = ""
        self._arguments: str | None = None

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def read(self, text: str, at: int, found: list[Fragment]) -> int:
        """Read `text` from `at` on; returns where the call, or what is no call, stopped."""
        start = at
        while at < len(text) and not (self.done or self.broken):
            if self._state in ("key", "value") and not (self._state == "key" and self._may_close(text[at])):
                at, piece = self._value.read(text, at)
                self._take(piece, found)
            elif text[at] in SPACE or self._punctuation(text[at], found):
                at += 1
            else:
                self.broken = True
        if not self.begun:
            self._raw.append(text[start:at])
        return at

    def _may_close(self, character: str) -> bool:
        return not self._text and (character == "}" or character in SPACE)

    def _punctuation(self, character: str, found: list[Fragment]) -> bool:
        if (self._state, character) in (("open", "{"), ("behind", ",")):
            self._expect("key")
        elif (self._state, character) == ("colon", ":"):
            self._expect("value")
        elif self._state in ("key", "behind") and character == "}":
            self._close(found)
        else:
            return False
        return True

    def _expect(self, state: str) -> None:
        self._state, self._value, self._text = state, JsonReader(), []

    def _take(self, piece: str, found: list[Fragment]) -> None:
        """A further piece of a key or a value."""
        streams = self._state == "value" and self._key in _ARGUMENTS and self._name and self._arguments is None
        told = piece if self._text else piece.lstrip(SPACE)
        if told:
            self._text.append(told)
        if streams and told and self._text[0][0] == "{":
            self._begin(found)
            found.append(self._calls.more(told))
        if self._value.broken or (self._state == "key" and not self._text[0].startswith('"')):
            self.broken = True
        elif self._value.done:
            self._settle()

    def _settle(self) -> None:
        """A key or a value is complete."""
        text = "".join(self._text)
        if self._state == "key":
            self._key, self._state = str(json.loads(text)), "colon"
            return
        self._state = "behind"
        if self._key == "name":
            name = json.loads(text)
            self.broken = bool(self._name) or not (isinstance(name, str) and name in self._calls.offer.names)
            self._name = "" if self.broken else name
        elif self._key in _ARGUMENTS:
            self.broken = self._arguments is not None or not self._is_object(text)

    def _is_object(self, text: str) -> bool:
        """Takes the arguments: an object, one that is written as a string, or null for none."""
        if text.startswith('"'):
            written, inner = str(json.loads(text)).strip(SPACE), JsonReader()
            end, text = inner.read(written, 0)
            if end < len(written) or not inner.done:
                return False
        self._arguments = "{}" if text == "null" else text
        return self._arguments.startswith("{")

    def _begin(self, found: list[Fragment]) -> None:
        if not self.begun:
            self.begun = True
            self._raw.clear()
            found.append(self._calls.begin(self._name))

    def _close(self, found: list[Fragment]) -> None:
        if not self._name:
            self.broken = True
            return
        if not self.begun:
            self._begin(found)
            found.append(self._calls.more("{}" if self._arguments is None else self._arguments))
        self.done = True
