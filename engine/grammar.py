"""What an answer must look like, as a request carries it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

# Between two tokens of JSON: nothing, a space, or one line break and its indentation. Models that may put any white
# space between tokens sometimes put nothing else there until they run out of room.
WHITESPACE = r"\x20|\n[\x20\t]{0,40}"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the tokens of an answer: every prefix can be completed to a text of the language.

    `kind` says how `text` is read: "json" (a JSON schema), "regex" (of the whole answer), or "lark" (a context-free
    grammar in llguidance's dialect of Lark). `after`: it holds from behind this token on, as after the end of a
    thinking span; None: from the first token. `begin`, with `after`: the answer may begin with this token, and then
    it is free until `after`; else the grammar holds from the first token.
    """

    kind: str
    text: str
    after: int | None = None
    begin: int | None = None
