"""What the rules share: candidates in the order of their confidence.

c_(1) >= c_(2) >= ... are a row's candidates, surest first, ties by position; e_(n) = 1 - c_(n) are their errors. A rule
that commits "the surest n" says how many (`surest`); at least one is taken of every row that has a candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.protocols import Profile

NEVER = float("-inf")


def confidences(profile: Profile) -> Tensor:
    """[n, m] float64: -inf where there is no candidate, or where its confidence is no number."""
    known = profile.candidates & ~profile.confidence.isnan()
    return profile.confidence.double().where(known, NEVER)


def falling(profile: Profile) -> Tensor:
    """[n, m] float64: column j holds c_(j + 1) of its row; -inf behind the last candidate."""
    return confidences(profile).sort(dim=1, descending=True).values


def places(profile: Profile) -> Tensor:
    """[n, m] int64: each candidate's place in the order, from 0; others come after all candidates."""
    order = confidences(profile).argsort(dim=1, descending=True, stable=True)
    # A candidate may have a confidence of -inf: it still goes before what is no candidate.
    last = (~profile.candidates).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True)
    order = order.gather(1, last)
    numbers = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, numbers)


def surest(profile: Profile, counts: Tensor) -> Tensor:
    """[n, m] bool: the counts[i] surest candidates of row i, at least one; all where it has fewer."""
    return profile.candidates & (places(profile) < counts.clamp(min=1).unsqueeze(1))


def knob(profile: Profile, name: str) -> Tensor:
    """[n, 1] float64"""
    return profile.knobs[name].double().unsqueeze(1)


def numbers(rows: Tensor) -> Tensor:
    """1, 2, ... m along the columns of rows [n, m], float64."""
    return torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
