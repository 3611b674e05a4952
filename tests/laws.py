"""Comparing what was drawn with the law that it should have, and coins for many drafts at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.runtime.sampler import SamplingState
from engine.types import Request, SamplingParams

REFUSED = 1e-6  # p-values under this fail; seeds are fixed, so a test that passes goes on passing


def p_value(counts: Sequence[int], law: Sequence[float]) -> float:
    """Of a chi-square test of `counts` against `law`; cells that expect under 5 are pooled. 0 for the impossible."""
    seen, expected = np.array(counts, dtype=np.float64), np.array(law, dtype=np.float64)
    assert abs(expected.sum() - 1) < 1e-4, expected.sum()
    if seen[expected == 0].any():
        return 0.0
    order = np.argsort(expected)
    seen, expected = seen[order], expected[order] / expected.sum() * seen.sum()
    small = max(int((expected < 5).sum()), 1)
    while small < len(expected) and expected[:small].sum() < 5:
        small += 1
    seen = np.array([seen[:small].sum(), *seen[small:]])
    expected = np.array([expected[:small].sum(), *expected[small:]])
    if len(seen) == 1:
        return 1.0
    statistic = float(((seen - expected) ** 2 / expected).sum())
    halves = torch.tensor([(len(seen) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def rate_p_value(successes: int, trials: int, rate: float) -> float:
    """Two-sided, of a count that should be binomial; by the normal approximation."""
    deviation = math.sqrt(max(trials * rate * (1 - rate), 0.25))
    return math.erfc(max(abs(successes - trials * rate) - 0.5, 0.0) / deviation / math.sqrt(2))


def total_variation(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / 2)


class Luck:
    """See `protocols.Chance`: independent coins for n drafts, with no stream to set up for each of them."""

    def __init__(self, n: int, width: int, seed: int) -> None:
        self._shape = (n, width)
        self._generator = torch.Generator().manual_seed(seed)

    def uniforms(self) -> Tensor:
        return torch.rand(self._shape, dtype=torch.float64, generator=self._generator)

    def draw(self, log_weights: Tensor, drafts: Tensor, steps: Tensor) -> Tensor:
        assert log_weights.dtype == torch.float64 and len(log_weights) == len(drafts) == len(steps)
        assert not log_weights.isnan().any()
        return draw_rows(log_weights, self._generator)


def draw_rows(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """A token from each row of unnormalised laws [n, vocabulary]."""
    race = torch.empty(log_weights.shape, dtype=torch.float64).exponential_(generator=generator)
    return (log_weights.double().exp() / race).argmax(1)


def states(n: int, **sampling: object) -> list[SamplingState]:
    """Requests of n seeds, at different positions."""
    params = SamplingParams(max_tokens=1, **sampling)  # type: ignore[arg-type]
    return [SamplingState(Request(f"r{i}", (0,) * (1 + i % 7), replace(params, seed=i))) for i in range(n)]
