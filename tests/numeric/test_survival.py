"""Chances from margins, and how many drafted tokens are worth verifying."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from engine.pipelines.survival import CURIOSITY, DEPTHS, ENOUGH, LengthChoice, SurvivalEstimator, foreseen
from engine.types import CostTable

Points = tuple[tuple[int, float], ...]

STEPS = ((1, 14.0), (2, 14.0), (4, 16.0), (8, 20.0), (16, 32.0), (32, 54.0), (64, 98.0))
DRAFTS = ((1, 2.0), (8, 4.0), (32, 10.0))
JUMPY = ((1, 1.0), (2, 1.0), (3, 2.4), (4, 2.5), (5, 2.5), (8, 2.6), (9, 6.0), (64, 40.0))


def logistic(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def feed(
    estimator: SurvivalEstimator,
    curves: list[tuple[float, float]],
    rounds: int,
    seed: int = 1,
    cut: float = 0.0,
) -> None:
    """Rounds of two drafts whose tokens stand with planted chances; verified as far as they look better than `cut`."""
    rng = random.Random(seed)
    for _ in range(rounds):
        margins = [[rng.expovariate(0.4) for _ in curves] for _ in range(2)]
        lengths, accepted = [], []
        for row, chances in zip(margins, estimator.chances(torch.tensor(margins), [len(curves)] * 2), strict=True):
            reach = list(itertools.accumulate(chances, lambda a, b: a * b))
            length = max(1, sum(chance >= cut for chance in reach))
            stands = (rng.random() < logistic(slope * m + bias) for m, (slope, bias) in zip(row, curves, strict=True))
            accepted.append(sum(itertools.takewhile(bool, itertools.islice(stands, length))))
            lengths.append(length)
        estimator.observe(torch.tensor(margins), lengths, accepted)


def error(estimator: SurvivalEstimator, curves: list[tuple[float, float]], depth: int) -> float:
    """Mean distance of chances at one position, over margins as they come."""
    rng = random.Random(9)
    margins = torch.tensor([[rng.expovariate(0.4)] * len(curves) for _ in range(300)])
    rows = estimator.chances(margins, [len(curves)] * 300)
    slope, bias = curves[depth]
    found = [abs(row[depth] - logistic(slope * m + bias)) for row, (m, *_) in zip(rows, margins.tolist(), strict=True)]
    return sum(found) / len(found)


PLANTED = [(0.9, -0.5), (0.7, -0.2), (0.5, -0.6), (0.3, 0.2)]


@pytest.mark.parametrize("cut", [0.0, 0.5])
def test_planted_curves_are_found_though_later_positions_are_seldom_reached(cut: float) -> None:
    estimator = SurvivalEstimator()
    before = [error(estimator, PLANTED, depth) for depth in range(4)]
    feed(estimator, PLANTED, 4000, cut=cut)
    after = [error(estimator, PLANTED, depth) for depth in range(4)]
    assert max(after[:2]) < 0.04 and sum(after[:2]) < 0.25 * sum(before[:2]), (before, after)
    assert max(after) < (0.15 if cut else 0.08), "where low margins are never verified, theirs remain a guess"


def test_what_changes_is_followed() -> None:
    estimator = SurvivalEstimator()
    feed(estimator, PLANTED, 2000)
    changed = [(0.2, -1.5)] * 4
    feed(estimator, changed, 1500, seed=2)
    assert error(estimator, changed, 0) < 0.06


def test_labels_behind_the_first_fall_are_not_counted() -> None:
    """If a token falls, those after it were never tried: their positions learn nothing."""
    estimator = SurvivalEstimator()
    margins = torch.full((1, 3), 2.0)
    for _ in range(4 * ENOUGH):
        estimator.observe(margins, [3], [1])
    first, second, third = estimator.chances(margins, [3])[0]
    assert first > 0.9 and second < 0.1
    assert third == second, "never reached: believed to be like the one before it"
    assert [third] * 9 == estimator.chances(torch.full((1, 11), 2.0), [11])[0][2:]


def test_few_observations_change_nothing() -> None:
    estimator, fresh = SurvivalEstimator(), SurvivalEstimator()
    margins = torch.tensor([[1.0, 3.0]])
    for _ in range(ENOUGH - 1):
        estimator.observe(margins, [2], [0])
    assert estimator.chances(margins, [2]) == fresh.chances(margins, [2])
    estimator.observe(margins, [2], [0])
    assert estimator.chances(margins, [2])[0][0] < fresh.chances(margins, [2])[0][0]


def test_a_larger_margin_never_makes_a_token_less_likely() -> None:
    estimator, rng = SurvivalEstimator(), random.Random(3)
    for _ in range(20 * ENOUGH):
        margin = rng.uniform(0.0, 6.0)
        estimator.observe(torch.tensor([[margin]]), [1], [int(rng.random() > margin / 8)])
    low, high = (estimator.chances(torch.tensor([[margin]]), [1])[0][0] for margin in (0.0, 6.0))
    assert low == high, "the slope is held at nought"
    assert 0.5 < low < 0.75, "and the intercept is fitted alone"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_margins_that_are_no_margins_do_no_harm(value: float) -> None:
    estimator = SurvivalEstimator()
    margins = torch.tensor([[value, 1.0]])
    for _ in range(3 * ENOUGH):
        estimator.observe(margins, [2], [1])
    assert all(0.0 <= chance <= 1.0 for chance in estimator.chances(margins, [2])[0])
    assert 0.0 < estimator.chances(torch.tensor([[1.0]]), [1])[0][0] < 1.0


def test_extreme_labels_keep_the_curves_finite() -> None:
    for stood in (0, 1):
        estimator, margins = SurvivalEstimator(), torch.tensor([[30.0]])
        for _ in range(100 * ENOUGH):
            estimator.observe(margins, [1], [stood])
        (chance,) = estimator.chances(margins, [1])[0]
        assert abs(chance - stood) < 0.05


def test_nothing_drafted_is_nothing_learned() -> None:
    estimator = SurvivalEstimator()
    assert estimator.chances(torch.empty(2, 0), [0, 0]) == [[], []]
    estimator.observe(torch.empty(2, 0), [0, 0], [0, 0])
    assert DEPTHS > 2


def test_what_is_foreseen_is_the_mean_of_what_would_have_been_seen() -> None:
    rng, chances = random.Random(5), [0.9, 0.6, 0.8, 0.5]
    rounds = 40_000
    whole, cut = [0.0, 0.0], [0.0, 0.0]
    for _ in range(rounds):
        stood = sum(1 for _ in itertools.takewhile(lambda chance: rng.random() < chance, chances))
        whole[0], whole[1] = whole[0] + stood, whole[1] + (stood < 4)
        seen = min(stood, 2)
        more, fell = foreseen(chances, 2, seen)
        cut[0], cut[1] = cut[0] + seen + more, cut[1] + (seen < 2) + fell
    assert [a / rounds for a in whole] == pytest.approx([b / rounds for b in cut], abs=0.02)


def brute_force(chances: list[list[float]], steps: CostTable, spent: float) -> tuple[float, list[float]]:
    """The best rate that includes the draft, if it beats plain decoding's; the gains of all choices at the rate."""
    streams = len(chances)
    outcomes = []
    for lengths in itertools.product(*(range(len(row) + 1) for row in chances)):
        tokens = sum(math.prod(row[: i + 1]) for row, n in zip(chances, lengths, strict=True) for i in range(n))
        outcomes.append((tokens, steps.seconds(streams + sum(lengths))))
    rate = max(streams / steps.seconds(streams), *((streams + t) / (s + spent) for t, s in outcomes))
    return rate, [tokens - rate * seconds for tokens, seconds in outcomes]


