"""min_p, top_k and top_p, one after the other, each on what the one before it left (as Hugging Face's warpers do).

Which tokens stay depends only on the values of the row and, among equal values, on the ids (lowest first): a row's
result does not depend on the batch, nor on how far its values had to be sorted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.types import SamplingParams

NEVER = float("-inf")
_LOWEST = torch.finfo(torch.float32).min
_WINDOWS = (64, 4096)  # how many of a row's largest values are sorted before all of them are


def truncates(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


class Kept(NamedTuple):
    """The tokens that stay, by row, then id: `rows` and `ids` [total] int64, `sizes` [m] int64 tokens per row."""

    rows: Tensor
    ids: Tensor
    sizes: Tensor


class Truncation:
    """The limits of m rows. Scores are tempered logits [m, V] float32 whose largest is 0 in each row."""

    def __init__(self, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> None:
        limits = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        floors = [math.log(p.min_p) if p.min_p > 0 else NEVER for p in params]
        cuts = [row for row, p in enumerate(params) if limits[row] < vocab_size or p.top_p < 1]
        self._vocab_size = vocab_size
        self._limit = torch.tensor(limits, dtype=torch.int64, device=device)
        self._top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
        self._floor = torch.tensor(floors, dtype=torch.float32, device=device).unsqueeze(1)
        self._has_floor = any(p.min_p > 0 for p in params)
        self._cuts = torch.tensor(cuts, dtype=torch.int64, device=device)
        self._needs_mass = any(limits[row] == vocab_size for row in cuts)

    def apply_(self, scores: Tensor) -> Kept:
        """What stays of `scores`; these are edited under a min_p. A row with NaN keeps nothing."""
        if self._has_floor:
            scores.masked_fill_(scores < self._floor, NEVER)
        thresholds, sizes = self._thresholds(scores)
        kept = _positions(scores >= thresholds.clamp(min=_LOWEST).unsqueeze(1))
        surplus = torch.where(thresholds == NEVER, 0, kept.sizes - sizes).clamp_(min=0)
        if bool(surplus.any()):
            return _drop_last_ties(kept, scores, thresholds, surplus)
        return kept

    def _thresholds(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Per row the smallest value that stays [m] float32 (-inf: all), and how many tokens do [m] int64."""
        thresholds = scores.new_full((len(scores),), NEVER)
        sizes = torch.full_like(self._limit, self._vocab_size)
        pending = self._cuts
        if not pending.numel():
            return thresholds, sizes
        mass = mass_of(scores) if self._needs_mass else torch.ones_like(self._top_p)
        for window in (*(size for size in _WINDOWS if size < self._vocab_size), self._vocab_size):
            values = _largest(scores if len(pending) == len(scores) else scores[pending], window)
            size, settled = self._sizes(values, pending, mass[pending])
            rows = pending[settled]
            sizes[rows] = size[settled]
            thresholds[rows] = values[settled].gather(1, (size[settled] - 1).unsqueeze(1)).squeeze(1)
            pending = pending[~settled]
            if not pending.numel():
                break
        return thresholds, sizes

    def _sizes(self, values: Tensor, rows: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that stay, given a row's largest values in order; and whether those values are enough to tell."""
        window = values.shape[1]
        limit, top_p = self._limit[rows], self._top_p[rows]
        cumulative = values.exp().double().cumsum(1)
        last = limit.clamp(max=window) - 1
        mass = torch.where(limit < self._vocab_size, cumulative.gather(1, last.unsqueeze(1)).squeeze(1), mass)
        nucleus = (cumulative < (top_p * mass).unsqueeze(1)).sum(1) + 1
        size = torch.where(top_p < 1, torch.minimum(nucleus, limit), limit)
        return size, (size <= window) & ((limit <= window) | (limit == self._vocab_size))


def mass_of(scores: Tensor) -> Tensor:
    """The sum of exp of each row [m] float64, of scores [m, V] whose largest is 0."""
    return scores.softmax(1).amax(1).double().reciprocal()  # softmax, for its sums do not depend on the batch


def _largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, largest first."""
    if count > _WINDOWS[0] and values.device.type == "cpu":  # numpy's vectorised sorts are several times faster
        some = np.partition(values.numpy(), -count, axis=1)[:, -count:] if count < values.shape[1] else values.numpy()
        return torch.from_numpy(np.ascontiguousarray(np.sort(some, axis=1)[:, ::-1]))
    return values.topk(count, dim=1).values


def _positions(mask: Tensor) -> Kept:
    if mask.device.type == "cpu":  # likewise
        flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    else:
        flat = mask.view(-1).nonzero().squeeze(1)
    rows = flat // mask.shape[1]
    return Kept(rows, flat % mask.shape[1], rows.bincount(minlength=len(mask)))


def _drop_last_ties(kept: Kept, scores: Tensor, thresholds: Tensor, surplus: Tensor) -> Kept:
    """Remove each row's last `surplus` tokens among those that equal its threshold."""
    tied = scores[kept.rows, kept.ids] == thresholds[kept.rows]
    per_row = torch.zeros_like(kept.sizes).index_add_(0, kept.rows, tied.long())
    rank = tied.cumsum(0) - (per_row.cumsum(0) - per_row)[kept.rows]  # from 1, among the row's tied tokens
    stays = ~tied | (rank <= (per_row - surplus)[kept.rows])
    return Kept(kept.rows[stays], kept.ids[stays], kept.sizes - surplus)
