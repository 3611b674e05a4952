"""Comparing what was drawn with the law that it should have, and coins for many drafts at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.protocols import Delta, Dense, DraftProposal, Scalar, TargetRows, Verifier
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


def noise(law: Tensor, n: int) -> float:
    """The total variation that n draws have from their own law, on average."""
    return float((law * (1 - law) / n).sqrt().sum()) * math.sqrt(2 / math.pi) / 2


def dirichlet(rows: int, size: int, concentration: float, seed: int) -> Tensor:
    """Log-laws [rows, size] float32."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch._standard_gamma(torch.full((rows, size), concentration, dtype=torch.float64), generator)
    return weights.clamp(min=1e-30).log().log_softmax(1).float()


def pairs(size: int, concentration: float, cases: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p and q float32, and p and q of the same precision as float64: [cases, size] each."""
    log_p, log_q = dirichlet(2 * cases, size, concentration, seed=size).view(2, cases, size)
    return log_p, log_q.exp(), log_p.double().exp(), log_q.exp().double()


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Total variation of the laws in the last dimension."""
    return (a - b).abs().sum(-1) / 2


def assert_close(a: Tensor, b: Tensor) -> None:
    """What float32 laws allow."""
    assert torch.allclose(a.double(), b.double(), rtol=0, atol=2e-6), float((a - b).abs().max())


def many(law: Tensor, n: int, seed: int) -> Tensor:
    """n tokens of one law."""
    return torch.multinomial(law.double(), n, True, generator=torch.Generator().manual_seed(seed))


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


def committed(
    verifier: Verifier,
    log_p: Tensor,
    law: Delta | Dense,
    drafted: Tensor,
    seed: int,
    knobs: Mapping[str, float] | None = None,
    marginal: Tensor | None = None,
    said: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """First committed tokens [n], and which drafts stood [n], of n drafts of one token each under the target's law p.

    What follows a draft that stands is the target's own draw, of another law. `marginal` [n, 1] is what the draft
    thinks of its tokens, `said` stands in its hidden states.
    """
    n, size = len(drafted), len(log_p)
    log_probs = torch.stack((log_p, log_p.flip(0))).expand(n, 2, size)
    draws = torch.stack([many(log_p.double().exp(), n, seed + 3), many(log_p.double().exp().flip(0), n, seed + 2)], 1)
    values = {name: torch.full((n,), value, dtype=torch.float64) for name, value in (knobs or {}).items()}
    scores = None if marginal is None else Scalar(marginal)
    proposal = DraftProposal(drafted.unsqueeze(1), (1,) * n, law, scores, hidden=torch.full((n, 1, 1), said))
    target = TargetRows(draws, log_probs, Luck(n, 1, seed + 1), values, states=torch.zeros(n, 2, 1))
    verdict = verifier.verify(proposal, target)
    stood = verdict.accepted > 0
    assert torch.equal(verdict.path.squeeze(1), torch.where(stood, 0, -1))
    assert torch.equal(verdict.next_token[stood], draws[stood, 1])
    return torch.where(stood, drafted, verdict.next_token), stood


def draw_rows(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """A token from each row of unnormalised laws [n, vocabulary]."""
    race = torch.empty(log_weights.shape, dtype=torch.float64).exponential_(generator=generator)
    return (log_weights.double().exp() / race).argmax(1)


def states(n: int, **sampling: object) -> list[SamplingState]:
    """Requests of n seeds, at different positions."""
    params = SamplingParams(max_tokens=1, **sampling)  # type: ignore[arg-type]
    return [SamplingState(Request(f"r{i}", (0,) * (1 + i % 7), replace(params, seed=i))) for i in range(n)]
