"""Greedy requests under relaxed verifiers, by hand: a draft stands if it is the likeliest of its verification law.

That law is p at temperature 1 with the drafted token raised to the verifier's mass. Whatever falls is replaced by the
target's own likeliest token, and the bias is 1 where another one than that was committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.protocols import Delta, DraftProposal, Scalar, Verdict
from engine.verifiers.kernel import Drafted, likeliest
from tests.enumeration import HIGH, KNOBS, LOW, Given, made, rows_of

HAND = (0.50, 0.49, 0.01)  # p, where q is (0.10, 0.89, 0.01)
LOOSEST = {"target_weight": 0.0, "min_weight": 0.0, "epsilon": 1.0, "lenience": 0.01, "posterior_threshold": 0.0}
NEVER = float("-inf")


def verify(
    name: str,
    p: Sequence[Sequence[float]],
    tokens: Sequence[Sequence[int]],
    q: Sequence[Sequence[float]],
    knobs: dict[str, float],
    coin: float = HIGH,
    **more: Tensor,
) -> Verdict:
    """Greedy requests: `p` are the rows of all drafted positions and the one after, the same for all requests."""
    drafted, log_p = torch.tensor(tokens), torch.tensor(p).log()
    n = len(tokens)
    hidden, states = torch.full((*drafted.shape, 1), knobs.get("head", 0.0)), torch.zeros(n, len(p), 1)
    proposal = DraftProposal(
        drafted, tuple((drafted >= 0).sum(1).tolist()), marginal=Scalar(torch.tensor(q)), hidden=hidden
    )
    target = rows_of(log_p.expand(n, -1, -1), knobs, greedy=torch.ones(n, dtype=torch.bool), states=states, **more)
    coins = Given(torch.full(drafted.shape, coin, dtype=torch.float64))
    verdict = made(name).verify(proposal, replace(target, chance=coins))
    assert not coins.asked, "nothing is drawn for a greedy request"
    return verdict


def stands(name: str, p: Sequence[float], token: int, q: float, coin: float = HIGH, **knobs: float) -> bool:
    """One drafted token; what is committed, and its bias, must fit."""
    after = [1.0 if token == 0 else 0.0 for token in range(len(p))]
    verdict = verify(name, [p, after], [[token]], [[q]], knobs, coin)
    best = max(range(len(p)), key=lambda other: (p[other], -other))
    stood = bool(verdict.accepted[0])
    assert verdict.bias is not None and verdict.bias.tolist() == [[float(stood and token != best)]]
    assert int(verdict.next_token[0]) == (0 if stood else best)
    return stood


@pytest.mark.parametrize("coin", [LOW, 0.5, HIGH])
def test_the_example_of_transformers(coin: float) -> None:
    """p = (.50, .49, .01), q = (.10, .89, .01), w = .5: v = (.30, .69, .01) takes token 1, though p's best is 0.

    By our rule token 1 is raised to .69, token 0 keeps .50 * .31 / .51 = .304: it stands, too. Coins have no say.
    """
    assert stands("ensemble", HAND, 1, 0.89, coin, target_weight=0.5)
    assert stands("ensemble", HAND, 0, 0.10, coin, target_weight=0.5)  # the target's own
    assert not stands("ensemble", HAND, 2, 0.01, coin, target_weight=0.5)
    assert not stands("ensemble", HAND, 1, 0.89, coin, target_weight=1.0)


def test_where_each_rule_turns() -> None:
    """p = (.50, .30, .20), x = 1 raised to a beats the best iff a > .5 (1 - a) / .7, that is a > 5 / 12 = .41667."""
    p = (0.50, 0.30, 0.20)
    # ensemble, w = .5: a = .15 + q / 2
    assert not stands("ensemble", p, 1, 0.533, target_weight=0.5)
    assert stands("ensemble", p, 1, 0.534, target_weight=0.5)
    assert not stands("ensemble", p, 1, 0.1, target_weight=0.5)  # a stays p
    # bounded: a = min(q, .3 + epsilon)
    assert not stands("bounded", p, 1, 1.0, epsilon=0.116)
    assert stands("bounded", p, 1, 1.0, epsilon=0.117)
    assert not stands("bounded", p, 1, 0.41, epsilon=0.5)
    # lenient: a = .3 / l
    assert not stands("lenient", p, 1, 0.0, lenience=0.721)
    assert stands("lenient", p, 1, 0.0, lenience=0.719)
    # diversed: the weight of its head, no less than min_weight
    assert stands("diversed", p, 1, 0.534, head=0.5, min_weight=0.5)
    assert not stands("diversed", p, 1, 0.534, head=0.4, min_weight=0.6)
    # typical: p > min(threshold, alpha exp(-H)), H = 1.0297 nats, exp(-H) = .3571
    assert stands("typical", p, 1, 0.0, posterior_threshold=0.29, posterior_alpha=100.0)
    assert not stands("typical", p, 1, 0.0, posterior_threshold=0.31, posterior_alpha=100.0)
    assert stands("typical", p, 1, 0.0, posterior_threshold=1.0, posterior_alpha=0.84)
    assert not stands("typical", p, 1, 0.0, posterior_threshold=1.0, posterior_alpha=0.85)
    # top_k_gap: log .5 - log .3 = .5108
    assert stands("top_k_gap", p, 1, 0.0, relaxed_topk=2, relaxed_delta=0.52)
    assert not stands("top_k_gap", p, 1, 0.0, relaxed_topk=2, relaxed_delta=0.5)
    assert not stands("top_k_gap", p, 2, 0.0, relaxed_topk=2, relaxed_delta=100.0)
    assert stands("top_k_gap", p, 2, 0.0, relaxed_topk=3, relaxed_delta=100.0)


def test_ties_go_to_the_lowest_id() -> None:
    """x raised to exactly what the target's best keeps: p = (.5, .25, .25), a = .4 leaves .5 * .6 / .75 = .4."""
    assert not stands("bounded", (0.5, 0.25, 0.25), 1, 0.399, epsilon=1.0)
    assert stands("bounded", (0.5, 0.25, 0.25), 1, 0.401, epsilon=1.0)
    # An equal token with a higher id is not the target's own, and one with a lower id is.
    assert not stands("lenient", (0.25, 0.25, 0.5), 1, 0.0, lenience=1.0)
    assert not stands("lenient", (0.5, 0.5), 1, 0.0, lenience=1.0)
    assert stands("lenient", (0.5, 0.5), 0, 0.0, lenience=1.0)
    assert stands("lenient", (0.5, 0.5), 1, 0.0, lenience=0.99)  # any more than the best
    # All of a tie at the k-th place are among the top k.
    assert stands("top_k_gap", (0.4, 0.3, 0.3), 2, 0.0, relaxed_topk=2, relaxed_delta=100.0)


