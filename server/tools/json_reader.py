"""One JSON value, read as it comes: what belongs to it, and whether it is JSON at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

SPACE = " \t\r\n"
MAX_DEPTH = 64
MAX_WORD = 512  # characters of a number
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_WORD = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_WORD_CHARACTERS = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_HEX = frozenset("0123456789abcdefABCDEF")


class JsonReader:
    """Takes characters until the value ends (`done`) or is none (`broken`). A bare number never ends by itself.

    Constant work for each character; the memory is that of the depth, which is bounded.
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._open: list[str] = []  # the brackets around the place, by what closes them
        self._next: Callable[[str], bool] = self._value
        self._in_string = False
        self._is_key = False
        self._hex = 0  # digits of a \u escape that are missing
        self._word: list[str] = []

    def read(self, text: str, at: int) -> tuple[int, str]:
        """Read `text` from `at` on; returns where the value stopped, and its part as JSON wants it.

        Raw line breaks and other control characters within strings, which models write, come back as escapes.
        """
        found: list[str] = []
        while at < len(text) and not self.done:
            if self._next == self._string and (plain := _PLAIN.match(text, at)):
                found.append(plain.group())
                at = plain.end()
                continue
            character = text[at]
            if not self._next(character):
                self.broken = not self.done
                break
            raw = self._in_string and character < " "
            found.append(json.dumps(character)[1:-1] if raw else character)
            at += 1
        return at, "".join(found)

    # Each takes one character, or says that it does not belong here.

    def _value(self, character: str) -> bool:
        if character in SPACE:
            return True
        if character == '"':
            return self._begin_string(is_key=False)
        if character in "{[" and len(self._open) < MAX_DEPTH:
            self._open.append("}" if character == "{" else "]")
            self._next = self._first_key if character == "{" else self._first_item
            return True
        if character in _WORD_CHARACTERS:
            self._word = [character]
            self._next = self._in_word
            return True
        return False

    def _first_item(self, character: str) -> bool:
        return self._close(character) if character == "]" else self._value(character)

    def _first_key(self, character: str) -> bool:
        return self._close(character) if character == "}" else self._key(character)

    def _key(self, character: str) -> bool:
        return character in SPACE or (character == '"' and self._begin_string(is_key=True))

    def _colon(self, character: str) -> bool:
        if character == ":":
            self._next = self._value
        return character == ":" or character in SPACE

    def _behind(self, character: str) -> bool:
        """A value has ended inside a list or an object."""
        if character == ",":
            self._next = self._key if self._open[-1] == "}" else self._value
            return True
        return character in SPACE or self._close(character)

    def _close(self, character: str) -> bool:
        if character != self._open[-1]:
            return False
        self._open.pop()
        self._end_value()
        return True

    def _end_value(self) -> None:
        self.done = not self._open
        self._next = self._behind

    def _begin_string(self, is_key: bool) -> bool:
        self._in_string, self._is_key, self._next = True, is_key, self._string
        return True

    def _string(self, character: str) -> bool:
        if character == "\\":
            self._next = self._escape
        elif character == '"':
            self._in_string = False
            if self._is_key:
                self._next = self._colon
            else:
                self._end_value()
        return True

    def _escape(self, character: str) -> bool:
        self._hex = 4 if character == "u" else 0
        self._next = self._hex_digit if self._hex else self._string
        return character in '"\\/bfnrtu'

    def _hex_digit(self, character: str) -> bool:
        self._hex -= 1
        self._next = self._hex_digit if self._hex else self._string
        return character in _HEX

    def _in_word(self, character: str) -> bool:
        if character in _WORD_CHARACTERS:
            self._word.append(character)
            return len(self._word) <= MAX_WORD
        if not _WORD.fullmatch("".join(self._word)):
            return False
        self._end_value()
        return not self.done and self._behind(character)
