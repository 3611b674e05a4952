"""The text around tool calls, and where in it a call begins."""

from __future__ import annotations

from collections.abc import Iterator

from server.fragments import Fragment
from server.tools.json_reader import SPACE

PIECE = 1024


def pieces(text: str) -> Iterator[str]:
    """A long text in parts: what is read of one is cut off in front, which would take a long text too much time."""
    return (text[at : at + PIECE] for at in range(0, len(text), PIECE))


class Prose:
    """Content as it comes, up to the next mark. White space beside a call is no content.

    What may be the beginning of a mark is held back, and so is white space until it is known what stands behind it.
    """

    def __init__(self, *marks: str) -> None:
        self._marks = marks
        self._tail = ""  # the beginning of a mark, perhaps
        self._space: list[str] = []
        self._beside = False  # directly behind a call

    def read(self, text: str, at: int, found: list[Fragment]) -> tuple[int, str]:
        """Read `text` from `at` on. Returns where it stopped, and the mark that stands in front of there, if any."""
        size = len(self._tail)
        text, start = self._tail + text[at:], at - size
        self._tail = ""
        hits = [(text.find(mark), mark) for mark in self._marks]
        position, mark = min((hit for hit in hits if hit[0] >= 0), default=(-1, ""))
        if mark:
            self.say(text[:position], found)
            return start + position + len(mark), mark
        cut = len(text) - max((_overlap(text, mark) for mark in self._marks), default=0)
        self._tail = text[cut:]
        self.say(text[:cut], found)
        return start + len(text), ""

    def say(self, text: str, found: list[Fragment]) -> None:
        """This is content."""
        if self._beside:
            text = text.lstrip(SPACE)
        body = text.rstrip(SPACE)
        if body:
            found.append(Fragment("content", "".join(self._space) + body))
            self._space.clear()
            self._beside = False
        if len(body) < len(text):
            self._space.append(text[len(body) :])

    def called(self) -> None:
        """A call stands here."""
        self._space.clear()
        self._beside = True

    def end(self, found: list[Fragment]) -> None:
        """What was held back."""
        tail, self._tail = self._tail, ""
        self.say(tail, found)
        if self._space:
            found.append(Fragment("content", "".join(self._space)))
            self._space.clear()


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that `mark` begins with, shorter than the mark."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0
