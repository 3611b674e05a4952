"""An answer of a chat in its parts: reasoning, content and tool calls, as they are recognised in the text.

What endpoints write (chat, responses, messages) is made of these; what the model writes is read by parsers, one file
for each form, which a `Manner` has put together for the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

Kind = Literal["content", "reasoning", "call"]


@dataclass(frozen=True, slots=True)
class Fragment:
    """A piece of one part. Pieces of a kind (of a call: with one `index`) are joined by their receiver.

    The first fragment of a call has its `id` and `name` and may have no text; `text` is of its arguments' JSON.
    """

    kind: Kind
    text: str = ""
    index: int = 0  # of a call, from 0
    id: str = ""
    name: str = ""


def is_whole(arguments: str) -> bool:
    """Can a call with these arguments be made? Not where the answer ended in the middle of them."""
    try:
        msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


class Parser(Protocol):
    """Reads one choice's text, in pieces of any size; the fragments do not depend on where it was cut.

    Never raises for what a model writes: text that is not what it seemed to be is content. Linear in the text.
    """

    def feed(self, text: str) -> Sequence[Fragment]: ...

    def end(self) -> Sequence[Fragment]:
        """What was held back. The parser is not used after this."""
        ...


class Manner(Protocol):
    """How the answers to one request are read."""

    def parser(self) -> Parser:
        """A new one, for one choice."""
        ...


class Plain:
    """Where nothing is to be recognised: all text is content."""

    def parser(self) -> Plain:
        return self

    def feed(self, text: str) -> Sequence[Fragment]:
        return (Fragment("content", text),) if text else ()

    def end(self) -> Sequence[Fragment]:
        return ()
