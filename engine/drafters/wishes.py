"""What requests want of a draft network beside its likeliest tokens: drawn tokens, or the marginals of chosen ones."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

from engine.protocols import DraftAsk, DraftSampler


class Wishes:
    """Row i of a pass is about asks[places[i]]; later passes may have fewer rows, but the same ones first."""

    def __init__(
        self,
        asks: Sequence[DraftAsk],
        places: Sequence[int],
        sampler: DraftSampler | None,
        widen: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> None:
        """`widen`: logits over the draft's vocabulary to logits over the target's."""
        self._places = places
        self._sampler = sampler
        self._widen = widen
        self._drawn = [row for row, place in enumerate(places) if sampler is not None and sampler.draws(place)]
        self._scored = [row for row, place in enumerate(places) if asks[place].temperature > 0]
        temperatures = [asks[places[row]].temperature for row in self._scored]
        self._temperature = torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None, None]

    @property
    def drawn(self) -> tuple[int, ...]:
        """The places of the asks whose tokens are drawn, in the order of their rows."""
        return tuple(self._places[row] for row in self._drawn)

    def draw(self, tokens: torch.Tensor, logits: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens [m, s] with the drawn ones in their places, and the laws of these: [drawn, s, vocabulary] float32.

        `logits` [m, s, draft vocabulary] are those of drafted positions first, first + 1, ...
        """
        count, steps = tokens.shape
        rows = _below(self._drawn, count)
        if self._sampler is None or not rows:
            return tokens, None
        part, at = (logits, None) if len(rows) == count else _picked(logits, rows)
        asks = [self._places[row] for row in rows for _ in range(steps)]
        drawn, laws = self._sampler.draw(
            self._widen(part.flatten(0, 1)), asks, [*range(first, first + steps)] * len(rows)
        )
        drawn = drawn.view(-1, steps)
        return drawn if at is None else tokens.index_copy(0, at, drawn), laws.view(len(rows), steps, -1)

    def score(self, logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor | None:
        """The draft's probability [m, s] float32 of `best` [m, s], ids of its own vocabulary, at the asked temperature.

        0 where nobody asked, or where it is no number; None where nobody asks at all. `logits` [m, s, draft vocabulary]
        float32.
        """
        if not self._scored:
            return None
        rows = _below(self._scored, len(logits))
        probs = logits.new_zeros(best.shape)
        if rows:
            part, at = _picked(logits, rows)
            # Not logsumexp: the order of its sum may depend on the batch.
            laws = part.div_(self._temperature[: len(rows)]).softmax(-1)
            probs[at] = laws.gather(-1, best[at].unsqueeze(-1)).squeeze(-1).nan_to_num_(nan=0.0)
        return probs


def _below(rows: list[int], count: int) -> list[int]:
    return rows if not rows or rows[-1] < count else rows[: bisect_left(rows, count)]


def _picked(values: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of these rows, and their indices."""
    at = torch.tensor(rows, device=values.device)
    return values.index_select(0, at), at
