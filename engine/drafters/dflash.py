"""Block-diffusion drafting (DFlash, arXiv 2602.06036): the tokens of a whole block from one pass of a draft network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from engine.drafters.wishes import Wishes
from engine.kernels.choose import choose
from engine.protocols import BlockDraftModel, Delta, Dense, DraftAsk, DraftProposal, DraftSampler, Options, Scalar

if TYPE_CHECKING:
    from engine.runtime.batch import DeviceBatch

LANES = 64  # logits are looked through in pieces of this size: much faster than one by one


@dataclass(frozen=True, slots=True, eq=False)
class Walked:
    """What came of the positions of n blocks. `laws` are those of the drawn ones alone, `probs` of the chosen ones."""

    tokens: torch.Tensor  # [n, k]
    margins: torch.Tensor  # [n, k]
    laws: torch.Tensor | None  # [drawn, k, vocabulary]
    probs: torch.Tensor | None  # [n, k]


class DFlashDrafter:
    """See `protocols.Drafter`.

    Drafts for requests whose step feeds one token before the draft: the network's context then holds all that comes
    before. Its block is always whole, whatever the limit: its slots see each other, so a shorter one would say
    something else.
    """

    scores = True

    def __init__(self, model: BlockDraftModel) -> None:
        self.most = model.most
        self._model = model
        self._anchors: dict[str, int] = {}  # last committed tokens

    def admit(self, request_id: str, tokens: Sequence[int]) -> None:
        self._anchors[request_id] = tokens[-1]

    def drop(self, request_id: str) -> None:
        self._anchors.pop(request_id, None)

    def commit(self, request_id: str, tokens: Sequence[int]) -> None:
        if tokens:
            self._anchors[request_id] = tokens[-1]

    @torch.inference_mode()
    def propose(self, asks: Sequence[DraftAsk], sampler: DraftSampler | None = None, width: int = 0) -> DraftProposal:
        chosen = [index for index, ask in enumerate(asks) if ask.limit > 0 and ask.fed == 1]
        lengths = [0] * len(asks)
        for index in chosen:
            lengths[index] = min(asks[index].limit, self.most)
        if not chosen:
            return DraftProposal(torch.empty(len(asks), 0, dtype=torch.int64), tuple(lengths))
        anchors = [self._anchors[asks[index].request_id] for index in chosen]
        logits, hidden = self._model.blocks(anchors, [asks[index] for index in chosen])
        options = _options(logits, self._model, width) if width else None
        wishes = Wishes(asks, chosen, sampler, self._model.widen, logits.device)
        walk = self._in_turn if self._model.sequential else self._at_once
        walked = walk(logits, hidden, torch.tensor(anchors, device=logits.device), wishes)
        tokens, device = walked.tokens, logits.device
        if any(lengths[index] < tokens.shape[1] for index in chosen):
            limits = torch.tensor([lengths[index] for index in chosen], device=device)
            tokens = tokens.masked_fill(torch.arange(tokens.shape[1], device=device) >= limits[:, None], -1)
        place = _Places(len(asks), chosen, device)
        return DraftProposal(
            tokens=place(tokens, -1),
            lengths=tuple(lengths),
            law=Delta() if walked.laws is None else Dense(walked.laws, wishes.drawn),
            marginal=None if walked.probs is None else Scalar(place(walked.probs, 0.0)),
            hidden=place(hidden, 0.0),
            margins=place(walked.margins, float("-inf")),
            options=None if options is None else Options(place(options[0], 0), place(options[1], float("-inf"))),
        )

    @property
    def block_length(self) -> int:
        """See `runtime.uniform_round.DeviceDraft`, and so are the next two."""
        return self._model.block_length

    @property
    def spare_blocks(self) -> tuple[int, int]:
        return self._model.scratch

    def draft_batch(self, batch: DeviceBatch, anchors: torch.Tensor, count: int) -> torch.Tensor:
        """The likeliest tokens."""
        logits, hidden = self._model.blocks_of(batch, count)
        if not self._model.sequential:
            return self._model.target_ids(logits.argmax(-1))
        tokens = [anchors]
        for step in range(count):
            refined = self._model.refine(logits[:, step], hidden[:, step], tokens[-1])
            tokens.append(self._model.target_ids(refined.argmax(-1)))
        return torch.stack(tokens[1:], dim=1)

    def _at_once(self, logits: torch.Tensor, hidden: torch.Tensor, before: torch.Tensor, wishes: Wishes) -> Walked:
        """`before` [n] are the anchors."""
        best, margins = best_two(logits)
        tokens, laws = wishes.draw(self._model.target_ids(best), logits, 0)
        previous = torch.cat((before[:, None], tokens[:, :-1]), dim=1)
        trained = self._model.confidence(hidden.flatten(0, 1), previous.flatten())
        margins = margins if trained is None else trained.view(margins.shape)
        return Walked(tokens, margins, laws, wishes.score(logits, best))

    def _in_turn(self, logits: torch.Tensor, hidden: torch.Tensor, before: torch.Tensor, wishes: Wishes) -> Walked:
        """`_at_once` where each token changes the logits of the next."""
        tokens, margins, laws, probs = [], [], [], []
        for step in range(logits.shape[1]):
            trained = self._model.confidence(hidden[:, step], before)
            refined = self._model.refine(logits[:, step], hidden[:, step], before).unsqueeze(1)
            best, distance = best_two(refined)
            drawn, law = wishes.draw(self._model.target_ids(best), refined, step)
            before = drawn.squeeze(1)
            tokens.append(drawn)
            margins.append(distance if trained is None else trained.unsqueeze(1))
            laws += [] if law is None else [law]
            scored = wishes.score(refined, best)
            probs += [] if scored is None else [scored]
        return Walked(
            torch.cat(tokens, 1),
            torch.cat(margins, 1),
            torch.cat(laws, 1) if laws else None,
            torch.cat(probs, 1) if probs else None,
        )


class _Places:
    """Spreads rows of the drafted requests over those of all requests."""

    def __init__(self, count: int, chosen: Sequence[int], device: torch.device) -> None:
        self._rows = None if len(chosen) == count else torch.tensor(chosen, device=device)
        self._count = count

    def __call__(self, values: torch.Tensor, filler: float) -> torch.Tensor:
        if self._rows is None:
            return values
        spread = values.new_full((self._count, *values.shape[1:]), filler)
        spread[self._rows] = values
        return spread


def best_two(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The index of the largest logit, the lowest where several are, and its distance to the next; of [..., vocabulary].

    The distance is 0 where the largest is no number.
    """
    if logits.is_cpu:
        found = choose(logits.reshape(-1, logits.shape[-1]), second=True)
        assert found.second is not None
        with np.errstate(invalid="ignore"):
            distances = torch.from_numpy(np.nan_to_num(found.largest - found.second, nan=0.0))
        return torch.from_numpy(found.tokens).view(logits.shape[:-1]), distances.view(logits.shape[:-1])
    if logits.shape[-1] % LANES:
        logits = F.pad(logits, (0, -logits.shape[-1] % LANES), value=float("-inf"))
    pieces = logits.view(*logits.shape[:-1], -1, LANES)
    peaks = pieces.amax(-1)
    piece = peaks.argmax(-1, keepdim=True)
    lanes = pieces.gather(-2, piece.unsqueeze(-1).expand(*piece.shape, LANES)).squeeze(-2)
    lane = lanes.argmax(-1, keepdim=True)
    first, low = lanes.gather(-1, lane), float("-inf")
    second = torch.maximum(peaks.scatter(-1, piece, low).amax(-1), lanes.scatter(-1, lane, low).amax(-1))
    distance = torch.nan_to_num(first.squeeze(-1) - second, nan=0.0)
    return (piece * LANES + lane).squeeze(-1), distance


def _options(logits: torch.Tensor, model: BlockDraftModel, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` best tokens of each position and their log-probabilities, best first, then the lowest id."""
    best, ids = logits.topk(min(width, logits.shape[-1]), dim=-1)
    ids, order = ids.sort(dim=-1)
    best, order = best.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    log_probs = best - logits.logsumexp(-1, keepdim=True)
    return model.target_ids(ids.gather(-1, order)), log_probs
