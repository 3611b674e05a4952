"""Verifiers at one position: what they commit has the target's law, and drafts stand as often as theory says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.pipelines.coins import Coins
from engine.protocols import Delta, Dense, DraftProposal, TargetRows, Verifier
from engine.registry import VERIFIERS, resolve
from engine.verifiers.rejection import RejectionVerifier, acceptance, residual
from engine.verifiers.strict import StrictVerifier
from tests.laws import REFUSED, Luck, draw_rows, p_value, rate_p_value, states, total_variation

NEVER = float("-inf")
CPU = torch.device("cpu")
SMALLEST = 2.0**-53  # of the coins


def dirichlet(rows: int, size: int, concentration: float, seed: int) -> Tensor:
    """Log-laws [rows, size] float32."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch._standard_gamma(torch.full((rows, size), concentration, dtype=torch.float64), generator)
    return weights.clamp(min=1e-30).log().log_softmax(1).float()


def dense(log_laws: Tensor) -> Dense:
    """[n, k, vocabulary]"""
    return Dense(log_laws.exp())


def one_hot(tokens: Tensor, size: int) -> Dense:
    return Dense(torch.nn.functional.one_hot(tokens.clamp(min=0), size).float())


def many(log_law: Tensor, n: int, seed: int) -> Tensor:
    """n tokens of one law."""
    return torch.multinomial(log_law.double().exp(), n, True, generator=torch.Generator().manual_seed(seed))


class Scripted:
    """See `protocols.Chance`: the same coin for all, and the likeliest residual token."""

    def __init__(self, coin: float, shape: tuple[int, int]) -> None:
        self._coins = torch.full(shape, coin, dtype=torch.float64)

    def uniforms(self) -> Tensor:
        return self._coins

    def draw(self, log_weights: Tensor, drafts: Tensor, steps: Tensor) -> Tensor:
        return log_weights.argmax(1)


# ---- sampled ---------------------------------------------------------------------------------------------


