"""GBNF, the grammars of llama.cpp (and, by another name, the EBNF of SGLang), into Lark as llguidance reads it.

A rule that leads to no loop of rules becomes a terminal, which is matched as one regular expression; what is left is
context-free. Takes time in proportion to the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

MAX_NESTING = 64
_TOKEN = re.compile(
    r"""
    (?P<skip> [ \t\r\n]+ | \#[^\n]* )
    | (?P<rule> [A-Za-z_][A-Za-z0-9_-]* (?= [ \t]* ::= ) )
    | (?P<defines> ::= )
    | (?P<name> [A-Za-z_][A-Za-z0-9_-]* )
    | (?P<literal> "(?: [^"\\\r\n] | \\. )*" )
    | (?P<class> \[ \^? (?: [^\]\\\r\n] | \\. )* \] )
    | (?P<times> [*+?] | \{ [ ]* (?: [0-9]{1,9} [ ]* (?: , [ ]* (?:[0-9]{1,9})? [ ]* )? | , [ ]* [0-9]{1,9} [ ]* ) \} )
    | (?P<mark> [|().] )
    """,
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}
_IN_CLASS = frozenset("\\]^-[&~/")
_LARK = re.compile(r"(?m)^[ \t]*(?:%llguidance\b|start[ \t]*:(?!:))")


class GrammarError(ValueError):
    """The text is no GBNF; says where."""


def is_gbnf(text: str) -> bool:
    """Is it GBNF rather than Lark?"""
    return "::=" in text and _LARK.search(text) is None


def lark_of(text: str) -> str:
    """Raises GrammarError."""
    rules = _Reader(text).rules
    if "root" not in rules:
        raise GrammarError("a GBNF grammar needs a rule named 'root'")
    missing = next((name for rule in rules.values() for name in rule.names if name not in rules), None)
    if missing is not None:
        raise GrammarError(f"the rule '{missing[:64]}' is used and not defined")
    terminals = _terminals(rules)
    names = {name: f"{'T' if name in terminals else 'r'}{i}" for i, name in enumerate(rules)}
    lines = ["%llguidance {}", f"start: {names['root']}"]
    for name, rule in rules.items():
        parts = (names[part[1]] if isinstance(part, tuple) else part for part in rule.parts)
        lines.append(f"{names[name]}: {' '.join(parts)}")
    return "\n".join(lines) + "\n"


@dataclass(slots=True)
class _Rule:
    parts: list[str | tuple[str, str]] = field(default_factory=list)  # Lark's own text, or ("name", a rule's name)

    @property
    def names(self) -> Iterator[str]:
        return (part[1] for part in self.parts if isinstance(part, tuple))


class _Reader:
    """Reads all rules of a text."""

    def __init__(self, text: str) -> None:
        self.rules: dict[str, _Rule] = {}
        self._text = text
        self._rule: _Rule | None = None
        self._defined = False  # was the '::=' of the rule read?
        self._open = 0  # parentheses
        self._empty = True  # is there nothing to repeat, as at the start of an alternative?
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise self._error(f"{text[at]!r} can't stand here", at)
            if found.lastgroup != "skip":
                self._take(found.lastgroup or "", found[0], at)
            at = found.end()
        self._finish(at)

    def _take(self, kind: str, text: str, at: int) -> None:
        if kind == "rule":
            self._finish(at)
            if text in self.rules:
                raise self._error(f"the rule '{text[:64]}' is defined twice", at)
            self._rule = self.rules[text] = _Rule()
            self._defined = False
            return
        if self._rule is None:
            raise self._error("a rule must start with its name and '::='", at)
        if kind == "defines":
            if self._defined:
                raise self._error("'::=' can't stand here", at)
            self._defined = True
        elif kind == "times":
            if self._empty:
                raise self._error("there is nothing to repeat", at)
            self._rule.parts.append(_times(text))
        elif kind == "mark" and text != ".":
            self._mark(text, at)
        else:
            self._rule.parts.append(self._element(kind, text, at))
            self._empty = False

    def _mark(self, text: str, at: int) -> None:
        assert self._rule is not None
        if text == ")":
            self._open -= 1
            if self._open < 0:
                raise self._error("there is nothing to close", at)
        if text in "|)" and self._empty:
            self._rule.parts.append('""')
        if text == "(":
            self._open += 1
            if self._open > MAX_NESTING:
                raise self._error(f"parentheses are nested deeper than {MAX_NESTING} levels", at)
        self._rule.parts.append(text)
        self._empty = text != ")"

    def _element(self, kind: str, text: str, at: int) -> str | tuple[str, str]:
        if kind == "name":
            return ("name", text)
        if kind == "literal":
            return "".join(('"', *(_quoted(char) for char, _ in self._chars(text[1:-1], at)), '"'))
        if kind == "class":
            return self._class(text, at)
        return r"/[^\n]/" if text == "." else text

    def _class(self, text: str, at: int) -> str:
        negated = text.startswith("[^")
        chars = list(self._chars(text[2 if negated else 1 : -1], at))
        if not chars:
            return r"/[\s\S]/" if negated else r"/[^\s\S]/"
        inner = "".join(
            "-" if char == "-" and not escaped and 0 < i < len(chars) - 1 else _in_class(char)
            for i, (char, escaped) in enumerate(chars)
        )
        return f"/[{'^' if negated else ''}{inner}]/"

    def _chars(self, text: str, at: int) -> Iterator[tuple[str, bool]]:
        """The characters that a text with escapes stands for, and whether each was escaped."""
        end = 0
        for found in _ESCAPE.finditer(text):
            yield from ((char, False) for char in text[end : found.start()])
            end = found.end()
            code = found[1] or found[2] or found[3]
            if code is None:
                if found[4] in "xuU":
                    raise self._error("an escape needs more hexadecimal digits", at)
                yield _LETTERS.get(found[4], found[4]), True
                continue
            if int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) < 0xE000:
                raise self._error("an escape stands for no character", at)
            yield chr(int(code, 16)), True
        yield from ((char, False) for char in text[end:])

    def _finish(self, at: int) -> None:
        if self._open:
            raise self._error("a parenthesis is not closed", at)
        if self._rule is not None and self._empty:
            self._rule.parts.append('""')
        self._rule, self._empty = None, True

    def _error(self, reason: str, at: int) -> GrammarError:
        line = self._text.count("\n", 0, at) + 1
        return GrammarError(f"line {line} of the grammar: {reason}")


def _times(text: str) -> str:
    """Lark's form of a repetition; `{,n}` is `{0,n}`."""
    text = text.replace(" ", "")
    return f"{{0{text[1:]}" if text.startswith("{,") else text


def _quoted(char: str) -> str:
    return json.dumps(char, ensure_ascii=not char.isprintable())[1:-1]


def _in_class(char: str) -> str:
    if char in _IN_CLASS:
        return f"\\{char}"
    return char if char.isprintable() else f"\\u{{{ord(char):x}}}"


def _terminals(rules: Mapping[str, _Rule]) -> frozenset[str]:
    """The rules from which no loop can be reached: their references are counted down from those that have none."""
    users: dict[str, list[str]] = {name: [] for name in rules}
    waiting: dict[str, int] = {}
    for name, rule in rules.items():
        used = set(rule.names)
        waiting[name] = len(used)
        for other in used:
            users[other].append(name)
    ready = [name for name, count in waiting.items() if count == 0]
    for name in ready:  # grows
        for user in users[name]:
            waiting[user] -= 1
            if waiting[user] == 0:
                ready.append(user)
    return frozenset(ready)
