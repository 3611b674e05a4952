"""`bench diffusion`: paired statistics of answers, the best at equal accuracy, halves, frontier, confidences."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from benchmarks.diffusion_confidence import EDGES, Confidences
from benchmarks.diffusion_figures import Paired, Sample, frontier, halves, part
from benchmarks.verifiers_figures import Estimate


def samples(scores: list[float], forwards: list[int], tokens: int = 12) -> list[Sample]:
    return [Sample(score, tokens, count) for score, count in zip(scores, forwards, strict=True)]


def test_measures_by_hand() -> None:
    ours, theirs = samples([1, 0, 1, 1], [2, 4, 2, 4]), samples([1, 1, 0, 1], [4, 4, 4, 12])
    found = Paired({"a": ours, "b": theirs})
    assert found.of("a", "accuracy").value == 0.75 and found.less("a", "b").value == 0
    assert found.of("a", "tokens_per_forward").value == 48 / 12 and found.times("a", "b").value == 2
    assert found.of("a", "forwards").value == 3 and found.sides("a", "b") == (3, 1, 0)
    assert found.sides("b", "a") == (0, 1, 3) and found.of("b", "tokens").value == 12
    both = Sample(1, 12, 2, draft_forwards=4, positions=30, draft_positions=100)
    assert Paired({"a": [both]}).of("a", "tokens_per_forward") == Estimate(2, 2, 2)
    assert both.cost(10, 1) == 400 and both.cost(10) == 300
    wrong: list[dict[str, list[Sample]]] = [{}, {"a": []}, {"a": ours, "b": theirs[:2]}]
    for given in wrong:
        with pytest.raises(ValueError):
            Paired(given)


def test_an_interval_is_as_wide_as_theory_says() -> None:
    """Of a share p of n cases: 1.96 sqrt(p (1 - p) / n), within the noise of 2000 resamples."""
    drawn = random.Random(1)
    found = Paired({"a": [Sample(float(drawn.random() < 0.8), 1, 1) for _ in range(300)]}).of("a", "accuracy")
    wide = 1.96 * math.sqrt(found.value * (1 - found.value) / 300)
    for side in (found.value - found.low, found.high - found.value):
        assert side == pytest.approx(wide, rel=0.12)


def test_differences_and_quotients_are_paired() -> None:
    """Cases differ by far more than variants do: unpaired, the difference would drown."""
    drawn = random.Random(2)
    theirs = [drawn.randint(10, 1000) for _ in range(60)]
    found = Paired({"a": samples([0.5] * 60, [2 * one for one in theirs]), "b": samples([0.25] * 60, theirs)})
    assert found.times("b", "a") == Estimate(2, 2, 2) and found.less("a", "b") == Estimate(0.25, 0.25, 0.25)
    alone = found.of("a", "forwards")
    assert alone.high - alone.low > 0.1 * alone.value


def test_the_best_at_equal_accuracy() -> None:
    """Speed counts among those that are no more than a point worse, and choosing is part of the interval."""
    n = 200
    right = [1.0] * 160 + [0.0] * 40
    found = Paired(
        {
            "reference": samples(right, [6] * n),
            "slow": samples(right, [12] * n),
            "fast": samples(right[2:] + [0.0] * 2, [4] * n),  # exactly a point less
            "fastest": samples(right[3:] + [0.0] * 3, [2] * n),
        }
    )
    best = found.best(["slow", "fast", "fastest"], "reference")
    assert best is not None and best.name == "fast" and best.less.value == pytest.approx(-0.01)
    assert best.times.value == 1.5 and best.times.low < 1 and best.times.high == 3, "another wins in some resamples"
    assert found.best(["fastest"], "reference") is None
    twins = Paired(
        {"reference": samples(right, [6] * n), "twin": samples(right, [3] * n), "sure": samples([1.0] * n, [12] * n)}
    )
    twin = twins.best(["twin", "sure"], "reference")
    assert twin is not None and twin.times == Estimate(2, 2, 2), "a resample is held against its own reference"
    certain = found.best(["slow", "reference"], "reference")
    assert certain is not None and (certain.name, certain.times) == ("reference", Estimate(1, 1, 1))


def test_halves_are_by_confidence_alone() -> None:
    sure = [
        replace(one, confidence=value)
        for one, value in zip(samples([0] * 5, [1] * 5), (0.9, 1, 0.2, 0.9, 0.5), strict=True)
    ]
    assert halves(sure) == ([0, 1, 3], [2, 4])
    assert halves(sure[:1]) == ([0], [])
    assert part({"a": sure}, [2, 4])["a"] == [sure[2], sure[4]]


def test_the_frontier() -> None:
    points = {"slow": (1.0, 0.9), "worse": (0.5, 0.8), "fast": (3.0, 0.7), "same": (3.0, 0.6), "middle": (2.0, 0.7)}
    assert frontier(points) == ["slow", "fast"]


def test_confidences_are_counted() -> None:
    seen = Confidences()
    seen.take([1.0, 0.05, 0.9])
    seen.take([0.9989, 0.95])
    found = seen.histogram("x")
    counts = {low: count for low, count in zip(EDGES, found.counts, strict=False) if count}
    assert counts == {0.0: 1, 0.9: 1, 0.95: 1, 0.99: 1, 0.9999: 1} and found.total == 5
    assert found.above == ((0.9, 0.8), (0.99, 0.4), (0.999, 0.2))