def test_exact_ties_of_the_law() -> None:
    """Token 1 holds all of p (log 1 is exact); at a mass of .5 both sides of it tie, and the lower id is kept."""
    log_p = torch.tensor([NEVER, 0.0, NEVER]).expand(2, 2, 3)
    target = replace(rows_of(log_p, {}), chance=Given(torch.zeros(2, 1)))
    drafted = Drafted(Delta(), torch.tensor([[0], [2]]), target)
    none = torch.zeros(2, 1, dtype=torch.float64)
    for mass, kept in ((0.5 - 1e-9, [False, False]), (0.5, [True, False]), (0.5 + 1e-9, [True, True])):
        assert likeliest(drafted, none, none + mass)[0].flatten().tolist() == kept


def test_what_the_target_forbids_never_stands() -> None:
    for name, knobs in KNOBS.items():
        loosest = {knob: LOOSEST.get(knob, 100.0) for knob in knobs}
        assert not stands(name, (0.6, 0.0, 0.4), 1, 1.0, **loosest), name
        assert stands(name, (0.6, 0.0, 0.4), 2, 1.0, **loosest), name


def test_chains_of_greedy_requests_count_tokens_that_are_not_the_targets() -> None:
    """The bias is 1 where an accepted token is another one; 0 where one fell, as the target's best replaces it."""
    rows = [HAND, HAND, HAND, (1.0, 0.0, 0.0)]
    tokens = [[1, 0, 2], [0, 1, 1], [2, 1, 0], [1, -1, -1]]
    q = [[0.89, 0.9, 0.01], [0.1, 0.89, 0.89], [0.01, 0.01, 0.01], [0.89, 0.0, 0.0]]
    verdict = verify("ensemble", rows, tokens, q, {"target_weight": 0.5})
    assert verdict.accepted.tolist() == [2, 3, 0, 1]
    assert verdict.next_token.tolist() == [0, 0, 0, 0]
    assert verdict.bias is not None
    assert verdict.bias[:, 0].tolist() == [1, 0, 0, 1] and verdict.bias[1].tolist() == [0, 1, 1]


def test_greedy_and_drawing_requests_share_a_call() -> None:
    """Each as if it were alone: the first rests on no coin, the other on nothing else."""
    log_p = torch.tensor([HAND, HAND]).log().expand(4, 2, 3)
    proposal = DraftProposal(torch.ones(4, 1, dtype=torch.int64), (1,) * 4, marginal=Scalar(torch.full((4, 1), 0.89)))
    greedy = torch.tensor([True, False, True, False])
    target = rows_of(log_p, {"target_weight": 0.5}, greedy=greedy)
    coins = Given(torch.tensor([[HIGH], [0.68], [LOW], [0.70]], dtype=torch.float64))
    verdict = made("ensemble").verify(proposal, replace(target, chance=coins))
    assert verdict.accepted.tolist() == [1, 1, 1, 0] and list(coins.asked) == [(3, 0)]
    assert verdict.bias is not None
    assert verdict.bias.flatten().tolist() == pytest.approx([1, 0.2, 1, 0.2])


@pytest.mark.parametrize("name", KNOBS)
def test_outside_of_what_is_free_only_the_targets_own_token_stands(name: str) -> None:
    """`thinking_only`: even where rounding makes two tokens of the target equally likely."""
    knobs = {**KNOBS[name], "head": 0.0}
    rows = [(0.5, 0.5), (0.5, 0.5), (1.0, 0.0)]
    free = torch.tensor([[True, False], [False, True]])
    verdict = verify(name, rows, [[1, 1], [1, 1]], [[1.0, 1.0]] * 2, knobs, free=free)
    assert verdict.accepted.tolist() == [1, 0] and verdict.next_token.tolist() == [0, 0]
    assert verdict.bias is not None and verdict.bias[0].tolist() == [1, 0]
