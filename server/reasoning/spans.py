"""Telling thought from answer in a text that arrives in pieces.

A span is recognised at the beginning of an answer alone: a mark that comes later is a word of the answer, which may
well explain how models think. White space around a thought, and line breaks between it and the answer, belong to
neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from engine.thinking import ThinkingForm

MOST_LEADING = 64  # characters of white space before the beginning of a span


class Piece(NamedTuple):
    """A part of the text: of the thought, or of the answer."""

    thought: bool
    text: str


class _At(Enum):
    START = "it is open whether there is a span"
    LEAD = "inside, before the thought's first character"
    INSIDE = "inside"
    BEHIND = "behind the span, before the answer's first character"
    ANSWER = "in the answer"


class SpanReader:
    """Reads one answer. What its pieces join to does not depend on how the text was cut; linear in the text.

    `known`: so many characters of the text have been told apart. `inside`: where among them the thought begins, and the
    first character that is no longer of it, None while the span is open.
    """

    def __init__(self, form: ThinkingForm, opened: bool) -> None:
        self._form = form
        self._at = _At.LEAD if opened else _At.START
        leaders = (form.begin, form.label) if opened else (form.label,)
        self._leaders = [leader for leader in leaders if leader]  # each may be passed over once
        self._text = ""  # read, and not told yet
        self._space: list[str] = []  # white space of a thought that may be its last
        self.known = 0
        self.inside: tuple[int, int | None] = (0, 0)

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        return [*self._read(final=False)]

    def end(self) -> list[Piece]:
        """What was held back."""
        return [*self._read(final=True)]

    def _read(self, final: bool) -> Iterator[Piece]:
        goes_on = True
        while self._text and goes_on:
            match self._at:
                case _At.START:
                    goes_on = self._begin(final)
                case _At.LEAD:
                    goes_on = self._lead(final)
                case _At.INSIDE:
                    goes_on = self._form.end in self._text
                    yield from self._think(final)
                case _At.BEHIND:
                    self._skip(len(self._text) - len(self._text.lstrip("\r\n")))
                    self._at = _At.ANSWER if self._text else _At.BEHIND
                case _At.ANSWER:
                    yield Piece(False, self._text)
                    self._skip(len(self._text))

    def _skip(self, count: int) -> None:
        self._text, self.known = self._text[count:], self.known + count

    def _begin(self, final: bool) -> bool:
        """Is there a span at all? False where the text so far does not tell."""
        lead = len(self._text) - len(self._text.lstrip())
        rest = self._text[lead : lead + len(self._form.begin)]
        if lead <= MOST_LEADING and rest == self._form.begin:
            self._skip(lead + len(rest))
            self._at = _At.LEAD
        elif final or lead > MOST_LEADING or not self._form.begin.startswith(rest):
            self._at = _At.ANSWER
        else:
            return False
        return True

    def _lead(self, final: bool) -> bool:
        """Pass over white space and what a span may begin with. False where the text so far does not tell."""
        self._skip(len(self._text) - len(self._text.lstrip()))
        self.inside = (self.known, None)
        for leader in self._leaders:
            if self._text.startswith(leader):
                self._leaders.remove(leader)
                self._skip(len(leader))
                self.inside = (self.known, None)
                return True
        if not self._text or (not final and any(leader.startswith(self._text) for leader in self._leaders)):
            return False
        self._at = _At.INSIDE
        return True

    def _think(self, final: bool) -> Iterator[Piece]:
        at = self._text.find(self._form.end)
        told = at if at >= 0 else len(self._text) - (0 if final else _overlap(self._text, self._form.end))
        solid = self._text[:told].rstrip()
        if solid:
            yield Piece(True, "".join((*self._space, solid)))
            self._space.clear()
        self._space.append(self._text[len(solid) : told])
        self._skip(told)
        if at >= 0:
            self.inside = (self.inside[0], self.known)
            self._skip(len(self._form.end))
            self._at = _At.BEHIND


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a beginning of `mark`, and not all of it."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0
