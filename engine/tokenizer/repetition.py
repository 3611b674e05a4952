"""Noticing that an answer has begun to repeat itself."""

from __future__ import annotations

from collections import deque

STOP_REASON = "repetition_detected"
MAX_PATTERN_SIZE = 256  # tokens; each token of the answer is compared with so many before it


class RepetitionDetector:
    """Does the answer end in the same `least` to `most` tokens, `count` times in a row?

    For each size p it counts for how many tokens in a row each equals the one p before it: a pattern of p tokens stands
    `count` times when these are p * (count - 1). Constant work for a token, and as many tokens are kept as the longest
    pattern has.
    """

    def __init__(self, least: int, most: int, count: int) -> None:
        self._sizes = range(max(1, least), most + 1)
        self._needed = count - 1
        self._equal = [0] * len(self._sizes)
        self._tail: deque[int] = deque(maxlen=most)  # latest first

    def push(self, token: int) -> bool:
        """Take the next token. True when the answer repeats itself with it."""
        tail, equal, seen, found = self._tail, self._equal, len(self._tail), False
        for i, size in enumerate(self._sizes):
            if size > seen:
                break
            if tail[size - 1] == token:
                equal[i] += 1
                found = found or equal[i] >= size * self._needed
            else:
                equal[i] = 0
        tail.appendleft(token)
        return found
