"""Reading answers of models that think: the thought apart, all else by another parser."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.thinking import ThinkingForm
from engine.types import TokenEvent
from server.fragments import Fragment, Manner, Parser
from server.reasoning.spans import Piece, SpanReader


@dataclass(frozen=True, slots=True)
class Thinking:
    """How the answers to one request begin: inside a span that the prompt has `opened`, or behind one, `closed`."""

    form: ThinkingForm
    opened: bool = False
    closed: bool = False


@dataclass(frozen=True, slots=True)
class ThinkingManner:
    """See `fragments.Manner`. `shown`: thoughts are told; `at_once`: each in one piece, when it is complete."""

    thinking: Thinking
    inner: Manner
    shown: bool = True
    at_once: bool = False

    def parser(self) -> ThinkingParser:
        return ThinkingParser(self)


class ThinkingParser:
    """See `fragments.Parser`."""

    def __init__(self, manner: ThinkingManner) -> None:
        self._manner = manner
        self._reader = SpanReader(manner.thinking.form, manner.thinking.opened)
        self._inner: Parser = manner.inner.parser()
        self._thought: list[str] = []  # kept until it is complete

    def feed(self, text: str) -> Sequence[Fragment]:
        return self._sorted(self._reader.feed(text))

    def end(self) -> Sequence[Fragment]:
        return [*self._sorted(self._reader.end()), *self._whole_thought(), *self._inner.end()]

    def _sorted(self, pieces: Iterable[Piece]) -> list[Fragment]:
        found: list[Fragment] = []
        for piece in pieces:
            if not piece.thought:
                found += self._whole_thought()
                found += self._inner.feed(piece.text)
            elif self._manner.at_once:
                self._thought.append(piece.text)
            elif self._manner.shown:
                found.append(Fragment("reasoning", piece.text))
        return found

    def _whole_thought(self) -> list[Fragment]:
        text = "".join(self._thought)
        self._thought.clear()
        return [Fragment("reasoning", text)] if text and self._manner.shown else []


class ThoughtMeter:
    """Counts the tokens of one answer that begin inside its thought; its marks do not."""

    def __init__(self, thinking: Thinking) -> None:
        self._reader = SpanReader(thinking.form, thinking.opened)
        self._offsets: deque[int] = deque()  # of tokens that have not been told apart yet
        self.tokens = 0

    def note(self, event: TokenEvent) -> None:
        self._offsets.extend(event.offsets)
        self._reader.feed(event.text)
        if event.finish is not None:
            self._reader.end()
        begin, end = self._reader.inside
        while self._offsets and self._offsets[0] < self._reader.known:
            offset = self._offsets.popleft()
            self.tokens += begin <= offset and (end is None or offset < end)
