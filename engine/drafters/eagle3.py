"""EAGLE-3: a small autoregressive draft, one token after another (Li et al., arXiv 2503.01840).

All requests draft together, one pass a token. A chain ends where its request's limit is; the others go on without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine.drafters.wishes import Wishes
from engine.protocols import (
    ChainDraftModel,
    Delta,
    Dense,
    DraftAsk,
    DraftProposal,
    DraftSampler,
    Options,
    Scalar,
)


@dataclass(slots=True, eq=False)
class Steps:
    """What each pass gave for the first m_j chains; `gather` lays it out as a proposal does."""

    tokens: list[torch.Tensor] = field(default_factory=list)  # [m]
    probs: list[torch.Tensor] = field(default_factory=list)  # [m], where anybody asks
    margins: list[torch.Tensor] = field(default_factory=list)  # [m]
    hidden: list[torch.Tensor] = field(default_factory=list)  # [m, width]
    laws: list[torch.Tensor] = field(default_factory=list)  # [drawn chains among them, vocabulary]
    best: list[torch.Tensor] = field(default_factory=list)  # [m, options]
    scores: list[torch.Tensor] = field(default_factory=list)  # [m, options]


class Eagle3Drafter:
    """See `protocols.Drafter`. Keeps the last committed token of each request: the anchor of its next draft."""

    scores = True

    def __init__(self, model: ChainDraftModel) -> None:
        self._model = model
        self._anchors: dict[str, int] = {}

    @property
    def most(self) -> int:
        return self._model.most

    def admit(self, request_id: str, tokens: Sequence[int]) -> None:
        self._anchors[request_id] = tokens[-1]

    def drop(self, request_id: str) -> None:
        self._anchors.pop(request_id, None)

    def commit(self, request_id: str, tokens: Sequence[int]) -> None:
        if tokens:
            self._anchors[request_id] = tokens[-1]

    @torch.inference_mode()
    def propose(self, asks: Sequence[DraftAsk], sampler: DraftSampler | None = None, width: int = 0) -> DraftProposal:
        """Nothing is drafted where the feature before the anchor is missing: nothing is there, or the step feeds it."""
        able = [i for i, ask in enumerate(asks) if ask.limit > 0 and ask.fed == 1 and ask.position > 0]
        order = sorted(able, key=lambda i: -asks[i].limit)  # chains that end first are last
        lengths = [0] * len(asks)
        for i in order:
            lengths[i] = asks[i].limit
        if not order:
            return DraftProposal(torch.empty(len(asks), 0, dtype=torch.int64), tuple(lengths))
        wishes = Wishes(asks, order, sampler, self._model.widen, self._model.device)
        return _laid_out(self._draft([asks[i] for i in order], wishes, width), order, tuple(lengths), wishes.drawn)

    def _draft(self, asks: list[DraftAsk], wishes: Wishes, width: int) -> Steps:
        """`asks` by falling limit."""
        chain, steps = self._model.start(asks), Steps()
        tokens = torch.tensor([self._anchors[ask.request_id] for ask in asks], device=self._model.device)
        for step in range(asks[0].limit):
            count = sum(ask.limit > step for ask in asks)
            logits, hidden = chain.advance(tokens[:count])
            chosen = logits.argmax(-1, keepdim=True)
            drawn, laws = wishes.draw(self._model.target_ids(chosen), logits.unsqueeze(1), step)
            tokens = drawn.squeeze(1)
            probs = wishes.score(logits.unsqueeze(1), chosen)
            if laws is not None:
                steps.laws.append(laws.squeeze(1))
            if probs is not None:
                steps.probs.append(probs.squeeze(1))
            first, second = logits.topk(2).values.unbind(-1)
            steps.tokens.append(tokens)
            steps.margins.append(first - second)
            steps.hidden.append(hidden)
            if width:
                best, scores = _options(logits, width)
                steps.best.append(self._model.target_ids(best))
                steps.scores.append(scores)
        return steps


def _options(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` best ids [m, width] and their log-probabilities, best first, the lowest id where they tie."""
    best, ids = logits.topk(min(width, logits.shape[-1]))
    ids, order = ids.sort(dim=-1)
    best, order = best.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order), best - logits.logsumexp(-1, keepdim=True)


def _laid_out(steps: Steps, order: Sequence[int], lengths: tuple[int, ...], drawn: tuple[int, ...]) -> DraftProposal:
    """`order` are the asks of the chains, `drawn` those among them whose tokens were drawn."""

    def gather(parts: list[torch.Tensor], fill: float) -> torch.Tensor:
        """Parts [m_j, ...] -> [n, k, ...]; `fill` where nothing was drafted."""
        return _stacked(parts, order, len(lengths), fill)

    laws = _stacked(steps.laws, range(len(drawn)), len(drawn), 0.0) if steps.laws else None
    return DraftProposal(
        tokens=gather(steps.tokens, -1),
        lengths=lengths,
        law=Delta() if laws is None else Dense(laws, drawn),
        marginal=Scalar(gather(steps.probs, 0.0)) if steps.probs else None,
        hidden=gather(steps.hidden, 0.0),
        margins=gather(steps.margins, float("-inf")),
        options=Options(gather(steps.best, 0), gather(steps.scores, float("-inf"))) if steps.best else None,
    )


def _stacked(parts: list[torch.Tensor], order: Sequence[int], count: int, fill: float) -> torch.Tensor:
    """[m_j, ...] for each step j -> [count, steps, ...]: row i of a part goes to row order[i]."""
    first = parts[0]
    whole = first.new_full((count, len(parts), *first.shape[1:]), fill)
    rows = torch.tensor(order, device=first.device)
    for step, part in enumerate(parts):
        whole[rows[: len(part)], step] = part
    return whole
