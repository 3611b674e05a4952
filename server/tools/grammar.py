"""Grammars that calls follow, in llguidance's dialect of Lark; each form writes its own from what is here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

TEXT = r"/(.|\n)*/"
MOST_CALLS = 16  # of one answer, where they follow each other


@dataclass(frozen=True, slots=True)
class Function:
    """`schema`: of its arguments, a JSON schema for `%json`."""

    name: str
    schema: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Shape:
    """What an answer may be.

    `answer`: what it may be in place of calls: None is nothing, an empty text any text, else a rule. `many`: calls are
    not limited to one. `special`: the form's marks that are special tokens, which a grammar knows by their ids.
    """

    functions: tuple[Function, ...]
    many: bool
    answer: str | None
    special: Mapping[str, int]

    def mark(self, text: str) -> str:
        return f"<[{self.special[text]}]>" if text in self.special else literal(text)

    def head(self, mark: str) -> str:
        """The rule `head`: any text up to and with a mark."""
        if mark in self.special:
            return f"head: TEXT {self.mark(mark)}"
        return f"head[lazy]: TEXT {self.mark(mark)}"

    def repeated(self, one: str, separator: str = "") -> str:
        """One call or several, but not without end: small models repeat themselves if they may."""
        return f"{one} ({separator} {one}){{0,{MOST_CALLS - 1}}}" if self.many else one


def lark(*rules: str, text: str = TEXT) -> str:
    """`text`: the terminal TEXT."""
    return "\n".join(("%llguidance {}", *rules, f"TEXT: {text}", ""))


def literal(text: str) -> str:
    return json.dumps(text)


def json_rule(schema: Mapping[str, object]) -> str:
    return f"%json {json.dumps(schema)}"


def any_of(functions: tuple[Function, ...]) -> str:
    """The rules of the functions, f0, f1 ..., as alternatives."""
    return f"({' | '.join(f'f{i}' for i in range(len(functions)))})"


def json_calls(functions: tuple[Function, ...], key: str) -> list[str]:
    """The rules f0, f1 ... of calls that are JSON objects; `key` names the arguments."""
    return [
        f"f{i}: {literal(json.dumps({'name': function.name})[:-1] + f', {json.dumps(key)}: ')}"
        f' {json_rule(function.schema)} "}}"'
        for i, function in enumerate(functions)
    ]


def text_without(beginning: str) -> str:
    """Any text that does not begin with the regular expression `beginning`, white space aside."""
    return rf"{TEXT} & ~/[ \t\r\n]*{beginning}(.|\n)*/"


def names_regex(functions: tuple[Function, ...]) -> str:
    return "|".join(re.escape(function.name) for function in functions)
