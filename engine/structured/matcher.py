"""A compiled grammar, and where one answer stands in it. The work is llguidance's, within limits that bound it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher

from engine.errors import InvalidRequest
from engine.grammar import Grammar
from engine.structured.messages import explain
from engine.structured.source import parser_limits, source
from engine.structured.vocabulary import Mask, Vocabulary


class Matcher:
    """Where an answer stands in its grammar. Used from one thread at a time.

    Errors never raise: `error` says what went wrong (a bound was met), and all that is asked from then on is void.
    """

    __slots__ = ("_inner", "_vocabulary")

    def __init__(self, inner: LLMatcher, vocabulary: Vocabulary) -> None:
        self._inner = inner
        self._vocabulary = vocabulary

    @classmethod
    def compile(cls, grammar: Grammar, vocabulary: Vocabulary) -> Matcher:
        """One at the beginning of its answer; `grammar.after` is not looked at.

        Takes 0.1 ms to 1 s, mostly without the interpreter's lock. Raises InvalidRequest.
        """
        inner = LLMatcher(vocabulary.handle, source(grammar), log_level=0, limits=parser_limits())
        if inner.is_error():
            raise InvalidRequest(f"the grammar can't be used: {explain(inner.get_error())}")
        return cls(inner, vocabulary)

    def fork(self) -> Matcher:
        """Another one at the same place; costs more the longer the answer is."""
        return Matcher(self._inner.deep_copy(), self._vocabulary)

    @property
    def error(self) -> str:
        """Empty if there is none."""
        return explain(self._inner.get_error()) if self._inner.is_error() else ""

    @property
    def accepting(self) -> bool:
        """May the answer end here?"""
        return self._inner.is_accepting()

    def consume(self, token: int) -> bool:
        """Go on by a token of the text. False where it may not come: then nothing changes, unless there is an error."""
        return (
            0 <= token < self._vocabulary.size
            and self._inner.validate_tokens([token]) == 1
            and self._inner.consume_token(token)
        )

    def rollback(self, count: int) -> None:
        """Go back by the last `count` tokens that were consumed; takes no longer for a long answer."""
        if count:
            self._inner.rollback(count)

    def fill(self, row: Mask) -> bool:
        """Write the mask of the next token, ends of the answer among them, into `row` [words]; False on an error."""
        assert row.flags.c_contiguous and row.dtype == np.uint32
        self._inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        return not self._inner.is_error()

    def forced(self) -> list[int]:
        """The tokens that must come next, perhaps none."""
        return self._inner.compute_ff_tokens()

    def legal_prefix(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, none of which ends the answer, may come one after another. Changes nothing."""
        count = next((i for i, token in enumerate(tokens) if not 0 <= token < self._vocabulary.size), len(tokens))
        return self._inner.validate_tokens(list(tokens[:count]))
