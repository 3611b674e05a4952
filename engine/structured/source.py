"""What llguidance is given for a `Grammar`, and the bounds it works within: the same in every process.

A grammar that the front process has let through is compiled again by the engine process, so nothing here may depend
on where it runs.
"""

from __future__ import annotations

import re

from llguidance import LLMatcher, LLParserLimits

from engine.errors import InvalidRequest
from engine.grammar import WHITESPACE, Grammar

_REASONS = {"Expecting object schema to apply options": "a schema must be an object or a boolean"}

_PAIR = re.compile(r"\\.", re.DOTALL)  # a backslash and what it escapes
_ASCII = {r"\d": "[0-9]", r"\D": "[^0-9]", r"\w": "[0-9A-Za-z_]", r"\W": "[^0-9A-Za-z_]"}


def source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Its errors are found when it is compiled.

    A JSON schema may say in a member `x-guidance` at its top how white space is treated (`whitespace_flexible`,
    `whitespace_pattern`); it can't turn off that unknown keywords are errors. Raises InvalidRequest where the text is
    not even JSON.
    """
    match grammar.kind:
        case "json":
            return _of_schema(grammar.text)
        case "regex":
            # A backslash at the end would take llguidance's closing slash into the expression.
            if (len(grammar.text) - len(grammar.text.rstrip("\\"))) % 2:
                raise InvalidRequest("invalid regular expression: it ends in an incomplete escape")
            return LLMatcher.grammar_from_regex(_PAIR.sub(_in_ascii, grammar.text))
        case "lark":
            # Text in braces would be read as llguidance's JSON form, which holds options that we settle.
            if grammar.text.lstrip().startswith("{"):
                raise InvalidRequest("a grammar must be Lark or GBNF text")
            return LLMatcher.grammar_from_lark(grammar.text)
    raise InvalidRequest(f"there are no grammars of kind {grammar.kind!r}")


def _in_ascii(pair: re.Match[str]) -> str:
    """Digits and word characters are those of ASCII, as in the patterns of JSON schemas: `\\d` is no digit of Thai."""
    return _ASCII.get(pair[0], pair[0])


def parser_limits() -> LLParserLimits:
    """Tighter than llguidance's own: a mask may take about 40 ms, and a matcher hold about 100 MB, before its request
    ends. Errors go to clients: they come without the parser's state.
    """
    return LLParserLimits(
        max_items_in_row=8_000,  # four for each property that may be left out
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=20_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _of_schema(text: str) -> str:
    if text.strip() in ("true", "false"):  # options are for objects only
        text = "{}" if text.strip() == "true" else '{"anyOf": []}'
    try:
        return LLMatcher.grammar_from_json_schema(
            text,
            defaults={"whitespace_pattern": WHITESPACE},
            overrides={"lenient": False, "coerce_one_of": False},
        )
    except ValueError as error:
        raise InvalidRequest(f"invalid JSON schema: {_REASONS.get(str(error), error)}") from None
