"""Masks, and whatever else may be missing or broken in what verifiers are given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.pipelines.coins import Coins
from engine.protocols import Delta, Dense, DraftProposal, Rows, Scalar, TargetRows
from engine.verifiers.kernel import left_over
from tests.enumeration import HIGH, KNOBS, LOW, Given, exact, made, rows_of
from tests.laws import Luck, pairs, states
from tests.verdicts import CPU, LOOSEST, NEVER, WEIGHING, batch, drawn_laws, same, verified

# ---- masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("name", WEIGHING)
def test_nothing_forbidden_is_ever_written(name: str, drawn: bool) -> None:
    """Rules at their loosest, drafts that love what the target forbids; sampled over whole chains, lowest coins too."""
    n, width, size = 3000, 3, 8
    log_p, q, _, _ = pairs(size, 1.0, cases=n * (width + 1))
    generator = torch.Generator().manual_seed(1)
    forbidden = torch.rand(log_p.shape, generator=generator) < 0.6
    forbidden[torch.arange(len(log_p)), log_p.argmax(1)] = False
    log_p = log_p.masked_fill(forbidden, NEVER).log_softmax(1).view(n, width + 1, size)
    q = torch.where(forbidden, 2 * q, q)
    q = (q / q.sum(1, keepdim=True)).view(n, width + 1, size)[:, :width].contiguous()
    tokens = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(n, width) if drawn else q.argmax(-1)
    law = Dense(q) if drawn else Delta()
    proposal = DraftProposal(tokens, (width,) * n, law, Rows(q), torch.zeros(n, width, 1))
    target = rows_of(log_p, LOOSEST.get(name, {}), states=torch.zeros(n, width + 1, 1))
    assert log_p[:, :width].gather(-1, tokens.unsqueeze(-1)).isinf().float().mean() > 0.3
    for chance in (Luck(n, width, 2), LowLuck(n, width, 3)):
        verdict = made(name).verify(proposal, replace(target, chance=chance))
        written = torch.where(torch.arange(width) < verdict.accepted.unsqueeze(1), tokens, -1)
        written = torch.cat((written, torch.full((n, 1), -1)), 1).scatter(
            1, verdict.accepted.unsqueeze(1), verdict.next_token.unsqueeze(1)
        )
        said = log_p.gather(-1, written.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        assert (said[written >= 0] > NEVER).all()
        assert 100 < int(verdict.accepted.sum()) < 2 * n


class LowLuck(Luck):
    def uniforms(self) -> Tensor:
        return torch.full_like(super().uniforms(), LOW)


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_masked_mixture_is_the_law_exactly(weight: float) -> None:
    """v = w p + (1 - w) q with what the mask leaves of q, normalised, though tokens are drawn from all of q."""
    log_p, g, _, q = pairs(8, 1.0)
    mask = torch.arange(8) % 3 == 1
    log_p = log_p.masked_fill(mask, NEVER).log_softmax(1)
    log_p[0] = torch.tensor([NEVER, 0.0, *[NEVER] * 6])  # nothing in common with this one: the target's law
    g[0] = torch.tensor([0.5, 0.0, 0.5, 0, 0, 0, 0, 0])
    left = q.masked_fill(mask, 0.0)
    v = weight * log_p.double().exp() + (1 - weight) * left / left.sum(1, keepdim=True)
    found = exact(made("ensemble"), log_p, g, {"target_weight": weight})
    assert torch.allclose(found.law[1:], v[1:], rtol=0, atol=2e-6)
    assert found.law[0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0] and found.bias is not None and found.bias[0] == 0
    assert torch.allclose(found.rate[1:], torch.minimum(v, g.double()).sum(1)[1:], rtol=0, atol=2e-6)


# ---- what may be broken ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHING)
def test_impossible_tokens_never_stand(name: str) -> None:
    """What the target excludes, padding, what its own law excludes, ids outside the vocabulary; at the lowest coin."""
    p = torch.tensor([NEVER, 0.5, 0.5]).log_softmax(0)
    tokens = torch.tensor([[0], [-1], [1], [2], [3]])
    laws = [
        [0.9, 0.1, 0.0, 0.0],
        [1.0, 0.0, 0.0, 0.0],
        [0.5, 0.0, 0.5, 0.0],
        [0.5, 0.0, 0.5, 0.0],
        [0.0, 0.0, 0.5, 0.5],
    ]
    target = rows_of(p.expand(5, 2, 3), LOOSEST.get(name, {}), states=torch.zeros(5, 2, 1))
    target = replace(target, draws=torch.full((5, 2), 2))
    for law, stands in ((Dense(torch.tensor(laws).unsqueeze(1)), [0, 0, 0, 1, 0]), (Delta(), [0, 0, 1, 1, 0])):
        coins = Given(torch.full((5, 1), LOW, dtype=torch.float64))
        proposal = DraftProposal(tokens, (1, 0, 1, 1, 1), law, Scalar(torch.ones(5, 1)), torch.zeros(5, 1, 1))
        if isinstance(law, Delta):  # nobody chooses what is not in the vocabulary
            proposal = replace(proposal, tokens=tokens.clamp(max=2))
            stands = [0, 0, 1, 1, 1]
        verdict = made(name).verify(proposal, replace(target, chance=coins))
        assert verdict.accepted.tolist() == stands
        assert verdict.next_token[0] in (1, 2) and verdict.next_token[1] == 2  # padding: the target's own draw
        assert verdict.bias is None or not verdict.bias[1].any()


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("name", WEIGHING)
def test_rows_that_are_no_numbers_end_a_draft_there(name: str, drawn: bool) -> None:
    tokens, target = batch(400, 4, 6, seed=6, failing=0.2)
    verdict = verified(name, drawn_laws(tokens, 6) if drawn else Delta(), tokens, target, KNOBS.get(name, {}))
    broken = target.draws.gather(1, verdict.accepted.unsqueeze(1)).squeeze(1) == -1
    assert torch.equal(verdict.next_token == -1, broken) and 20 < int(broken.sum()) < 380
    first = (target.draws[:, :4] < 0).long().argmax(1).masked_fill((target.draws[:, :4] >= 0).all(1), 4)
    assert (verdict.accepted <= first).all() and (verdict.accepted <= (tokens >= 0).sum(1)).all()
    assert verdict.bias is None or (verdict.bias.isfinite().all() and not verdict.bias[tokens < 0].any())


@pytest.mark.parametrize("name", WEIGHING)
def test_a_draft_law_that_is_no_number_costs_the_draft_and_nothing_else(name: str) -> None:
    tokens, target = batch(50, 3, 6, seed=7)
    law = Dense(torch.full((50, 3, 6), float("nan")))
    verdict = verified(name, law, tokens, target, KNOBS.get(name, {}))
    assert not verdict.accepted.any() and (verdict.next_token >= 0).all()
    assert verdict.bias is None or not verdict.bias.any()
    assert target.log_probs is not None
    drafts, steps = (tokens >= 0).nonzero().unbind(1)
    weights = left_over(law, target.log_probs)(drafts, steps)
    assert torch.equal(weights, target.log_probs[drafts, steps].double())


@pytest.mark.parametrize("name", WEIGHING)
def test_a_draft_law_with_one_broken_entry_still_gives_laws_to_draw_from(name: str) -> None:
    log_p, g, _, _ = pairs(6, 1.0)
    g[:, 3] = float("nan")
    n = len(g)
    rows = rows_of(log_p.unsqueeze(1).expand(n, 2, 6), KNOBS.get(name, {}), states=torch.zeros(n, 2, 1))
    coins = Given(torch.full((n, 1), HIGH, dtype=torch.float64))  # refuses laws that are no numbers
    proposal = DraftProposal(
        torch.arange(n).unsqueeze(1) % 6, (1,) * n, Dense(g.unsqueeze(1)), None, torch.ones(n, 1, 1)
    )
    verdict = made(name).verify(proposal, replace(rows, chance=coins))
    assert len(coins.asked) == int((verdict.accepted == 0).sum()) > n / 6
    assert all(not law.isnan().any() for law in coins.asked.values())
    assert verdict.bias is None or bool(verdict.bias.isfinite().all())


@pytest.mark.parametrize("name", ["ensemble", "bounded", "diversed"])
def test_an_opinion_that_is_no_number_leaves_the_targets_law(name: str) -> None:
    tokens, target = batch(400, 3, 6, seed=7)
    want = verified("rejection", Delta(), tokens, target)
    for marginal in (torch.full((400, 3), float("nan")), torch.full((400, 3, 6), float("nan"))):
        got = verified(name, Delta(), tokens, target, LOOSEST[name], marginal)
        assert same(got, want) and got.bias is not None and not got.bias.any()


@pytest.mark.parametrize("name", WEIGHING)
def test_draft_vocabularies_may_be_smaller_or_padded(name: str) -> None:
    tokens, target = batch(400, 3, 6, seed=9)
    tokens = torch.where(tokens == 5, 4, tokens)
    law = drawn_laws(tokens, 5)
    same_law = Dense(torch.nn.functional.pad(law.probs, (0, 1)))
    wide = Dense(torch.nn.functional.pad(law.probs, (0, 4)))
    want = verified(name, same_law, tokens, target, KNOBS.get(name, {}), same_law.probs)
    for other in (law, wide):
        got = verified(name, other, tokens, target, KNOBS.get(name, {}), other.probs)
        assert same(got, want)
        chosen = verified(name, Delta(), tokens, target, KNOBS.get(name, {}), other.probs)
        assert same(chosen, verified(name, Delta(), tokens, target, KNOBS.get(name, {}), same_law.probs))


@pytest.mark.parametrize("name", WEIGHING)
def test_tokens_that_a_draft_vocabulary_lacks_are_not_its_own(name: str) -> None:
    """Drawn ones never stand, even at the lowest coin; of chosen ones the draft thinks nothing, and raises none."""
    log_p, rows, tokens = torch.full((2, 2, 6), 1 / 6).log(), torch.full((2, 1, 5), 0.2), torch.tensor([[5], [4]])
    target = rows_of(log_p, LOOSEST.get(name, {}), states=torch.zeros(2, 2, 1))
    cases: list[tuple[Delta | Dense, float]] = [(Dense(rows), LOW)]
    cases += [(Delta(), 0.18)] if made(name).needs_marginal else []  # between p and q
    for law, coin in cases:
        coins = Given(torch.full((2, 1), coin, dtype=torch.float64))
        proposal = DraftProposal(tokens, (1, 1), law, Rows(rows), torch.zeros(2, 1, 1))
        assert made(name).verify(proposal, replace(target, chance=coins)).accepted.tolist() == [0, 1]


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("name", WEIGHING)
def test_drafts_of_nothing_get_the_targets_draw(name: str, drawn: bool) -> None:
    """No token for anybody: a width of 0, or padding alone."""
    for width in (0, 2):
        tokens, target = torch.full((5, width), -1), batch(5, 2, 6, seed=1)[1]
        assert target.log_probs is not None and target.states is not None
        target = TargetRows(
            target.draws[:, : width + 1], target.log_probs[:, : width + 1], states=target.states[:, : width + 1]
        )
        verdict = verified(name, drawn_laws(tokens, 6) if drawn else Delta(), tokens, target, KNOBS.get(name, {}))
        assert not verdict.accepted.any() and torch.equal(verdict.next_token, target.draws[:, 0])


def test_knobs_are_each_requests_own() -> None:
    """Requests of one call with other knobs get what they would get alone."""
    tokens, target = batch(60, 3, 6, seed=11)
    for name, spread in (("ensemble", (0.0, 1.0)), ("lenient", (0.1, 1.0)), ("top_k_gap", (1.0, 5.0))):
        for law in (Delta(), drawn_laws(tokens, 6)):
            knob = next(iter(KNOBS[name]))
            values = torch.linspace(*spread, 60, dtype=torch.float64).round(decimals=0 if name == "top_k_gap" else 3)
            rest = {other: torch.full((60,), value, dtype=torch.float64) for other, value in KNOBS[name].items()}
            knobs = {**rest, knob: values}
            scores, coins = Scalar(torch.full((60, 3), 0.9)), Coins(states(60), 3, CPU)
            lengths = tuple((tokens >= 0).sum(1).tolist())
            together = made(name).verify(
                DraftProposal(tokens, lengths, law, scores), replace(target, chance=coins, knobs=knobs)
            )
            for value in values.unique().tolist():
                alone = verified(name, law, tokens, target, {**KNOBS[name], knob: value})
                own = values == value
                assert torch.equal(together.accepted[own], alone.accepted[own])
                assert together.bias is not None and alone.bias is not None
                assert torch.equal(together.next_token[own], alone.next_token[own])
                assert torch.equal(together.bias[own], alone.bias[own])
