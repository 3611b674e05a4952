"""A drafter that knows the answers, and is wrong where the test wants it to be: it forces long accepts on any model."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from engine.protocols import DraftAsk, DraftProposal

ANSWERS: dict[str, list[int]] = {}  # prompt and output by request id, filled by the test
RIGHT = 0.92  # share of drafted tokens that are right


class OracleDrafter:
    """See `protocols.Drafter`."""

    most = 8
    scores = False

    def __init__(self) -> None:
        self._lengths: dict[str, int] = {}
        self._rng = random.Random(11)

    def admit(self, request_id: str, tokens: Sequence[int]) -> None:
        self._lengths[request_id] = 0
        self.commit(request_id, tokens)

    def drop(self, request_id: str) -> None:
        self._lengths.pop(request_id, None)

    def commit(self, request_id: str, tokens: Sequence[int]) -> None:
        start = self._lengths[request_id]
        known = ANSWERS.get(request_id, [])[start : start + len(tokens)]  # a round may run past the answer's end
        assert list(tokens)[: len(known)] == known, f"{request_id}: wrong tokens at {start}"
        self._lengths[request_id] = start + len(tokens)

    def propose(self, asks: Sequence[DraftAsk], sampler: object = None, width: int = 0) -> DraftProposal:
        drafts = [self._draft(ask) for ask in asks]
        width = max(map(len, drafts), default=0)
        padded = [[*draft, *([-1] * (width - len(draft)))] for draft in drafts]
        tokens = torch.tensor(padded, dtype=torch.int64).view(len(asks), width)
        return DraftProposal(tokens, tuple(map(len, drafts)))

    def _draft(self, ask: DraftAsk) -> list[int]:
        """Some of what is asked for; past the answer's end anything goes."""
        start = self._lengths[ask.request_id]
        length = self._rng.choice((self._rng.randint(0, ask.limit), ask.limit, ask.limit))
        truth = (ANSWERS.get(ask.request_id, []) + [0] * (start + length))[start : start + length]
        return [token if self._rng.random() < RIGHT else (token + 1) % 256 for token in truth]