@pytest.mark.parametrize(("table", "drafts"), [(STEPS, DRAFTS), (JUMPY, ((1, 0.1), (8, 0.3)))], ids=["smooth", "jumpy"])
def test_lengths_are_those_of_a_search_through_all(table: Points, drafts: Points) -> None:
    rng = random.Random(6)
    steps, spent, paid = CostTable(table), CostTable(drafts), 0
    for _ in range(150):
        streams = rng.randint(1, 4)
        chances = [[rng.random() ** rng.choice((0.1, 1.0)) for _ in range(rng.randint(0, 4))] for _ in range(streams)]
        drafted = sum(map(bool, chances))
        rate, gains = brute_force(chances, steps, spent.seconds(drafted) if drafted else 0.0)
        lengths = LengthChoice(table, drafts).choose(chances, streams, least=0)
        tokens = sum(math.prod(row[: i + 1]) for row, n in zip(chances, lengths, strict=True) for i in range(n))
        assert all(n <= len(row) for n, row in zip(lengths, chances, strict=True))
        assert tokens - rate * steps.seconds(streams + sum(lengths)) == pytest.approx(max(gains))
        paid += rate > streams / steps.seconds(streams) + 1e-9
    assert paid > 10


def test_without_costs_everything_is_verified_and_with_them_at_least_one_token() -> None:
    chances = [[0.1, 0.1], [], [0.2]]
    assert LengthChoice().choose(chances, 3) == [2, 0, 1]
    dear = ((1, 1.0), (64, 64.0))
    assert LengthChoice(dear).choose(chances, 3) == [0, 0, 1], "the likeliest, for its label"
    assert LengthChoice(dear).choose(chances, 3, least=0) == [0, 0, 0]
    assert LengthChoice(dear).choose([[], []], 2) == [0, 0]


def test_low_chances_are_doubted_now_and_then() -> None:
    """What is never verified is never learned: a chance that is believed too low must have its occasion."""
    choice = LengthChoice(STEPS)
    counts = [sum(choice.choose([[0.9, 0.9, 1e-3, 0.9]], 1)) for _ in range(10 * CURIOSITY)]
    assert sorted(counts) == [2] * (9 * CURIOSITY + CURIOSITY - 10) + [3] * 10


def test_a_prompt_in_the_step_does_not_make_drafts_cheap() -> None:
    """Its seconds are spent anyway; drafts must bring more than plain decoding does in the time that they take."""
    choice = LengthChoice(STEPS)
    poor = [[0.5] * 7 for _ in range(8)]
    assert sum(choice.choose(poor, 8, least=0)) == 0
    assert sum(choice.choose(poor, 8 + 480, least=0)) == 0


def test_in_turn_no_token_depends_on_the_margins_behind_it() -> None:
    rng = random.Random(7)
    for _ in range(200):
        chances = [[rng.random() ** 0.3 for _ in range(5)] for _ in range(3)]
        changed = [row[:] for row in chances]
        row, place = rng.randrange(3), rng.randrange(5)
        changed[row][place:] = [rng.random() for _ in range(5 - place)]
        first, second = LengthChoice(STEPS, DRAFTS), LengthChoice(STEPS, DRAFTS)
        for choice in (first, second):
            choice.choose([[0.9, 0.8], [0.7], [0.9]], 3)  # sets the bar
        one, other = (
            choice.choose_in_turn(rows, 3, range(3)) for choice, rows in ((first, chances), (second, changed))
        )
        assert min(one[row], place) == min(other[row], place)
        assert [n for i, n in enumerate(one) if i != row] == [n for i, n in enumerate(other) if i != row]
