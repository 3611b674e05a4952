"""Finding stop strings in text that arrives in pieces, with constant work per character."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Knuth-Morris-Pratt automata, one per stop string, that read a text once.

    The stop whose last character comes first wins, and among those that end together the longest. So the result
    does not depend on how the text was cut into tokens or pushes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)

    @property
    def held(self) -> int:
        """Length of the longest suffix of the text so far that may be the beginning of a stop."""
        return max(self._states, default=0)

    def feed(self, text: str, listening: bool = True) -> tuple[int, str] | None:
        """Read on. Returns (how many characters of `text` were read, the stop) at the first match.

        When not `listening`, stops that end in `text` are passed over.
        """
        if not self._stops:
            return None
        for position, character in enumerate(text, 1):
            matched = self._advance(character)
            if matched and listening:
                return position, matched
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
