"""What is left of a request's thinking budget: the sampler's rule for it."""

from __future__ import annotations

from engine.thinking import ThinkingBudget


class ThinkingCount:
    """Counts down inside thinking spans; `push` every output token, in order."""

    __slots__ = ("_begin", "_end", "_inside", "_left")

    def __init__(self, budget: ThinkingBudget) -> None:
        assert budget.around is not None, "validate has filled this in"
        self._begin, self._end = budget.around
        self._inside, self._left = budget.opened, budget.tokens

    def copy(self) -> ThinkingCount:
        new = object.__new__(ThinkingCount)
        new._begin, new._end, new._inside, new._left = self._begin, self._end, self._inside, self._left
        return new

    def push(self, token: int) -> None:
        if token == self._end:
            self._inside = False
        elif self._inside:
            self._left -= 1
        elif token == self._begin:
            self._inside = True

    @property
    def forced(self) -> int | None:
        """The one token that may come next; None where the budget leaves the choice."""
        return self._end if self._inside and self._left <= 0 else None
