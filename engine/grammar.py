"""What an answer must look like, as a request carries it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the tokens of an answer: every prefix can be completed to a text of the language.

    `kind` says how `text` is read: "json" (a JSON schema), "regex" (of the whole answer), or "lark" (a context-free
    grammar in llguidance's dialect of Lark). `after`: it holds from behind this token on, as after the end of a
    thinking span; None: from the first token.
    """

    kind: str
    text: str
    after: int | None = None
