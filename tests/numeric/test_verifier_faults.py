"""Planted faults: the checks that the verifiers pass refuse wrong ones. Both are run here, on the same cases.

Each fault is one that was found in an engine: a chosen token weighed as if it had been drawn, the target's law in place
of the residual, random numbers that serve two purposes, a weight that hangs on the drawn token, and, in block
verification, coins that stop at the first failure, a residual without its weight, and coins that are met again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.pipelines import coins as coins_module
from engine.pipelines.coins import Coins, RequestSampler
from engine.protocols import Chance, Delta, Dense, DraftProposal, Rows, Scalar, TargetRows, Verdict, Verifier
from engine.runtime.rng import Purpose
from engine.verifiers.block import BlockVerifier, weights
from engine.verifiers.diversed import DiversedVerifier
from engine.verifiers.ensemble import EnsembleVerifier
from engine.verifiers.kernel import Drafted, conclude, left_over
from engine.verifiers.rejection import RejectionVerifier
from tests.enumeration import HIGH, LOW, Head, chance_of, written
from tests.laws import REFUSED, Luck, dirichlet, many, noise, p_value, states, total_variation
from tests.numeric.test_verifier_chains import CLOSE, chained, target

Verify = Callable[[DraftProposal, TargetRows], Verdict]
N = 50_000
LOG_P, LOG_Q = dirichlet(2, 8, 1.0, seed=3)
P, Q = LOG_P.double().exp(), LOG_Q.exp().double()
W = 0.4
V = W * P + (1 - W) * Q


@dataclass(frozen=True)
class Faulty:
    """A verifier whose `verify` is another function."""

    inner: Verifier
    verify: Verify


def check(verify: Verify, law: Tensor, drawn: bool) -> float:
    """The p-value of what is committed at one position, under a law [vocabulary] that it should have."""
    value = p_value(sampled(verify, drawn), law.tolist())
    print(f"p = {value:.3g}")  # noqa: T201
    return value


def sampled(verify: Verify, drawn: bool, seed: int = 1) -> list[int]:
    """How often each token was committed at one position, in N draws of everything."""
    likely = Q.argmax()
    tokens = many(Q, N, seed + 9) if drawn else likely.expand(N)
    proposal_law = Dense(LOG_Q.exp().expand(N, 1, 8)) if drawn else Delta()
    hidden = torch.where(tokens < 4, 0.1, 0.7).view(N, 1, 1)
    marginal = Rows(LOG_Q.exp().expand(N, 1, 8))
    proposal = DraftProposal(tokens.unsqueeze(1), (1,) * N, proposal_law, marginal, hidden)
    knobs = {"target_weight": torch.full((N,), W), "min_weight": torch.zeros(N)}
    draws = torch.stack((many(P, N, seed + 2), torch.zeros(N, dtype=torch.int64)), 1)
    rows = TargetRows(draws, LOG_P.expand(N, 2, 8), Luck(N, 1, seed), knobs, states=torch.zeros(N, 2, 1))
    verdict = verify(proposal, rows)
    return torch.where(verdict.accepted > 0, tokens, verdict.next_token).bincount(minlength=8).tolist()


# ---- residuals -------------------------------------------------------------------------------------------


def test_a_chosen_token_weighed_as_if_it_were_drawn() -> None:
    """min(1, p / q), then (p - q)+, where x is the likeliest of q: the residual of another proposal."""

    def planted(proposal: DraftProposal, rows: TargetRows) -> Verdict:
        assert isinstance(proposal.marginal, Rows)
        return RejectionVerifier().verify(replace(proposal, law=Dense(proposal.marginal.probs)), rows)

    assert check(RejectionVerifier().verify, P, drawn=False) > REFUSED
    assert check(planted, P, drawn=False) < REFUSED


@dataclass(frozen=True)
class FromTheTarget:
    """See `protocols.Chance`: what replaces a token is drawn from p itself."""

    inner: Chance
    log_probs: Tensor

    def uniforms(self) -> Tensor:
        return self.inner.uniforms()

    def draw(self, log_weights: Tensor, drafts: Tensor, steps: Tensor) -> Tensor:
        return self.inner.draw(self.log_probs[drafts, steps].double(), drafts, steps)


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize(("verifier", "law"), [(RejectionVerifier(), P), (EnsembleVerifier(), V)])
def test_the_targets_law_in_place_of_the_residual(verifier: Verifier, law: Tensor, drawn: bool) -> None:
    def planted(proposal: DraftProposal, rows: TargetRows) -> Verdict:
        assert rows.log_probs is not None and rows.chance is not None
        return verifier.verify(proposal, replace(rows, chance=FromTheTarget(rows.chance, rows.log_probs)))

    if not drawn and verifier.needs_marginal:  # p with x raised to its mixture
        own = Q.argmax()
        law = (P * (1 - law[own]) / (1 - P[own])).scatter(0, own, law[own])
    assert check(verifier.verify, law, drawn) > REFUSED
    assert check(planted, law, drawn) < REFUSED


# ---- a weight that hangs on the drawn token --------------------------------------------------------------


def test_a_weight_that_hangs_on_the_drawn_token() -> None:
    """A head that has seen the token: what is committed is no mixture at all, whatever weight it is held against."""
    head = DiversedVerifier(Head())  # the proposal's hidden states say .1 of some tokens and .7 of others
    counts = sampled(head.verify, drawn=True)
    mixtures = [w * P + (1 - w) * Q for w in torch.linspace(0, 1, 101).tolist()]
    best = max(p_value(counts, law.tolist()) for law in mixtures)
    print(f"p = {best:.3g}")  # noqa: T201
    assert best < REFUSED

    def blind(proposal: DraftProposal, rows: TargetRows) -> Verdict:
        assert proposal.hidden is not None
        return head.verify(replace(proposal, hidden=torch.full_like(proposal.hidden, W)), rows)

    assert check(blind, V, drawn=True) > REFUSED


# ---- random numbers with two purposes --------------------------------------------------------------------

STREAMS = {
    "as they are": {},
    "coin and residual": {"RESIDUAL": Purpose.ACCEPT},
    "draft and residual": {"RESIDUAL": Purpose.DRAFT},
    "draft and coin": {"ACCEPT": Purpose.DRAFT},
}


@pytest.mark.parametrize("streams", STREAMS)
def test_streams_share_no_number(streams: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts, coins and residuals as pipelines draw them; p and q give 8 tokens opposite ranks, the hardest case.

    The planted ones take two of the three out of one stream.
    """
    n = 12_000
    purposes = {"DRAFT": Purpose.DRAFT, "ACCEPT": Purpose.ACCEPT, "RESIDUAL": Purpose.RESIDUAL, **STREAMS[streams]}
    monkeypatch.setattr(coins_module, "Purpose", SimpleNamespace(**purposes))
    p = torch.arange(8, 0, -1).float() / 36  # the coin has the bits of token 1's noise, which a residual must hold
    q = p.flip(0)
    seeds = states(n, temperature=1.0)
    sampler = RequestSampler(seeds)
    tokens, laws = sampler.draw(q.log().repeat(n, 1), range(n), [0] * n)
    drafted_law = p_value(tokens.bincount(minlength=8).tolist(), q.double().tolist())
    assert drafted_law > REFUSED
    rows = TargetRows(torch.zeros(n, 2, dtype=torch.int64), p.log().expand(n, 2, 8), Coins(seeds, 1, p.device))
    proposal = DraftProposal(tokens.unsqueeze(1), (1,) * n, Dense(laws.unsqueeze(1)))
    verdict = RejectionVerifier().verify(proposal, rows)
    found = torch.where(verdict.accepted > 0, tokens, verdict.next_token).bincount(minlength=8)
    value, away = p_value(found.tolist(), p.double().tolist()), total_variation(found / n, p.double())
    print(f"{streams}: p = {value:.3g}, TV = {away:.4f}")  # noqa: T201
    if streams == "as they are":
        assert value > REFUSED and away < 3 * noise(p.double(), n)
    else:
        assert value < REFUSED


