"""Verifiers that are each other in some case, bit for bit under the same coins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.protocols import Delta, Dense, DraftProposal, Scalar, TargetRows
from engine.verifiers.block import weights
from engine.verifiers.kernel import Drafted, left_over, without_token
from tests.enumeration import HIGH, KNOBS, NEUTRAL, Given, exact, exact_diversed, made, rows_of
from tests.laws import Luck, dirichlet
from tests.verdicts import LOOSEST, NEVER, WEIGHING, batch, drawn_laws, one_hot, same, verified


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_knobs_are_rejection_bit_for_bit(name: str, drawn: bool, width: int) -> None:
    """Under the same coins; and so is any knob where the request is not free."""
    tokens, target = batch(400, width, 6, seed=width, failing=0.1)
    law = drawn_laws(tokens, 6) if drawn else Delta()
    want = verified("rejection", law, tokens, target)
    assert want.bias is None and 50 < int(want.accepted.sum()) < 400 * width
    neutral = verified(name, law, tokens, target, NEUTRAL[name], said=1.0)
    bound = replace(target, free=torch.zeros(400, width, dtype=torch.bool))
    for got in (neutral, verified(name, law, tokens, bound, LOOSEST[name])):
        assert same(got, want) and got.bias is not None and not got.bias.any()


@pytest.mark.parametrize("name", ["typical", "top_k_gap"])
@pytest.mark.parametrize("drawn", [True, False])
def test_rules_without_a_neutral_knob_are_rejection_where_they_are_not_free(name: str, drawn: bool) -> None:
    tokens, target = batch(400, 3, 6, seed=2)
    law = drawn_laws(tokens, 6) if drawn else Delta()
    bound = replace(target, free=torch.zeros(400, 3, dtype=torch.bool))
    assert same(verified(name, law, tokens, bound, LOOSEST[name]), verified("rejection", law, tokens, target))
    assert not same(verified(name, law, tokens, target, LOOSEST[name]), verified("rejection", law, tokens, target))


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("name", KNOBS)
def test_freedom_is_by_position(name: str, drawn: bool) -> None:
    """Bias only where free; and what stands before the first free position stands as in rejection."""
    tokens, target = batch(400, 4, 6, seed=4)
    law = drawn_laws(tokens, 6) if drawn else Delta()
    free = (torch.arange(4) >= 2).expand(400, 4)
    got = verified(name, law, tokens, replace(target, free=free), LOOSEST[name], said=0.0)
    want = verified("rejection", law, tokens, target)
    assert got.bias is not None and not got.bias[:, :2].any() and (got.bias[:, 2:] > 0).any()
    early = want.accepted < 2
    assert torch.equal(got.accepted[early], want.accepted[early])
    assert torch.equal(got.next_token[early], want.next_token[early])
    assert int(got.accepted.sum()) > int(want.accepted.sum())


@pytest.mark.parametrize("width", [1, 4])
def test_a_one_hot_law_is_a_chosen_token_bit_for_bit(width: int) -> None:
    tokens, target = batch(400, width, 6, seed=width, failing=0.1)
    chosen = verified("rejection", Delta(), tokens, target)
    assert same(chosen, verified("rejection", one_hot(tokens, 6), tokens, target))
    assert 50 < int(chosen.accepted.sum()) < 400 * width
    drafts, steps = ((tokens >= 0) & (target.draws[:, :width] >= 0)).nonzero().unbind(1)
    target = replace(target, chance=Luck(400, width, 1))
    assert target.log_probs is not None
    without = without_token(Drafted(Delta(), tokens, target))
    left = left_over(one_hot(tokens, 6), target.log_probs)
    assert torch.equal(without(drafts, steps), left(drafts, steps))


@pytest.mark.parametrize("drawn", [True, False])
def test_blocks_of_one_token_are_verified_as_tokens_bit_for_bit(drawn: bool) -> None:
    tokens, target = batch(400, 1, 6, seed=8, failing=0.1)
    law = drawn_laws(tokens, 6) if drawn else Delta()
    assert same(verified("block", law, tokens, target), verified("rejection", law, tokens, target))
    tokens, target = batch(400, 4, 6, seed=8, failing=0.1)
    assert same(verified("block", Delta(), tokens, target), verified("rejection", Delta(), tokens, target))


@pytest.mark.parametrize("name", ["rejection", "block"])
@pytest.mark.parametrize("drawn", [True, False])
def test_greedy_rows_are_verified_as_strict_does(name: str, drawn: bool) -> None:
    """One-hot target laws, failing rows among them: the same verdict, whatever the draft's law is."""
    tokens, target = batch(400, 4, 6, seed=3, failing=0.1)
    assert target.log_probs is not None
    best = target.log_probs.nan_to_num(0.0).argmax(-1)
    laws = torch.full_like(target.log_probs, NEVER).scatter(-1, best.unsqueeze(-1), 0.0)
    target = TargetRows(torch.where(target.draws < 0, -1, best), laws.where(~target.log_probs.isnan(), float("nan")))
    target = replace(target, greedy=torch.ones(400, dtype=torch.bool))
    got = verified(name, drawn_laws(tokens, 6) if drawn else Delta(), tokens, target)
    want = verified("strict", Delta(), tokens, target)
    assert same(got, want) and (want.next_token == -1).any() and (want.accepted > 2).any()


