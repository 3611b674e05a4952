"""Finding stop strings and stop patterns in text that arrives in pieces, with bounded work per character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.tokenizer.stop_regex import PatternMatcher, compile_stop


class Match(NamedTuple):
    """`end`: how many characters of the text that was read last belong to it or stand before it; `stop`: the stop
    string, or the pattern; `length`: in characters."""

    end: int
    stop: str
    length: int


class StopMatcher:
    """Knuth-Morris-Pratt automata, one per stop string, and one automaton per pattern, that read a text once.

    The stop whose last character comes first wins, and among those that end together the longest (a string before a
    pattern). So the result does not depend on how the text was cut into tokens or pushes.
    """

    def __init__(self, stops: Sequence[str], patterns: Sequence[str] = ()) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._patterns = [PatternMatcher(compile_stop(pattern)) for pattern in dict.fromkeys(patterns)]

    @property
    def held(self) -> int:
        """Length of the longest suffix of the text so far that may be the beginning of a stop."""
        if self._patterns:
            return max(*self._states, *(pattern.held for pattern in self._patterns), 0, 0)
        return max(self._states, default=0)

    def feed(self, text: str, listening: bool = True) -> Match | None:
        """Read on. Returns the first match, if there is one.

        When not `listening`, stops that end in `text` are passed over.
        """
        if not self._stops and not self._patterns:
            return None
        for position, character in enumerate(text, 1):
            stop = self._advance(character)
            length = len(stop)
            for pattern in self._patterns:
                size = pattern.feed(character)
                if size > length:
                    stop, length = pattern.automaton.pattern, size
            if length and listening:
                return Match(position, stop, length)
        return None

    def _advance(self, character: str) -> str:
        """The longest stop that ends with this character, or an empty text."""
        longest = ""
        for i, stop in enumerate(self._stops):
            borders, state = self._borders[i], self._states[i]
            while state and stop[state] != character:
                state = borders[state - 1]
            state += stop[state] == character
            if state == len(stop):
                longest = max(longest, stop, key=len)
                state = borders[-1]
            self._states[i] = state
        return longest


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = borders[length - 1]
        length += stop[i] == stop[length]
        borders[i] = length
    return borders
