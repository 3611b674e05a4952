"""min_p, top_k and top_p: hand-worked cases, ties, and random rows against the slow reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from engine.runtime.sampler import Sampler, SamplingState
from engine.types import Request, SamplingParams
from tests.numeric.sampler_reference import law, row, state


def kept(logits: torch.Tensor, **params) -> list[int]:
    laws = Sampler(logits.shape[1]).processed_log_probs(logits, [state(**params)])
    return laws[0].isfinite().nonzero().squeeze(1).tolist()


def logs(*probabilities: float) -> torch.Tensor:
    return row(*(math.log(p) for p in probabilities))


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probabilities = logs(0.1, 0.4, 0.2, 0.3)
    assert kept(probabilities, top_p=0.39) == [1]
    assert kept(probabilities, top_p=0.41) == [1, 3]
    assert kept(probabilities, top_p=0.69) == [1, 3]
    assert kept(probabilities, top_p=0.71) == [1, 2, 3]
    assert kept(probabilities, top_p=0.91) == [0, 1, 2, 3]
    assert kept(probabilities, top_p=1e-12) == [1]
    assert kept(row(0.0, 0.0, 0.0, 0.0), top_p=0.5) == [0, 1]  # exactly reached


def test_min_p_is_relative_to_the_largest() -> None:
    probabilities = logs(0.1, 0.5, 0.15, 0.25)
    assert kept(probabilities, min_p=0.49) == [1, 3]
    assert kept(probabilities, min_p=0.29) == [1, 2, 3]
    assert kept(probabilities, min_p=1.0) == [1]


def test_each_filter_works_on_what_the_one_before_left() -> None:
    probabilities = logs(0.4, 0.3, 0.2, 0.1)
    assert kept(probabilities, top_p=0.65) == [0, 1]
    assert kept(probabilities, top_p=0.65, top_k=3) == [0, 1]
    assert kept(probabilities, top_p=0.55, top_k=2) == [0]  # 0.4 of 0.7 reaches 0.55
    assert kept(probabilities, top_p=0.55, min_p=0.6) == [0]  # likewise after min_p left two
    assert kept(probabilities, top_k=3, min_p=0.6) == [0, 1]


def test_filters_see_the_tempered_distribution() -> None:
    values = row(0.0, -1.0, -2.0)
    assert kept(values, min_p=0.3) == [0, 1]
    assert kept(values, min_p=0.3, temperature=2.0) == [0, 1, 2]
    assert kept(values, top_p=0.85, temperature=0.5) == [0]
    assert kept(values, top_p=0.85, temperature=1.0) == [0, 1]


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.7}])
def test_ties_stay_by_lowest_id(params: dict) -> None:
    values = row(1.0, 0.0, 2.0, 1.0, -50.0, 1.0, 1.0)
    weights = [math.exp(value) for value in values[0].tolist()]
    expected = [token for token, p in enumerate(law(values[0].tolist(), SamplingParams(1, **params))) if p > 0]
    assert len(expected) < len(weights)
    assert kept(values, **params) == expected


@pytest.mark.parametrize("size", [100, 3000, 20_000])
def test_ties_of_a_whole_row_stay_by_lowest_id(size: int) -> None:
    assert kept(torch.zeros(1, size), top_k=70) == list(range(70))
    assert kept(torch.zeros(1, size), top_p=0.5 - 0.2 / size) == list(range(size // 2))


def test_top_k_beyond_the_vocabulary_or_the_finite_tokens_keeps_all_of_them() -> None:
    values = row(1.0, -math.inf, 0.5, -math.inf)
    for params in ({"top_k": 3}, {"top_k": 4}, {"top_k": 99}, {"top_p": 0.999999}, {"min_p": 1e-9}):
        assert kept(values, **params) == [0, 2]


GRID = list(itertools.product([0, 1, 4, 50, 200], [1.0, 0.9, 0.3], [0.0, 0.02, 0.3], [1.0, 0.6, 1.8]))


@pytest.mark.parametrize("size", [50, 500, 5000])
def test_random_rows_equal_the_slow_reference(size: int) -> None:
    """All mixes in one batch; peaked and flat rows need different numbers of sorted values."""
    generator = torch.Generator().manual_seed(size)
    grid = GRID[:: 1 + size // 2000]
    logits = torch.randn(len(grid), size, generator=generator) * torch.linspace(0.2, 5.0, len(grid)).unsqueeze(1)
    params = [SamplingParams(1, top_k=k, top_p=p, min_p=m, temperature=t) for k, p, m, t in grid]
    states = [SamplingState(Request("r", (1, 2), one)) for one in params]
    laws = Sampler(size).processed_log_probs(logits, states).exp()
    for values, got, one in zip(logits.tolist(), laws.tolist(), params, strict=True):
        want = law(values, one)
        assert [p > 0 for p in got] == [p > 0 for p in want], one
        assert got == pytest.approx(want, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("params", [{"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_only_kept_tokens_are_drawn(params: dict) -> None:
    values = torch.randn(1, 200, generator=torch.Generator().manual_seed(1))
    allowed = set(kept(values, **params))
    tokens = Sampler(200).sample(values.repeat(2000, 1), [state(seed=seed, **params) for seed in range(2000)]).tokens
    assert set(tokens.tolist()) == allowed
