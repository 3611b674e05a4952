"""llguidance's complaints in words for the client who sent the grammar."""

from __future__ import annotations

import re

MAX_MESSAGE = 300
TOO_COMPLEX = "it is too complex to be followed token by token"
_UNSUPPORTED = re.compile(r"Unimplemented keys: \[(.{1,200}?)\]", re.DOTALL)
_FORMAT = re.compile(r"Unknown format: (.{1,100})", re.DOTALL)
# What llguidance says, by its beginning, and what a client should read.
_KNOWN = (
    (
        "oneOf constraints are not supported",
        "unsupported keyword: 'oneOf' of alternatives that may overlap; use 'anyOf', or alternatives of different types"
        " or with a required property that is a different constant in each",
    ),
    ("Resource '", "'$ref' may only point into the schema itself; nothing is fetched"),
    ("Pointer '", "a '$ref' points to nothing in the schema"),
    ("schema too large", "it is too large when its alternatives are multiplied out"),
    ("fuel exhausted", "it is too complex"),
    ("Unable to determine if regex is empty", "its patterns are too complex in combination"),
    ("Unsatisfiable schema: Regex is empty", "no text satisfies its pattern, format and length together"),
    ("NoExtension", "no text satisfies it"),
    ("lexer error", TOO_COMPLEX),
    ("parser error", TOO_COMPLEX),
    ("Parser Error", TOO_COMPLEX),
)


def explain(error: str) -> str:
    """One line, as short as it can be."""
    found = _UNSUPPORTED.search(error)
    if found is not None:
        keys = found[1].replace('"', "'")
        return f"unsupported keyword: {keys}" if "," not in keys else f"unsupported keywords: {keys}"
    found = _FORMAT.search(error)
    if found is not None:
        return f"unsupported value of 'format': '{found[1]}'"
    if "initial lexer configuration (grammar) too big" in error:
        return "it is too complex"
    for beginning, words in _KNOWN:
        if error.startswith(beginning):
            return words
    # Of a regular expression the last part says it: "... regex parse error: (its text) error: unclosed group".
    _, parse_error, rest = error.partition("regex parse error:")
    if parse_error:
        reason = rest.rpartition("error: ")[2].partition("\n")[0]
        return f"invalid regular expression: {reason}"[:MAX_MESSAGE]
    if "lookarounds not supported" in error:
        return "invalid regular expression: anchors and word boundaries inside of it are not supported"
    line = " ".join(error.partition("\n")[0].split())
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - 1]}…"
