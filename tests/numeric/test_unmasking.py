"""Unmask rules against the table of their papers' worked cases, and what holds for all of them.

The table: tests over profiles that were worked by hand and run through the published code (Fast-dLLM, Fast-dLLM++).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import cast

import pytest
import torch
from torch import Tensor

from engine.protocols import Profile, UnmaskRule
from engine.registry import RULES, resolve

NEVER = float("-inf")


def rule(name: str) -> UnmaskRule:
    return cast(Callable[[], UnmaskRule], resolve(RULES, name, "rule"))()


def profile(
    rows: list[list[float]],
    knobs: Mapping[str, float | list[float]] | None = None,
    quota: list[int] | None = None,
    candidates: list[list[bool]] | None = None,
    width: int | None = None,
) -> Profile:
    """Rows of any length, padded; None of a padding is a candidate."""
    width = width or max(map(len, rows))
    padded = torch.tensor([[*row, *[NEVER] * (width - len(row))] for row in rows], dtype=torch.float64)
    known = [[True] * len(row) for row in rows] if candidates is None else candidates
    open_ = torch.tensor([[*row, *[False] * (width - len(row))] for row in known])
    values = {
        name: torch.tensor(value if isinstance(value, list) else [value] * len(rows), dtype=torch.float64)
        for name, value in (knobs or {}).items()
    }
    return Profile(padded.where(open_, NEVER), open_, torch.tensor(quota or [1] * len(rows)), values)


def count(name: str, row: list[float], **knobs: float) -> int:
    """How many of one row are committed; they must be the surest."""
    taken = rule(name).choose(profile([row], knobs))[0]
    chosen = int(taken.sum())
    best = sorted(range(len(row)), key=lambda at: (-row[at], at))[:chosen]
    assert sorted(best) == taken.nonzero().squeeze(1).tolist()
    return chosen


# Confidences -> tokens by threshold .9; factor .75 clean, published; factor 1 clean, published; delta .25; delta 0.
TABLE = [
    ([0.99, 0.95, 0.82, 0.78, 0.74], (2, 3, 3, 3, 3, 4, 5)),
    ([0.99] * 32, (32, 32, 32, 32, 32, 32, 32)),
    ([0.90] * 8, (8, 6, 6, 8, 8, 6, 8)),
    ([0.999, 0.999, 0.999, 0.9, 0.5], (4, 4, 5, 4, 5, 4, 4)),
    ([0.4, 0.3], (1, 1, 2, 1, 2, 1, 1)),
    ([0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.91, 0.90], (8, 7, 8, 8, 8, 8, 8)),
    ([0.99, 0.99, 0.3], (2, 2, 3, 2, 3, 2, 2)),
]


@pytest.mark.parametrize(("row", "expected"), TABLE)
def test_worked_cases(row: list[float], expected: tuple[int, ...]) -> None:
    shuffled = random.Random(3).sample(row, len(row))
    for values in (row, shuffled):
        got = (
            count("threshold", values, threshold=0.9),
            count("factor", values, factor=0.75),
            count("factor_compat", values, factor=0.75),
            count("factor", values, factor=1.0),
            count("factor_compat", values, factor=1.0),
            count("frechet", values, delta=0.25),
            count("frechet", values, delta=0.0),
        )
        assert got == expected


def test_the_papers_own_example() -> None:
    row = [0.99, 0.95, 0.82, 0.78, 0.74]
    assert count("factor", row, factor=0.7) == 2
    assert count("frechet", row, delta=0.3) == 4
    assert count("threshold", row, threshold=0.9) == 2


def published_factor(row: list[float], factor: float) -> int:
    """The published scan, written out: where it breaks, and what it makes of the last candidate."""
    ordered = sorted(row, reverse=True)
    limits = [1 - factor / (n + 1) for n in range(1, len(row) + 1)]
    limits[0] = -1.0
    at = next((i for i, c in enumerate(ordered) if c < limits[i]), len(row) - 1)
    return at + 1 if at in (0, len(row) - 1) else at


def plain_frechet(row: list[float], delta: float) -> int:
    ordered = sorted(row, reverse=True)
    scores = [sum(ordered[:n]) - (n - 1) - (1 - ordered[n - 1]) for n in range(1, len(row) + 1)]
    return max([1, *(n for n, score in enumerate(scores, start=1) if score > delta)])


def random_rows(seed: int, count: int) -> list[list[float]]:
    rng = random.Random(seed)
    return [[rng.random() ** rng.choice((0.02, 0.1, 0.5)) for _ in range(rng.randint(1, 32))] for _ in range(count)]


def test_factor_and_frechet_on_random_profiles() -> None:
    rng = random.Random(8)
    rows = random_rows(7, 4000)
    factors = [rng.uniform(0, 2) for _ in rows]
    deltas = [1 - factor for factor in factors]
    committed = {
        name: rule(name).choose(profile(rows, {"factor": factors, "delta": deltas}))
        for name in ("factor", "factor_compat", "frechet")
    }
    counts = {name: taken.sum(1).tolist() for name, taken in committed.items()}
    assert counts["factor_compat"] == [published_factor(row, f) for row, f in zip(rows, factors, strict=True)]
    assert counts["frechet"] == [plain_frechet(row, d) for row, d in zip(rows, deltas, strict=True)]
    assert bool((committed["frechet"] | ~committed["factor"]).all()), "frechet must commit what factor commits"
    assert sum(a > b for a, b in zip(counts["frechet"], counts["factor"], strict=True)) > 400


def test_frechet_is_factor_where_all_are_equal() -> None:
    rng = random.Random(9)
    rows = [[rng.uniform(0.5, 1)] * rng.randint(1, 32) for _ in range(2000)]
    factors = [rng.uniform(0, 2) for _ in rows]
    both = [
        rule("factor").choose(profile(rows, {"factor": factors})),
        rule("frechet").choose(profile(rows, {"delta": [1 - factor for factor in factors]})),
    ]
    assert torch.equal(*both)
    assert len(set(both[0].sum(1).tolist())) > 10


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("threshold", {"threshold": 1.01}), ("frechet", {"delta": 1.0}), ("factor", {"factor": 0.0})],
)
def test_the_strictest_setting_is_one_token_a_step(name: str, knobs: dict[str, float]) -> None:
    rows = [row for row in random_rows(5, 500) if max(row) < 1]
    assert rule(name).choose(profile(rows, knobs)).sum(1).eq(1).all()


def test_thresholds_and_their_borders() -> None:
    row = [0.9, 0.95, 0.85, 0.3]
    assert count("threshold", row, threshold=0.9) == 2, "equality counts"
    assert count("threshold", row, threshold=0.0) == 4
    assert count("factor", [0.875, 0.75], factor=0.75) == 2, "equality counts"
    assert count("frechet", [0.875, 0.75], delta=0.375) == 1, "equality doesn't"
    assert count("frechet", [0.875, 0.75], delta=0.37) == 2
    dynamic = rule("dynamic")
    knobs = {"threshold": 0.85}
    assert dynamic.choose(profile([row], knobs, [1])).tolist() == [[True, True, False, False]], "equality doesn't"
    assert dynamic.choose(profile([row], knobs, [3])).tolist() == [[True, True, True, False]], "too few are sure"
    assert dynamic.choose(profile([[0.2, 0.1]], knobs, [1])).tolist() == [[True, False]]


@pytest.mark.parametrize("name", ["quota", "random", "entropy", "margin"])
def test_scheduled_rules_commit_their_quota(name: str) -> None:
    rows = random_rows(2, 200)
    quotas = [random.Random(i).randint(1, 32) for i in range(len(rows))]
    taken = rule(name).choose(profile(rows, quota=quotas))
    assert taken.sum(1).tolist() == [min(q, len(row)) for q, row in zip(quotas, rows, strict=True)]
    assert rule(name).card.scheduled


KNOBS = {"threshold": 0.9, "factor": 1.0, "delta": 0.25}


@pytest.mark.parametrize("name", RULES)
class TestAllRules:
    def test_at_least_one_where_there_is_any_and_none_elsewhere(self, name: str) -> None:
        rows = [[0.0, 0.0], [NEVER, NEVER], [0.5, 0.9], [float("nan"), 0.1]]
        candidates = [[True, True], [True, True], [False, False], [True, True]]
        taken = rule(name).choose(profile(rows, KNOBS, candidates=candidates))
        assert taken.dtype == torch.bool
        assert taken[:2, 0].tolist() == [True, True], "ties go to the lowest position"
        assert taken[2].tolist() == [False, False]
        assert bool(taken[3, 1])
        empty = rule(name).choose(profile([[0.1]], KNOBS, candidates=[[False]]))
        assert empty.tolist() == [[False]]

    def test_ties_go_to_the_lowest_position(self, name: str) -> None:
        row = [0.2, 0.7, 0.7, 0.2, 0.7]
        knobs = {"threshold": 2.0, "factor": 0.0, "delta": 1.0}
        taken = rule(name).choose(profile([row], knobs, quota=[1]))
        assert taken.tolist() == [[False, True, False, False, False]]

    def test_what_is_no_candidate_never_counts(self, name: str) -> None:
        rng = random.Random(1)
        for row in random_rows(11, 50):
            mask = [rng.random() < 0.6 for _ in row]
            alone = [value for value, is_open in zip(row, mask, strict=True) if is_open]
            if not alone:
                continue
            given = profile([row], KNOBS, [3], [mask])
            visible = Profile(torch.tensor([row], dtype=torch.float64), given.candidates, given.quota, given.knobs)
            wanted = rule(name).choose(profile([alone], KNOBS, [3]))[0].tolist()
            for one in (given, visible):  # a confidence beside the candidates changes nothing
                taken = rule(name).choose(one)[0]
                assert taken[torch.tensor(mask)].tolist() == wanted
                assert not taken[~torch.tensor(mask)].any()

    def test_rows_know_nothing_of_each_other(self, name: str) -> None:
        rows = random_rows(4, 60)
        quota = [1 + i % 7 for i in range(len(rows))]
        together = rule(name).choose(profile(rows, KNOBS, quota, width=40))
        for i, row in enumerate(rows):
            alone = rule(name).choose(profile([row], KNOBS, [quota[i]]))[0]
            assert together[i, : len(row)].tolist() == alone.tolist()
            assert not together[i, len(row) :].any()

    def test_the_card_holds_what_it_takes(self, name: str) -> None:
        card = rule(name).card
        assert card.name == name
        assert card.measure in ("probability", "margin", "entropy", "random")
        for knob in card.knobs:
            assert knob.problem(knob.default) is None
        settled = dict(card.settle({}))
        taken: Tensor = rule(name).choose(profile([[0.3, 0.99]], settled))
        assert bool(taken[0, 1])
