"""One Python literal, read as it comes and told as JSON. Nothing is evaluated: only literals are known."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from server.tools.json_reader import MAX_DEPTH, MAX_WORD, SPACE

_PLAIN = re.compile(r"""[^"'\\\x00-\x1f]+""")
_NUMBER = re.compile(r"([+-]?)([0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_WORDS = {word: name for name in ("true", "false") for word in (name, name.title())} | {"None": "null", "null": "null"}
_WORD_CHARACTERS = frozenset("+-._0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""}
_ESCAPES |= {character: character for character in "\\'\"/"}
_DIGITS = {"x": 2, "u": 4, "U": 8}  # of a character's number in hexadecimal


class PythonReader:
    """Strings, numbers, True, False, None, lists, tuples, and dicts with string keys; JSON's words are fine too.

    As `JsonReader`: `done`, `broken`, constant work per character, and a bare word never ends by itself.
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._open: list[str] = []  # what closes the brackets around the place
        self._next: Callable[[str], str | None] = self._value
        self._quote = ""
        self._comma = ""  # of a list or a dict; told once another element follows
        self._is_key = False
        self._pending: list[str] = []  # of a word, or digits of an escape
        self._missing = 0  # such digits
        self._unread = False

    def read(self, text: str, at: int) -> tuple[int, str]:
        """Read `text` from `at` on; returns where the literal stopped, and what it says in JSON so far."""
        found: list[str] = []
        while at < len(text) and not self.done:
            if self._next == self._string and (plain := _PLAIN.match(text, at)):
                found.append(plain.group())
                at = plain.end()
                continue
            piece = self._next(text[at])
            if piece is None:
                self.broken = True
                break
            found.append(piece)
            at += not self._unread
        return at, "".join(found)

    # Each takes one character and returns what is to be told, or None where it does not belong.

    def _value(self, character: str) -> str | None:
        if character in SPACE:
            return ""
        comma, self._comma = self._comma, ""
        if character in "\"'":
            self._quote, self._is_key, self._next = character, False, self._string
            return comma + '"'
        if character in "{[(" and len(self._open) < MAX_DEPTH:
            self._open.append({"{": "}", "[": "]", "(": ")"}[character])
            self._next = self._key if character == "{" else self._element
            return comma + ("{" if character == "{" else "[")
        if character in _WORD_CHARACTERS:
            self._pending, self._next = [character], self._word
            return comma
        return None

    def _element(self, character: str) -> str | None:
        return self._close() if character == self._open[-1] else self._value(character)

    def _key(self, character: str) -> str | None:
        if character in "\"'":
            comma, self._comma = self._comma, ""
            self._quote, self._is_key, self._next = character, True, self._string
            return comma + '"'
        return "" if character in SPACE else self._close() if character == "}" else None

    def _colon(self, character: str) -> str | None:
        if character == ":":
            self._next = self._value
            return ": "
        return "" if character in SPACE else None

    def _behind(self, character: str) -> str | None:
        if character == ",":
            self._comma, self._next = ", ", self._key if self._open[-1] == "}" else self._element
            return ""
        return "" if character in SPACE else self._close() if character == self._open[-1] else None

    def _close(self) -> str:
        self._comma = ""
        closing = self._open.pop()
        self._end_value()
        return "}" if closing == "}" else "]"

    def _end_value(self) -> None:
        self.done = not self._open
        self._next = self._behind

    def _word(self, character: str) -> str | None:
        if character in _WORD_CHARACTERS:
            self._pending.append(character)
            return "" if len(self._pending) <= MAX_WORD else None
        told = _told("".join(self._pending))
        self._end_value()
        self._unread = self.done
        if told is None or self.done:
            return told
        behind = self._behind(character)
        return None if behind is None else told + behind

    # ---- strings ---------------------------------------------------------------------------------------------

    def _string(self, character: str) -> str | None:
        if character == "\\":
            self._next = self._escape
            return ""
        if character != self._quote:
            return _quoted(character)
        if self._is_key:
            self._next = self._colon
        else:
            self._end_value()
        return '"'

    def _escape(self, character: str) -> str | None:
        self._pending = []
        if character in _DIGITS:
            self._missing, self._next = _DIGITS[character], self._hexadecimal
            return ""
        if character in "01234567":
            self._next = self._octal
            return self._octal(character)
        self._next = self._string
        return _quoted(_ESCAPES.get(character, "\\" + character))

    def _hexadecimal(self, character: str) -> str | None:
        if character not in "0123456789abcdefABCDEF":
            return None
        self._pending.append(character)
        if len(self._pending) < self._missing:
            return ""
        self._next = self._string
        number = int("".join(self._pending), 16)
        return _quoted(chr(number)) if number <= 0x10FFFF else None

    def _octal(self, character: str) -> str | None:
        if character in "01234567" and len(self._pending) < 3:
            self._pending.append(character)
            return ""
        self._next = self._string
        behind = self._string(character)
        return None if behind is None else _quoted(chr(int("".join(self._pending), 8))) + behind


def _quoted(text: str) -> str:
    """As it stands between the quotes of a JSON string; halves of a surrogate pair stay escapes."""
    return json.dumps(text, ensure_ascii=any("\ud800" <= character <= "\udfff" for character in text))[1:-1]


def _told(word: str) -> str | None:
    """JSON's spelling of a word or a number; None where it is neither."""
    if word in _WORDS:
        return _WORDS[word]
    match = _NUMBER.fullmatch(word.replace("_", ""))
    if match is None:
        return None
    sign, whole, fraction, exponent = (part or "" for part in match.groups())
    if not (whole or fraction.strip(".")) or (len(whole) > 1 and whole[0] == "0"):
        return None
    fraction = f".{fraction[1:] or '0'}" if fraction else ""
    return sign.strip("+") + (whole or "0") + fraction + exponent
