"""What the sampler remembers of one request: counts for penalties, the tail for bad words, the next position."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from engine.runtime.rng import Draw, Purpose
from engine.runtime.thinking import ThinkingCount
from engine.structured.state import GrammarState
from engine.structured.vocabulary import Mask
from engine.types import Request

GREEDY_BELOW = 1e-5  # temperatures under this take the most likely token


class SamplingState:
    """One request's state between draws; `push` every committed output token, in order.

    Memory is O(prompt + output) with penalties or bad words and O(1) without; `push` is O(1).
    """

    __slots__ = (
        *("_bans", "_choice", "_min_bans", "_purpose", "_row", "_step", "_thinking"),
        *("allowed", "bias", "counts", "grammar", "num_outputs", "position", "sampling"),
    )

    def __init__(self, request: Request, output_ids: Sequence[int] = (), grammar: GrammarState | None = None) -> None:
        """`grammar`: the request's own, at the beginning; it belongs to the state from now on."""
        self.grammar = grammar
        self._row: Mask | None = None  # of states ahead, which have no grammar of their own
        self.sampling = sampling = request.sampling
        self.position = len(request.prompt_ids)  # of the token to draw
        self.num_outputs = 0
        self._choice = request.choice
        self._purpose, self._step = Purpose.TARGET, 0  # of its own draws
        allowed = sampling.allowed_token_ids
        self.allowed = None if allowed is None else np.array(allowed, dtype=np.int64)
        self.bias = Bias(sampling.logit_bias) if sampling.logit_bias else None
        self._min_bans = (*request.eos_ids, *sampling.stop_token_ids) if sampling.min_tokens > 0 else ()
        self._bans = BadWords(sampling.bad_words, request.prompt_ids) if sampling.bad_words else None
        self._thinking = None if sampling.thinking is None else ThinkingCount(sampling.thinking)
        self.counts: TokenCounts | None = None
        if sampling.repetition_penalty != 1.0:
            self.counts = TokenCounts(request.prompt_ids)
        elif sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
            self.counts = TokenCounts(())
        for token in output_ids:
            self.push(token)

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < GREEDY_BELOW

    @property
    def ruled(self) -> bool:
        """May anything but the temperature and the truncations change this request's logits?"""
        parts = (self.allowed, self.bias, self._bans, self.counts, self._thinking, self.grammar, self._row)
        return bool(self._min_bans) or any(part is not None for part in parts)

    def ahead(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> list[SamplingState]:
        """This very state, then that after each of `tokens`: what draws see if the token and all before it stand.

        With `parents` the tokens are a tree: token i follows tokens[parents[i]], an earlier one, or -1: this state.
        """
        states = [self]
        for index, token in enumerate(tokens):
            states.append(states[index if parents is None else parents[index] + 1]._copy())
            states[-1].push(token)
        if self.grammar is not None:
            for state, row in zip(states[1:], self.grammar.masks(tokens, parents), strict=True):
                state._row = row
        return states

    def masked(self, position: int, step: int) -> SamplingState:
        """What the draw of a masked position sees in this denoise step; for requests whose order of tokens is free."""
        new = self._copy()
        new.num_outputs += position - self.position
        new.position = position
        new._purpose, new._step = Purpose.DENOISE, step
        return new

    def _copy(self) -> SamplingState:
        new = object.__new__(SamplingState)
        new.sampling, new.position, new.num_outputs = self.sampling, self.position, self.num_outputs
        new.allowed, new.bias, new.counts = self.allowed, self.bias, self.counts
        new._choice, new._purpose, new._step = self._choice, self._purpose, self._step
        new._bans, new._min_bans = self._bans, self._min_bans
        new.grammar = new._row = None
        if self.counts is not None:
            new.counts = self.counts.copy()
        if self._bans is not None:
            new._bans = self._bans.copy()
        new._thinking = None if self._thinking is None else self._thinking.copy()
        return new

    def push(self, token: int) -> None:
        self.position += 1
        self.num_outputs += 1
        if self.counts is not None:
            self.counts.push(token)
        if self._bans is not None:
            self._bans.push(token)
        if self._thinking is not None:
            self._thinking.push(token)
        if self.grammar is not None:
            self.grammar.push(token)

    @property
    def forced(self) -> int | None:
        """The one token that may come next, whatever all other rules say; None where there is none such."""
        return None if self._thinking is None else self._thinking.forced

    @property
    def mask(self) -> Mask | None:
        """[words] The tokens that the grammar allows next, see `structured.vocabulary`; None: it says nothing."""
        return self._row if self.grammar is None else self.grammar.mask

    def banned(self) -> Iterable[int]:
        """Ids that the next token must not be (possibly repeated, possibly outside the vocabulary).

        None where nothing would be left of what a grammar allows: an answer's form comes before its length and words.
        """
        mask = self.mask
        if mask is None:
            return self._listed()
        banned = [*self._listed()]
        return () if banned and not leaves_any(mask, banned) else banned

    def _listed(self) -> Iterable[int]:
        if self.num_outputs < self.sampling.min_tokens:
            yield from self._min_bans
        if self._bans is not None:
            yield from self._bans.banned()

    def draw(self, purpose: Purpose | None = None) -> Draw:
        """Of this purpose, or of its own."""
        purpose = self._purpose if purpose is None else purpose
        return Draw(self.sampling.seed, self._choice, self.position, purpose, self._step)


def leaves_any(mask: Mask, banned: Iterable[int]) -> bool:
    """Does the mask allow a token that is not banned?"""
    left = mask.copy()
    for token in banned:
        if 0 <= token < 32 * len(left):
            left[token // 32] &= ~np.uint32(1 << token % 32)
    return bool(left.any())


class Bias:
    """What to add to which logits; values of equal ids are added up."""

    __slots__ = ("ids", "values")

    def __init__(self, pairs: Iterable[tuple[int, float]]) -> None:
        sums: dict[int, float] = {}
        for token, value in pairs:
            sums[token] = sums.get(token, 0.0) + value
        self.ids = np.array(list(sums), dtype=np.int64)
        self.values = np.array(list(sums.values()), dtype=np.float32)


class BadWords:
    """Token sequences that must not appear: the last token is banned where the tokens before it, prompt
    included, end in the rest of the sequence."""

    __slots__ = ("_longer", "_single", "_tail")

    def __init__(self, words: Iterable[tuple[int, ...]], prompt_ids: Sequence[int]) -> None:
        words = [word for word in words if word]
        self._single = [word[0] for word in words if len(word) == 1]
        self._longer = [word for word in words if len(word) > 1]
        longest = max((len(word) - 1 for word in self._longer), default=0)
        self._tail = deque(prompt_ids[max(0, len(prompt_ids) - longest) :], maxlen=longest)

    def copy(self) -> BadWords:
        new = object.__new__(BadWords)
        new._single, new._longer, new._tail = self._single, self._longer, self._tail.copy()
        return new

    def push(self, token: int) -> None:
        self._tail.append(token)

    def banned(self) -> Iterable[int]:
        yield from self._single
        tail = tuple(self._tail)
        for word in self._longer:
            if tail[1 - len(word) :] == word[:-1]:
                yield word[-1]


class TokenCounts:
    """The distinct tokens seen so far, and how often each came in the output (0: in the prompt only)."""

    __slots__ = ("_counts", "_ids", "_slots")

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._slots = {token: slot for slot, token in enumerate(dict.fromkeys(prompt_ids))}
        size = max(64, 2 * len(self._slots))
        self._ids = np.zeros(size, dtype=np.int64)
        self._ids[: len(self._slots)] = np.fromiter(self._slots, dtype=np.int64, count=len(self._slots))
        self._counts = np.zeros(size, dtype=np.float32)

    def copy(self) -> TokenCounts:
        new = object.__new__(TokenCounts)
        new._slots, new._ids, new._counts = self._slots.copy(), self._ids.copy(), self._counts.copy()
        return new

    def push(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[slot] = token
        self._counts[slot] += 1.0

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """[distinct]"""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """[distinct], exact up to 2^24"""
        return self._counts[: len(self._slots)]