@pytest.mark.parametrize("name", WEIGHING)
def test_equal_laws_always_accept_and_their_residual_is_a_law(name: str) -> None:
    """p = q over supports of all sizes; nothing is left of p - q, and nothing of that is ever no number."""
    for concentration in (0.03, 1.0):
        log_p = dirichlet(1, 300, concentration, seed=4)
        log_p[:, 100:200] = NEVER
        log_p = log_p.log_softmax(1)
        p = log_p.double().exp()
        if name == "diversed":
            found = exact_diversed(log_p, log_p.exp(), torch.full((1,), 0.3), 0.0)
        else:
            found = exact(made(name), log_p, log_p.exp(), KNOBS.get(name, {}))
        assert float(found.rate) > 1 - 1e-5 and float((found.law - p).abs().sum()) < 1e-5
        assert found.bias is None or float(found.bias) < 1e-5
    sure = torch.tensor([[NEVER, 0.0, NEVER]])
    tokens, coins = torch.tensor([[1]]), Given(torch.tensor([[HIGH]], dtype=torch.float64))
    for law in (Dense(sure.exp().unsqueeze(1)), Delta()):
        proposal = DraftProposal(tokens, (1,), law, Scalar(torch.ones(1, 1)), torch.full((1, 1, 1), 0.5))
        rows = rows_of(sure.expand(1, 2, 3), KNOBS.get(name, {}), states=torch.zeros(1, 2, 1))
        verdict = made(name).verify(proposal, replace(rows, chance=coins))
        assert verdict.accepted.tolist() == [1] and not coins.asked


def test_a_block_of_equal_laws_passes_at_every_length() -> None:
    """Nothing is left and nothing is missing, 0 / 0: certain tokens, for which both laws are exact."""
    tokens = torch.tensor([[2, 0, 1, -1], [1, 1, 1, 1]])
    laws = one_hot(tokens, 3)
    rows = torch.cat((laws.probs, laws.probs[:, :1]), 1).log()
    drafted = Drafted(laws, tokens, replace(rows_of(rows, {}), chance=Luck(2, 4, 1)))
    before, passes = weights(drafted)
    assert before.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]] and passes.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_where_nothing_is_left_it_is_the_targets_law() -> None:
    """p = g, whatever it looks like, and p at one token alone: a draw must be possible if rounding calls for one."""
    spread = dirichlet(1, 6, 1.0, 3).masked_fill(torch.arange(6) == 2, NEVER).log_softmax(1)
    sure = torch.full((1, 6), NEVER).index_fill(1, torch.tensor([4]), 0.0)
    none = torch.zeros(1, dtype=torch.int64)
    for log_p, more in ((spread, 1.001), (sure, 1.0)):
        rows = log_p.unsqueeze(1).expand(1, 2, 6)
        left = left_over(Dense(log_p.exp().unsqueeze(1) * more), rows)(none, none)  # g no less than p anywhere
        assert torch.equal(left, log_p.double())
    target = replace(rows_of(sure.unsqueeze(1).expand(1, 2, 6), {}), chance=Luck(1, 1, 1))
    assert torch.equal(without_token(Drafted(Delta(), torch.tensor([[4]]), target))(none, none), sure.double())
