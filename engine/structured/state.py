"""A request's way through its grammar: what may come next, also behind drafted tokens that nobody has committed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import numpy as np

from engine.structured.matcher import Matcher
from engine.structured.vocabulary import Mask, Vocabulary

_SHUT = "no token goes on with it"

Look = Callable[[int, bool], None]  # at a node, once all up to it has been consumed: is its token legal?


class _Phase(Enum):
    """OPEN: before the first token, which may begin a free part. WAITING: for the token that ends it.

    ENDED, ASTRAY: no token matters any more. LOST: nobody knows what may come.
    """

    OPEN = "open"
    WAITING = "waiting"
    BOUND = "bound"
    ENDED = "ended"
    ASTRAY = "behind a token that may not come"
    LOST = "lost"


_TELLING = (_Phase.OPEN, _Phase.BOUND)  # in these the matcher is given the next token


class GrammarState:
    """One request's place in its grammar; `push` every committed output token, in order. Of one thread.

    Its grammar may meet a bound at any token (`source.parser_limits`), or the vocabulary may have no token that goes
    on: then `failure` says so, and nothing may be drawn. A bound that is met behind drafted tokens is no failure: the
    rows behind it have no mask but zeros, so that nothing is committed there, and the next step looks again.
    """

    def __init__(
        self, template: Matcher, vocabulary: Vocabulary, after: int | None = None, begin: int | None = None
    ) -> None:
        """`after`, `begin`: see `Grammar`."""
        self.failure = ""
        self._vocabulary = vocabulary
        self._template = template
        self._matcher = template.fork()
        self._after, self._begin = after, begin
        self._phase = _Phase.BOUND if after is None else _Phase.WAITING if begin is None else _Phase.OPEN
        self._told: list[int] = []  # what the matcher was given
        self._mask: Mask | None = None  # of the next token, once it was asked for

    def push(self, token: int) -> None:
        self._mask = None
        before = self._phase
        self._phase = self._step(token)
        if before in _TELLING and self._phase is _Phase.BOUND:
            self._told.append(token)
        if self._phase in (_Phase.ASTRAY, _Phase.LOST):
            self.failure = self.failure or self._matcher.error or _SHUT

    @property
    def mask(self) -> Mask | None:
        """[words] of the next token, read-only; None where any token may come, as the answer is over."""
        if self._mask is None and self._phase is not _Phase.ENDED:
            self._mask = mask = self._row()
            if mask is not None and not mask.any():
                self.failure = self.failure or self._matcher.error or _SHUT
        return self._mask

    def masks(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> list[Mask | None]:
        """As `mask`, behind each of `tokens` and all that it follows; see `SamplingState.ahead` for `parents`."""
        found: list[Mask | None] = [None] * len(tokens)

        def look(node: int, _: bool) -> None:
            found[node] = self._row()

        self._walk(tokens, parents, look)
        return found

    def legal(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> list[bool]:
        """Which of `tokens` may come where all that they follow has; nothing may behind the end of the answer."""
        found = [False] * len(tokens)

        def look(node: int, legal: bool) -> None:
            found[node] = legal

        self._walk(tokens, parents, look)
        return found

    def forced(self, most: int) -> list[int]:
        """The first `most` tokens that must come next, perhaps none."""
        if self._phase is not _Phase.BOUND or self.failure:
            return []
        return self._matcher.forced()[:most]

    def _row(self) -> Mask | None:
        match self._phase:
            case _Phase.WAITING:
                return self._vocabulary.unbound
            case _Phase.ENDED | _Phase.ASTRAY if not self.failure:
                return None
        row = np.zeros(self._vocabulary.words, dtype=np.uint32)
        if self.failure or self._phase not in _TELLING:
            return row
        if not self._matcher.fill(row):
            row[:] = 0
        elif self._phase is _Phase.OPEN and self._begin is not None:
            row[self._begin // 32] |= np.uint32(1 << self._begin % 32)
        row.setflags(write=False)
        return row

    def _step(self, token: int) -> _Phase:
        """The phase behind `token`; where it stays BOUND, the matcher has gone on."""
        match self._phase:
            case _Phase.WAITING:
                if token == self._after:
                    return _Phase.BOUND
                return _Phase.ASTRAY if token in self._vocabulary.ends else _Phase.WAITING
            case _Phase.OPEN if token == self._begin:
                return _Phase.WAITING
            case _Phase.OPEN | _Phase.BOUND:
                if token in self._vocabulary.ends:
                    return _Phase.ENDED if self._matcher.accepting else _Phase.ASTRAY
                if self._matcher.consume(token):
                    return _Phase.BOUND
                return _Phase.LOST if self._matcher.error else _Phase.ASTRAY
        return self._phase

    def _walk(self, tokens: Sequence[int], parents: Sequence[int] | None, look: Look) -> None:
        """Go to every node of a chain or tree, call `look`, and come back to where the answer stands."""
        children: list[list[int]] = [[] for _ in range(len(tokens) + 1)]
        for node in range(len(tokens)):
            children[node if parents is None else parents[node] + 1].append(node)
        start = self._phase
        self._visit(tokens, children, look)
        self._phase = start
        if self._matcher.error and not self.failure:  # met ahead: it says nothing of where the answer stands
            self._matcher = self._template.fork()
            for token in self._told:
                self._matcher.consume(token)

    def _visit(self, tokens: Sequence[int], children: Sequence[Sequence[int]], look: Look) -> None:
        """Depth first, with a stack: (node, its phase before) on the way back, (node, None) on the way there."""
        stack: list[tuple[int, _Phase | None]] = [(node, None) for node in reversed(children[0])]
        while stack:
            node, before = stack.pop()
            if before is not None:
                if before in _TELLING and self._phase is _Phase.BOUND:
                    self._matcher.rollback(1)
                self._phase = before
                continue
            stack.append((node, self._phase))
            legal = self._phase is not _Phase.ENDED
            self._phase = self._step(tokens[node])
            look(node, legal and self._phase not in (_Phase.ASTRAY, _Phase.LOST))
            stack += [(child, None) for child in reversed(children[node + 1])]
