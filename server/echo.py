"""Answers that begin with the message they continue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.fragments import Fragment, Manner, Parser


@dataclass(frozen=True, slots=True)
class EchoManner:
    """See `fragments.Manner`: the inner one reads `begun` first, then what the model has added."""

    begun: str
    inner: Manner

    def parser(self) -> EchoParser:
        return EchoParser(self.begun, self.inner.parser())


class EchoParser:
    """See `fragments.Parser`."""

    def __init__(self, begun: str, inner: Parser) -> None:
        self._begun = begun
        self._inner = inner

    def feed(self, text: str) -> Sequence[Fragment]:
        text, self._begun = self._begun + text, ""
        return self._inner.feed(text)

    def end(self) -> Sequence[Fragment]:
        return [*self.feed(""), *self._inner.end()]
