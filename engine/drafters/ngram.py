"""Prompt look-up: what followed the last time these tokens stood here is likely to follow again.

No weights and no pass of a model: good where an answer repeats its prompt or itself (edited code, quotes, lists).
The idea is Saxena's prompt lookup decoding (2023); here the earlier place that agrees longest is taken, and a longer
agreement earns a longer draft.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.protocols import DraftAsk, DraftProposal, DraftSampler

SHORTEST = 3  # tokens that must agree
LONGEST = 24  # agreement is not measured past this
PLACES = 8  # most recent places that are compared
CERTAIN = 8  # from this agreement on a draft may have any length


class History:
    """One request's committed tokens, with an index of where each run of SHORTEST tokens was followed by another."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        known = self.tokens
        for token in tokens:
            if len(known) >= SHORTEST:
                places = self._places.setdefault(tuple(known[-SHORTEST:]), [])
                places.append(len(known))
                if len(places) > PLACES:
                    del places[0]
            known.append(token)

    def draft(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next; none where nothing agrees."""
        tokens, size = self.tokens, len(self.tokens)
        place, agreement = 0, 0
        for candidate in reversed(self._places.get(tuple(tokens[-SHORTEST:]), ())):
            length = self._agreement(candidate)
            if length > agreement:  # the latest place of the longest agreement
                place, agreement = candidate, length
        if not agreement:
            return []
        length = limit if agreement >= CERTAIN else min(limit, agreement - 1)
        # Where the place is so near that the draft would run past the end, the text repeats: go round.
        return [tokens[place + i % (size - place)] for i in range(length)]

    def _agreement(self, place: int) -> int:
        """How many tokens before `place` equal the last ones, SHORTEST to LONGEST."""
        tokens, size = self.tokens, len(self.tokens)
        length, most = SHORTEST, min(place, LONGEST)
        while length < most and tokens[place - 1 - length] == tokens[size - 1 - length]:
            length += 1
        return length


class NgramDrafter:
    """See `protocols.Drafter`."""

    most = 8
    scores = False

    def __init__(self) -> None:
        self._histories: dict[str, History] = {}

    def admit(self, request_id: str, tokens: Sequence[int]) -> None:
        self._histories[request_id] = History(tokens)

    def drop(self, request_id: str) -> None:
        self._histories.pop(request_id, None)

    def commit(self, request_id: str, tokens: Sequence[int]) -> None:
        self._histories[request_id].extend(tokens)

    def propose(
        self,
        asks: Sequence[DraftAsk],
        sampler: DraftSampler | None = None,  # noqa: ARG002  nothing is drawn
        width: int = 0,
    ) -> DraftProposal:
        drafts = [self._histories[ask.request_id].draft(ask.limit) if ask.limit > 0 else [] for ask in asks]
        lengths = tuple(map(len, drafts))
        width = max(lengths, default=0)
        padded = [[*draft, *([-1] * (width - len(draft)))] for draft in drafts]
        return DraftProposal(torch.tensor(padded, dtype=torch.int64).view(len(asks), width), lengths)
