"""What relaxed verifiers commit of drawn drafts at one position, summed and not sampled, and how far that is from p.

The formulas are written down here once more, from the papers; laws, chances and biases come from `verify` alone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.protocols import DraftProposal, Scalar
from engine.verifiers.bounded import BoundedVerifier
from engine.verifiers.diversed import DiversedVerifier
from engine.verifiers.ensemble import EnsembleVerifier
from engine.verifiers.lenient import LenientVerifier
from engine.verifiers.top_k_gap import TopKGapVerifier
from engine.verifiers.typical import TypicalVerifier
from tests.enumeration import Exact, Given, exact, exact_diversed, rows_of
from tests.laws import assert_close, dirichlet, distances, pairs

SHAPES = [(size, concentration) for size in (2, 8) for concentration in (0.3, 1.0, 3.0)]


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("size", "concentration"), SHAPES)
def test_the_ensemble_of_drawn_drafts_is_the_mixture(size: int, concentration: float, weight: float) -> None:
    """out = w p + (1 - w) q; accepts 1 - w TV(p, q); is (1 - w) TV(p, q) off; these two always add up to the line."""
    log_p, g, p, q = pairs(size, concentration)
    found = exact(EnsembleVerifier(), log_p, g, {"target_weight": weight})
    away = distances(p, q)
    assert_close(found.law, weight * p + (1 - weight) * q)
    assert_close(found.rate, 1 - weight * away)
    assert found.bias is not None
    assert_close(found.bias, (1 - weight) * away)
    assert_close(1 - found.rate + distances(found.law, p), away)


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize(("size", "concentration"), SHAPES)
def test_bounded_drawn_drafts_use_up_epsilon_and_no_more(size: int, concentration: float, epsilon: float) -> None:
    log_p, g, p, q = pairs(size, concentration)
    found = exact(BoundedVerifier(), log_p, g, {"epsilon": epsilon})
    away = distances(p, q)
    spent = away.clamp(max=epsilon)
    assert found.bias is not None
    assert_close(found.bias, spent)
    assert_close(distances(found.law, p), spent)
    assert_close(found.rate, 1 - away + spent)
    assert_close(found.law, p + (q - p) * (spent / away).unsqueeze(1))


@pytest.mark.parametrize("lenience", [0.01, 0.5, 1.0])
@pytest.mark.parametrize(("size", "concentration"), SHAPES)
def test_lenient_drawn_drafts_are_capped_and_on_the_line(size: int, concentration: float, lenience: float) -> None:
    """A = min(q, p / l), rest norm((p - A)+); no token becomes likelier than p / l."""
    log_p, g, p, q = pairs(size, concentration)
    found = exact(LenientVerifier(), log_p, g, {"lenience": lenience})
    accepted = torch.minimum(q, p / lenience)
    rest = (p - accepted).clamp(min=0)
    assert_close(found.law, accepted + (1 - accepted.sum(1, keepdim=True)) * rest / rest.sum(1, keepdim=True))
    assert_close(found.rate, accepted.sum(1))
    assert (found.law <= p / lenience + 2e-6).all()
    on_the_line(found, p, q)


@pytest.mark.parametrize(("threshold", "alpha"), [(0.3, 0.09), (0.05, 100.0), (1.0, 0.8), (0.0, 1.0), (1.0, 100.0)])
@pytest.mark.parametrize(("size", "concentration"), SHAPES)
def test_typical_drawn_drafts(size: int, concentration: float, threshold: float, alpha: float) -> None:
    log_p, g, p, q = pairs(size, concentration)
    entropy = -(p * log_p).sum(1, keepdim=True)
    always = p > torch.minimum(torch.tensor(threshold), alpha * torch.exp(-entropy))
    found = exact(TypicalVerifier(), log_p, g, {"posterior_threshold": threshold, "posterior_alpha": alpha})
    assert_close(found.rate, torch.where(always, q, torch.minimum(p, q)).sum(1))
    on_the_line(found, p, q)


@pytest.mark.parametrize(("count", "gap"), [(1, 0.0), (2, 0.5), (8, 0.5), (1000, 100.0), (3, 2.0)])
@pytest.mark.parametrize(("size", "concentration"), SHAPES)
def test_top_k_gap_drawn_drafts(size: int, concentration: float, count: int, gap: float) -> None:
    log_p, g, p, q = pairs(size, concentration)
    always = top_and_near(log_p, count, gap)
    found = exact(TopKGapVerifier(), log_p, g, {"relaxed_topk": count, "relaxed_delta": gap})
    assert_close(found.rate, torch.where(always, q, torch.minimum(p, q)).sum(1))
    on_the_line(found, p, q)


def top_and_near(log_p: Tensor, count: int, gap: float) -> Tensor:
    better = (log_p.unsqueeze(1) > log_p.unsqueeze(2)).sum(2)  # than each token
    return (better < count) & (log_p.double() >= log_p.double().amax(1, keepdim=True) - gap)


def on_the_line(found: Exact, p: Tensor, q: Tensor) -> None:
    """Rejection and bias add up to TV(p, q), the least that they can (theory: at least, for any rule); bias is TV."""
    assert found.bias is not None
    assert_close(found.law.sum(1), torch.ones(len(p)))
    assert_close(found.bias, distances(found.law, p))
    assert_close(1 - found.rate + found.bias, distances(p, q))


@pytest.mark.parametrize(("size", "concentration"), SHAPES)
def test_diversed_mixes_by_what_its_head_says_at_each_position(size: int, concentration: float) -> None:
    log_p, g, p, q = pairs(size, concentration)
    said = torch.rand(len(p), generator=torch.Generator().manual_seed(2))
    found = exact_diversed(log_p, g, said, 0.4)
    weight = said.clamp(min=0.4).double()
    assert_close(found.law, weight.unsqueeze(1) * p + (1 - weight).unsqueeze(1) * q)
    assert found.bias is not None
    assert_close(found.bias, (1 - weight) * distances(p, q))
    assert_close(exact_diversed(log_p, g, said, 1.0).law, p)
    assert_close(exact_diversed(log_p, g, torch.full_like(said, 1.5), 0.0).law, p)
    silent = exact_diversed(log_p, g, torch.full_like(said, float("nan")), 0.0)
    assert_close(silent.law, p)  # a head that says nothing: the target's law, and no bias
    assert silent.bias is not None and not silent.bias.any()


def test_the_head_of_diversed_sees_the_row_that_predicts_a_token_and_the_drafts_state_of_it() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watching:
        def weights(self, hidden: Tensor, states: Tensor) -> Tensor:
            seen.append((hidden, states))
            return torch.full(hidden.shape[:2], 0.5)

    hidden, states = torch.randn(1, 2, 3), torch.randn(1, 3, 4)
    scores = Scalar(torch.full((1, 2), 0.5))
    proposal = DraftProposal(torch.tensor([[1, 0]]), (2,), marginal=scores, hidden=hidden)
    rows = rows_of(dirichlet(3, 4, 1.0, 1).unsqueeze(0), {"min_weight": 0.0}, states=states)
    coins = Given(torch.full((1, 2), 0.5, dtype=torch.float64))
    DiversedVerifier(Watching()).verify(proposal, replace(rows, chance=coins))
    assert len(seen) == 1 and torch.equal(seen[0][0], hidden) and torch.equal(seen[0][1], states[:, :2])