# ---- blocks ----------------------------------------------------------------------------------------------


def first_failure(proposal: DraftProposal, rows: TargetRows) -> Verdict:
    assert isinstance(proposal.law, Dense)
    drafted = Drafted(proposal.law, proposal.tokens, rows)
    before, passes = weights(drafted)
    accepted = (drafted.coins.uniforms() < passes).long().cumprod(1).sum(1)
    return conclude(drafted, accepted, left_over(drafted.law, drafted.log_probs, before))


def no_weight(proposal: DraftProposal, rows: TargetRows) -> Verdict:
    assert isinstance(proposal.law, Dense)
    drafted = Drafted(proposal.law, proposal.tokens, rows)
    accepted = BlockVerifier().verify(proposal, rows).accepted
    return conclude(drafted, accepted, left_over(drafted.law, drafted.log_probs))


def one_by_one(proposal: DraftProposal, rows: TargetRows) -> Verdict:
    """The prefix passes by c alone: what token-wise chances would be."""
    assert isinstance(proposal.law, Dense)
    drafted = Drafted(proposal.law, proposal.tokens, rows)
    before, _ = weights(drafted)
    own = torch.cat((before[:, 1:], weights(drafted)[1][:, -1:]), 1)
    lengths = torch.arange(1, own.shape[1] + 1)
    accepted = ((drafted.coins.uniforms() < own) * lengths).amax(1)
    return conclude(drafted, accepted, left_over(drafted.law, drafted.log_probs, before))


@pytest.mark.parametrize(
    ("planted", "others"), [(first_failure, LOW), (no_weight, HIGH), (one_by_one, HIGH)], ids=lambda x: str(x)[:24]
)
def test_faults_of_block_verification(planted: Verify, others: float) -> None:
    """Against the enumerated law of 27 answers, which the real one meets to 5e-6."""

    def off(verify: Verify, others: float) -> float:
        verifier = Faulty(BlockVerifier(), verify)
        found = written(verifier, target, chained, others=others).law  # type: ignore[arg-type]
        return max(abs(chance - chance_of(target, text)) for text, chance in found.items())

    assert off(BlockVerifier().verify, HIGH) < CLOSE
    assert off(planted, others) > 100 * CLOSE


def test_scalars_are_what_opinions_are_given_as() -> None:
    """A check of the checks: the same case with the opinion as one number a token."""
    verify = EnsembleVerifier().verify
    own = Q.argmax()
    law = (P * (1 - V[own]) / (1 - P[own])).scatter(0, own, V[own])

    def scalar(proposal: DraftProposal, rows: TargetRows) -> Verdict:
        return verify(replace(proposal, marginal=Scalar(Q[own].float().expand(N, 1))), rows)

    assert check(scalar, law, drawn=False) == check(verify, law, drawn=False) > REFUSED
