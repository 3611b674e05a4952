"""The randomness of a draft: its tokens, and the coins of its verification, as functions of request and position.

Every purpose has a stream of its own (`rng.Purpose`), keyed by the request's seed and the absolute position of the
token in question. What a round draws for the positions behind a rejection may have decided something all the same:
drafted tokens shape later drafts by the margins after them, and block verification looks at all coins of a round. So
the key also holds the place in the draft, and no two rounds draw anything from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.runtime.rng import Draw, Purpose, gumbel_rows, uniform_rows
from engine.runtime.sampler import SamplingState, first_argmax
from engine.runtime.truncation import NEVER, Truncation, truncates


def _ahead(state: SamplingState, purpose: Purpose, step: int) -> Draw:
    """The draw for the token `step` places behind the next one."""
    draw = state.draw(purpose)
    return draw._replace(position=draw.position + step, step=step)


class Coins:
    """See `protocols.Chance`. `states[i]` is that of draft i before its first token; drafts are chains of `width`."""

    def __init__(self, states: Sequence[SamplingState], width: int, device: torch.device) -> None:
        self._states = states
        self._width = width
        self._device = device

    def uniforms(self) -> Tensor:
        return uniform_rows([state.draw(Purpose.ACCEPT) for state in self._states], self._width, self._device)

    def draw(self, log_weights: Tensor, drafts: Tensor, steps: Tensor) -> Tensor:
        places = zip(drafts.tolist(), steps.tolist(), strict=True)
        draws = [_ahead(self._states[draft], Purpose.RESIDUAL, step) for draft, step in places]
        return first_argmax(log_weights + gumbel_rows(draws, log_weights.shape[1], log_weights.device))


class RequestSampler:
    """See `protocols.DraftSampler`. `states[i]` is that of ask i before its first drafted token.

    A request's temperature, min_p, top_k and top_p shape the draft's law; its penalties and bans do not: verifiers
    that weigh laws are exact under any proposal, and what the target bans never stands.
    """

    def __init__(self, states: Sequence[SamplingState], drawn: Sequence[bool] | None = None) -> None:
        """`drawn[i]`: are the drafts of ask i drawn? None: those of all requests that are not greedy."""
        self._states = states
        self._drawn = [not state.greedy for state in states] if drawn is None else drawn
        self._group: DrawnRows | None = None  # that of the last call: drafting token by token asks for it again

    def draws(self, ask: int) -> bool:
        return self._drawn[ask]

    def draw(self, logits: Tensor, asks: Sequence[int], steps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows whose logits are no numbers get any token, and a law that says so."""
        tokens = first_argmax(logits)
        laws = torch.zeros_like(logits).scatter_(1, tokens.unsqueeze(1), 1.0)
        group = self._group
        if group is None or group.asks != tuple(asks):
            group = self._group = DrawnRows(self._states, self._drawn, asks, logits)
        if group.rows:
            at = group.at
            largest = logits.gather(1, tokens.unsqueeze(1))[at]
            scores = group.cut_((logits[at] - largest).div_(group.temperature))
            draws = [_ahead(self._states[asks[row]], Purpose.DRAFT, steps[row]) for row in group.rows]
            drawn = first_argmax(scores + gumbel_rows(draws, scores.shape[1], scores.device))
            sound = largest.isfinite()
            tokens[at] = torch.where(sound.squeeze(1), drawn, tokens[at])
            laws[at] = torch.where(sound, scores.softmax(1), laws[at])
        return tokens, laws


class DrawnRows:
    """The rows of `asks` that are drawn and not just the most likely token, and how."""

    def __init__(
        self, states: Sequence[SamplingState], drawn: Sequence[bool], asks: Sequence[int], logits: Tensor
    ) -> None:
        device = logits.device
        self.asks = tuple(asks)
        self.rows = [row for row, ask in enumerate(asks) if drawn[ask]]
        self.at = torch.tensor(self.rows, dtype=torch.int64, device=device)
        params = [states[asks[row]].sampling for row in self.rows]
        self.temperature = torch.tensor([p.temperature for p in params], device=device).unsqueeze(1)
        cut = [place for place, p in enumerate(params) if truncates(p)]
        self._cut = torch.tensor(cut, dtype=torch.int64, device=device)
        self._truncation = Truncation([params[place] for place in cut], logits.shape[1], device)

    def cut_(self, scores: Tensor) -> Tensor:
        """`scores` [rows, vocabulary], with -inf where a row's truncations leave nothing; edited in place."""
        if self._cut.numel():
            some = scores[self._cut]
            kept = self._truncation.apply_(some)
            left = torch.full_like(some, NEVER)
            left[kept.rows, kept.ids] = some[kept.rows, kept.ids]
            scores[self._cut] = left
        return scores