def committed(verifier: Verifier, p: Tensor, law: Delta | Dense, drafted: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """First committed tokens [n], and which drafts stood [n], of n drafts of one token each under the target's law p.

    `p` [vocabulary] log-probabilities. What follows a draft that stands is the target's own draw.
    """
    n, size = len(drafted), len(p)
    log_probs = torch.stack((p, p.flip(0))).expand(n, 2, size)
    draws = torch.stack([many(p, n, seed), many(p.flip(0), n, seed + 2)], dim=1)
    proposal = DraftProposal(drafted.unsqueeze(1), (1,) * n, law)
    verdict = verifier.verify(proposal, TargetRows(draws, log_probs, Luck(n, 1, seed + 1)))
    stood = verdict.accepted > 0
    assert torch.equal(verdict.path.squeeze(1), torch.where(stood, 0, -1))
    assert torch.equal(verdict.next_token[stood], draws[stood, 1])
    return torch.where(stood, drafted, verdict.next_token), stood


@pytest.mark.parametrize("size", [2, 8, 1000])
@pytest.mark.parametrize("concentration", [0.3, 1.0, 3.0])
def test_one_position_has_the_targets_law(concentration: float, size: int) -> None:
    """N is 200,000, for the large vocabulary 10,000, of each verifier and kind of draft."""
    p, q = dirichlet(2, size, concentration, seed=size)
    likely, n, part = q.argmax(), 10_000 if size == 1000 else 200_000, 10_000
    law, drawn_law = p.double().exp(), q.double().exp()
    # verifier, proposal law, its drafts, how often they should stand
    sampled = many(q, n, 9)
    chosen = likely.expand(n)
    overlap = 1 - total_variation(law, drawn_law)
    cases: list[tuple[Verifier, bool, Tensor, float]] = [
        (RejectionVerifier(), True, sampled, overlap),
        (RejectionVerifier(), False, chosen, float(law[likely])),
        (StrictVerifier(), False, chosen, float(law[likely])),
        (StrictVerifier(), True, sampled, float((law * drawn_law).sum())),
    ]
    for place, (verifier, drawn, drafted, rate) in enumerate(cases):
        counts, stood = torch.zeros(size, dtype=torch.int64), 0
        for start in range(0, n, part):
            proposal_law = Dense(q.exp().expand(part, 1, size)) if drawn else Delta()
            tokens, stands = committed(verifier, p, proposal_law, drafted[start : start + part], 100 * place + start)
            counts += tokens.bincount(minlength=size)
            stood += int(stands.sum())
        assert p_value(counts.tolist(), law.tolist()) > REFUSED, place
        assert rate_p_value(stood, n, rate) > REFUSED, (place, stood / n, rate)


def test_the_law_test_finds_the_classic_mistake() -> None:
    """A chosen token that is weighed as if it had been drawn: min(1, p/q), then (p - q)+."""
    p, q = dirichlet(2, 8, 1.0, seed=8)
    chosen = q.argmax().expand(20_000)
    tokens, _ = committed(RejectionVerifier(), p, Dense(q.exp().expand(20_000, 1, 8)), chosen, 1)
    assert p_value(tokens.bincount(minlength=8).tolist(), p.double().exp().tolist()) < REFUSED


# ---- exact -----------------------------------------------------------------------------------------------


def enumerated(p: Tensor, q: Tensor | None, token: int = 0) -> tuple[Tensor, float]:
    """The law of the committed token [vocabulary], and the chance of acceptance, summed over all that can be drafted.

    `p` and `q` [vocabulary] log-probabilities; q None: `token` was chosen.
    """
    size = len(p)
    tokens = torch.arange(size) if q is not None else torch.tensor([token])
    weights = q.exp().double() if q is not None else torch.ones(1, dtype=torch.float64)
    law = Delta() if q is None else Dense(q.exp().expand(size, 1, size))
    proposal = DraftProposal(tokens.unsqueeze(1), (1,) * len(tokens), law)
    log_probs = p.expand(len(tokens), 2, size)
    target = TargetRows(torch.zeros(len(tokens), 2, dtype=torch.int64), log_probs)
    stands = acceptance(proposal, target)
    assert stands.dtype == torch.float64
    stood = weights * stands.squeeze(1)
    rejected = residual(proposal, log_probs, torch.tensor([0]), torch.tensor([0]))
    assert rejected.dtype == torch.float64 and not rejected.isnan().any()
    out = (1 - stood.sum()) * rejected[0].softmax(0)
    return out.index_add(0, tokens, stood), float(stood.sum())


@pytest.mark.parametrize("size", [2, 8, 1000])
@pytest.mark.parametrize("concentration", [0.03, 0.3, 1.0, 3.0])
def test_acceptance_is_one_minus_the_distance_and_the_law_is_exact(concentration: float, size: int) -> None:
    """Summed, not sampled: P(reject) + TV(out, p) = TV(p, q), with TV(out, p) = 0."""
    for seed in range(20):
        p, q = dirichlet(2, size, concentration, seed)
        if seed % 2 and size > 2:  # supports that differ, as truncations make them
            p[1 : size // 2] = NEVER
            q[size // 3 : size // 2 + 1] = NEVER
            p, q = p.log_softmax(0), q.log_softmax(0)
        law = p.double().exp()
        out, rate = enumerated(p, q)
        assert rate == pytest.approx(1 - total_variation(law, q.double().exp()), abs=1e-6)
        assert total_variation(out, law) < 1e-6
        for token in (int(q.argmax()), 0, size - 1):
            out, rate = enumerated(p, None, token)
            assert rate == pytest.approx(float(law[token]), abs=1e-12)
            assert total_variation(out, law) < 1e-6


def test_equal_laws_always_accept_and_their_residual_is_a_law() -> None:
    for concentration in (0.03, 1.0):
        p = dirichlet(1, 1000, concentration, seed=4)[0]
        p[100:300] = NEVER
        p = p.log_softmax(0)
        out, rate = enumerated(p, p)
        assert rate > 1 - 1e-6 and total_variation(out, p.double().exp()) < 1e-6
    exact = torch.tensor([NEVER, 0.0, NEVER])
    out, rate = enumerated(exact, exact)
    assert rate == 1.0 and out.tolist() == [0.0, 1.0, 0.0]  # nothing is left of p - q: then p


def test_impossible_tokens_never_stand() -> None:
    """Tokens that the target excludes, at the smallest coin; padding; tokens that the draft's own law excludes."""
    p = torch.tensor([NEVER, 0.5, 0.5]).log_softmax(0).log_softmax(0)
    tokens = torch.tensor([[0], [-1], [1], [2]])
    laws = torch.tensor([[0.9, 0.1, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5], [0.5, 0.0, 0.5]]).unsqueeze(1)
    target = TargetRows(torch.full((4, 2), 2), p.expand(4, 2, 3), Scripted(SMALLEST, (4, 1)))
    verdict = RejectionVerifier().verify(DraftProposal(tokens, (1, 0, 1, 1), Dense(laws)), target)
    assert verdict.accepted.tolist() == [0, 0, 0, 1]
    assert verdict.next_token[0] in (1, 2) and verdict.next_token[1] == 2  # padding: the target's own draw
    verdict = RejectionVerifier().verify(DraftProposal(tokens, (1, 0, 1, 1)), target)
    assert verdict.accepted.tolist() == [0, 0, 1, 1]


# ---- reductions ------------------------------------------------------------------------------------------


def batch(n: int, width: int, size: int, seed: int, failing: float = 0.0) -> tuple[Tensor, TargetRows]:
    """Padded drafts [n, width] and what the target says of them; some rows are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = dirichlet(n * (width + 1), size, 0.5, seed).view(n, width + 1, size)
    lengths = torch.randint(0, width + 1, (n, 1), generator=generator)
    steps = torch.arange(width + 1)
    log_probs[torch.rand(n, width + 1, generator=generator) < failing] = float("nan")
    log_probs[steps > lengths] = NEVER
    dead = log_probs.isnan().any(-1) | (steps > lengths)
    draws = draw_rows(log_probs.nan_to_num(0.0).flatten(0, 1), generator).view(n, width + 1).masked_fill(dead, -1)
    tokens = torch.randint(0, size, (n, width), generator=generator)
    likely = log_probs[:, :width].nan_to_num(0.0).argmax(-1)
    tokens = torch.where(torch.rand(n, width, generator=generator) < 0.7, likely, tokens)
    return tokens.masked_fill(steps[:width] >= lengths, -1), TargetRows(draws, log_probs)


def verified(law: Delta | Dense, tokens: Tensor, target: TargetRows, verifier: Verifier) -> tuple[Tensor, ...]:
    n, width = tokens.shape
    target = replace(target, chance=Coins(states(n), width, CPU))
    verdict = verifier.verify(DraftProposal(tokens, tuple((tokens >= 0).sum(1).tolist()), law), target)
    assert verdict.bias is None
    return verdict.accepted, verdict.path, verdict.next_token


@pytest.mark.parametrize("width", [1, 4])
def test_a_one_hot_law_is_a_chosen_token_bit_for_bit(width: int) -> None:
    tokens, target = batch(400, width, 6, seed=width, failing=0.1)
    chosen = verified(Delta(), tokens, target, RejectionVerifier())
    drawn = verified(one_hot(tokens, 6), tokens, target, RejectionVerifier())
    assert all(torch.equal(a, b) for a, b in zip(chosen, drawn, strict=True))
    assert 50 < int(chosen[0].sum()) < 400 * width
    log_probs = target.log_probs
    assert log_probs is not None
    drafts, steps = ((tokens >= 0) & (target.draws[:, :width] >= 0)).nonzero().unbind(1)
    pair = [residual(DraftProposal(tokens, (), law), log_probs, drafts, steps) for law in (Delta(), one_hot(tokens, 6))]
    assert torch.equal(*pair)


@pytest.mark.parametrize("law", ["chosen", "drawn"])
def test_greedy_rows_are_verified_as_strict_does(law: str) -> None:
    """One-hot target laws, failing rows among them: the same verdict, whatever the draft's law is."""
    tokens, target = batch(400, 4, 6, seed=3, failing=0.1)
    assert target.log_probs is not None
    best = target.log_probs.nan_to_num(0.0).argmax(-1)
    laws = torch.full_like(target.log_probs, NEVER).scatter(-1, best.unsqueeze(-1), 0.0)
    target = TargetRows(torch.where(target.draws < 0, -1, best), laws.where(~target.log_probs.isnan(), float("nan")))
    proposal_law = Delta() if law == "chosen" else dense(dirichlet(1600, 6, 1.0, 5).view(400, 4, 6))
    got = verified(proposal_law, tokens, target, RejectionVerifier())
    if law == "drawn":  # a ratio above 1 or of 0: q is below 1 everywhere
        assert isinstance(proposal_law, Dense) and (proposal_law.probs < 1).all()
    want = verified(Delta(), tokens, target, StrictVerifier())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (want[2] == -1).any() and (want[0] > 2).any()


def test_rows_that_are_no_numbers_end_a_draft_there() -> None:
    tokens, target = batch(400, 4, 6, seed=6, failing=0.2)
    accepted, _, following = verified(Delta(), tokens, target, RejectionVerifier())
    broken = target.draws.gather(1, accepted.unsqueeze(1)).squeeze(1) == -1
    chances = acceptance(DraftProposal(tokens, ()), target)
    assert not chances[(tokens < 0) | (target.draws[:, :-1] < 0)].any()
    assert torch.equal(following == -1, broken) and 20 < int(broken.sum()) < 380


def test_a_draft_law_that_is_no_number_costs_the_draft_and_nothing_else() -> None:
    tokens, target = batch(50, 3, 6, seed=7)
    law = Dense(torch.full((50, 3, 6), float("nan")))
    accepted, _, following = verified(law, tokens, target, RejectionVerifier())
    assert not accepted.any() and (following >= 0).all()
    assert target.log_probs is not None
    drafts, steps = (tokens >= 0).nonzero().unbind(1)
    weights = residual(DraftProposal(tokens, (), law), target.log_probs, drafts, steps)
    assert torch.equal(weights, target.log_probs[drafts, steps].double())


@pytest.mark.parametrize("name", VERIFIERS)
def test_every_verifier_says_what_it_is(name: str) -> None:
    made = resolve(VERIFIERS, name, "verifier")()  # type: ignore[operator]
    assert (made.lossless, made.needs_laws) == (True, name == "rejection")
    assert made.trees == (name == "strict")
