"""What verifiers commit of chosen drafts at one position, summed and not sampled: chances, laws, and how far from p.

The rows of the table for block drafts: x is the draft's most likely token, q(x) what the draft thinks of it. Whatever
the rule, the law is p with x raised to its chance, and rejection and bias add up to 1 - p(x), the least that they can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_type_hints

import pytest
import torch
from torch import Tensor

from engine.protocols import Delta, Dense, DraftProposal, TargetRows, Verdict, Verifier
from engine.verifiers import kernel
from engine.verifiers.block import BlockVerifier
from engine.verifiers.bounded import BoundedVerifier
from engine.verifiers.ensemble import EnsembleVerifier
from engine.verifiers.kernel import Drafted
from engine.verifiers.lenient import LenientVerifier
from engine.verifiers.rejection import RejectionVerifier
from engine.verifiers.strict import StrictVerifier
from engine.verifiers.top_k_gap import TopKGapVerifier
from engine.verifiers.typical import TypicalVerifier
from tests.enumeration import Exact, exact, exact_diversed
from tests.laws import assert_close, dirichlet, distances, pairs

SHAPES = [*((size, concentration) for size in (2, 8) for concentration in (0.3, 1.0, 3.0)), (1000, 1.0)]
W = 0.6


def raised(p: Tensor, tokens: Tensor, mass: Tensor) -> Tensor:
    """p [cases, size] with one token of each case raised to a mass, the others scaled to make room for it."""
    scaled = p * ((1 - mass) / (1 - at(p, tokens))).unsqueeze(1)
    return scaled.scatter(1, tokens.unsqueeze(1), mass.unsqueeze(1))


def at(laws: Tensor, tokens: Tensor) -> Tensor:
    return laws.gather(1, tokens.unsqueeze(1)).squeeze(1)


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(1)


@dataclass(frozen=True)
class Rule:
    """`mass` of x, from p [cases, size], p(x) and q(x)."""

    verifier: Verifier
    mass: Callable[[Tensor, Tensor, Tensor], Tensor]
    knobs: dict[str, float] = field(default_factory=dict)


RULES = {
    "rejection": Rule(RejectionVerifier(), lambda p, px, qx: px),
    "block": Rule(BlockVerifier(), lambda p, px, qx: px),
    "ensemble": Rule(
        EnsembleVerifier(), lambda p, px, qx: torch.maximum(px, W * px + (1 - W) * qx), {"target_weight": W}
    ),
    "bounded": Rule(
        BoundedVerifier(), lambda p, px, qx: torch.maximum(px, torch.minimum(qx, px + 0.1)), {"epsilon": 0.1}
    ),
    # SGLang's threshold_acc is the same rule, its threshold being the lenience.
    "lenient": Rule(LenientVerifier(), lambda p, px, qx: (px / 0.4).clamp(max=1), {"lenience": 0.4}),
    "typical": Rule(
        TypicalVerifier(),
        lambda p, px, qx: torch.where(px > (0.7 * torch.exp(-entropy(p))).clamp(max=0.2), 1.0, px),
        {"posterior_threshold": 0.2, "posterior_alpha": 0.7},
    ),
    "top_k_gap": Rule(
        TopKGapVerifier(),
        lambda p, px, qx: torch.where(((p > px.unsqueeze(1)).sum(1) < 2) & (px >= p.amax(1) * 0.3), 1.0, px),
        {"relaxed_topk": 2, "relaxed_delta": -float(torch.tensor(0.3).log())},
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("size", "concentration"), SHAPES)
def test_the_law_is_that_of_the_target_with_one_token_raised(name: str, size: int, concentration: float) -> None:
    rule = RULES[name]
    log_p, g, p, q = pairs(size, concentration)
    for tokens, rows in ((q.argmax(1), True), (p.argmax(1), False), (torch.arange(len(p)) % size, False)):
        px, qx = at(p, tokens), at(q, tokens)
        found = exact(rule.verifier, log_p, tokens, rule.knobs, g if rows else at(g, tokens))
        raised_by(found, p, tokens, rule.mass(p, px, qx))
        assert (found.bias is None) == rule.verifier.card.lossless


def raised_by(found: Exact, p: Tensor, tokens: Tensor, mass: Tensor) -> None:
    px = at(p, tokens)
    assert_close(found.rate, mass)
    assert_close(found.law, raised(p, tokens, mass))
    bias = torch.zeros_like(px) if found.bias is None else found.bias
    assert_close(bias, distances(found.law, p))
    assert_close(1 - found.rate + bias, 1 - px)


@pytest.mark.parametrize(("size", "concentration"), SHAPES[:6])
def test_diversed_raises_by_what_its_head_says(size: int, concentration: float) -> None:
    log_p, g, p, q = pairs(size, concentration)
    tokens = q.argmax(1)
    said = torch.rand(len(p), generator=torch.Generator().manual_seed(3))
    weight, px, qx = said.clamp(min=0.4).double(), at(p, tokens), at(q, tokens)
    found = exact_diversed(log_p, tokens, said, 0.4, at(g, tokens))
    raised_by(found, p, tokens, torch.maximum(px, weight * px + (1 - weight) * qx))
    assert_close(exact_diversed(log_p, tokens, said * float("nan"), 0.0, g).law, p)


def test_a_draft_without_doubts_is_the_hard_ensemble() -> None:
    """q(x) = 1, for chosen tokens and as a one-hot law: 1 - w + w p(x), and (1 - w) (1 - p(x)) off."""
    log_p, _, p, q = pairs(8, 1.0)
    tokens = q.argmax(1)
    px, one_hot = at(p, tokens), torch.nn.functional.one_hot(tokens, 8)
    for drafts, marginal in ((tokens, torch.ones(len(p))), (one_hot.float(), None)):
        found = exact(EnsembleVerifier(), log_p, drafts, {"target_weight": W}, marginal)
        assert_close(found.law, W * p + (1 - W) * one_hot)
        assert_close(found.rate, 1 - W + W * px)
        assert found.bias is not None
        assert_close(found.bias, (1 - W) * (1 - px))


def test_the_soft_ensemble_of_a_chosen_token_wastes_bias() -> None:
    """What the scalar ensemble avoids: verifying x against v = w p + (1 - w) q itself accepts less at equal bias."""
    log_p, _, p, q = pairs(8, 1.0)
    tokens, v = q.argmax(1), W * p + (1 - W) * q
    soft = exact(RejectionVerifier(), v.log().float(), tokens)
    assert_close(soft.law, v)
    assert_close(soft.rate, at(v, tokens))
    spent = distances(soft.law, p)
    assert_close(spent, (1 - W) * distances(p, q))
    for case in range(len(p)):
        knobs = {"epsilon": float(spent[case])}
        scalar = exact(BoundedVerifier(), log_p[case : case + 1], tokens[case : case + 1], knobs, torch.ones(1))
        assert scalar.bias is not None
        assert float(scalar.bias) <= float(spent[case]) + 2e-6 and float(scalar.rate) >= float(soft.rate[case]) - 2e-6


@pytest.mark.parametrize(("size", "concentration"), SHAPES[:6])
def test_strict_accepts_the_targets_own_draw_alone(size: int, concentration: float) -> None:
    """Over all its draws: what is committed is that draw. So chosen tokens stand with p(x), drawn ones with sum p q."""
    log_p = dirichlet(1, size, concentration, 3)[0]
    draws, drafted = torch.cartesian_prod(torch.arange(size), torch.arange(size)).unbind(1)
    target = TargetRows(torch.stack((draws, torch.zeros_like(draws)), 1))
    verdict = StrictVerifier().verify(DraftProposal(drafted.unsqueeze(1), (1,) * size**2), target)
    stood = verdict.accepted == 1
    assert torch.equal(stood, draws == drafted)
    assert torch.equal(torch.where(stood, drafted, verdict.next_token), draws)
    p, q = log_p.double().exp(), dirichlet(1, size, concentration, 4)[0].double().exp()
    assert_close((p[draws] * q[drafted])[stood].sum(), (p * q).sum())


def test_what_the_draft_thinks_of_a_chosen_token_is_never_its_proposal_law() -> None:
    """The classic mistake, min(1, p / q) and norm((p - q)+), cannot be made: verdicts of rules without q ignore it.

    Those with q let it raise x, and the token that replaces x comes from p alone.
    """
    log_p, g, p, q = pairs(8, 1.0)
    tokens = q.argmax(1)
    wrong = torch.minimum(at(p, tokens) / at(q, tokens), torch.ones(len(p), dtype=torch.float64))
    for name, rule in RULES.items():
        found = exact(rule.verifier, log_p, tokens, rule.knobs, g)
        assert float((found.rate - wrong).abs().max()) > 0.1, name
        if not rule.verifier.needs_marginal:
            blind = exact(rule.verifier, log_p, tokens, rule.knobs)
            assert torch.equal(found.law, blind.law) and torch.equal(found.rate, blind.rate)
        others = found.law.scatter(1, tokens.unsqueeze(1), 0.0)
        others = others / others.sum(1, keepdim=True).clamp(min=1e-9)
        want = p.scatter(1, tokens.unsqueeze(1), 0.0)
        want = want / want.sum(1, keepdim=True)
        fell = found.rate < 1 - 1e-3
        assert_close(others[fell], want[fell])


def test_rules_that_need_the_drafts_opinion_do_not_go_without() -> None:
    log_p, _, _, q = pairs(8, 1.0, cases=1)
    with pytest.raises(AssertionError, match="score"):
        exact(EnsembleVerifier(), log_p, q.argmax(1), {"target_weight": 0.5})
    nonsense = torch.full((1,), float("nan"))
    found = exact(EnsembleVerifier(), log_p, q.argmax(1), {"target_weight": 0.5}, nonsense)
    assert_close(found.law, log_p.double().exp())


def test_ratios_are_for_drawn_tokens_by_type() -> None:
    """What mypy holds everybody to: no ratio without a Dense law, no law of the draft where tokens were chosen."""
    assert get_type_hints(kernel.log_ratios)["law"] is Dense
    assert get_type_hints(kernel.left_over)["law"] is Dense
    assert all(
        get_type_hints(made)["drafted"] == Drafted[Dense] for made in (kernel.drawn, kernel.mixed, kernel.lifted)
    )
    assert get_type_hints(kernel.chosen) == {"drafted": Drafted[Delta], "wanted": Tensor | None, "return": Verdict}
