"""Arithmetic of `slipstream bench diffusion`: from answers to accuracy, tokens per forward and cost, with intervals.

Every measure is a ratio of two sums over the cases. Cases are drawn anew with replacement, and the same draws serve all
variants, so that differences and quotients of two of them are paired. Where the best of several variants is told, it
is chosen anew in each resample, so that the interval holds the luck of choosing, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.verifiers_figures import RESAMPLES, Estimate, Sums, estimate

POINT = 0.01  # of accuracy: what counts as equal
_ROUNDING = 1e-9  # of a sum of scores


@dataclass(frozen=True, slots=True)
class Sample:
    """What one case got. `forwards` are of the model, `draft_forwards` of a drafter that is a model of its own.

    `positions` and `draft_positions` were fed by them; `confidence`: the mean at commit, where it was asked for.
    """

    score: float
    tokens: int
    forwards: int
    draft_forwards: int = 0
    positions: int = 0
    draft_positions: int = 0
    verifies: int = 0
    remasked: int = 0
    confidence: float = 0.0

    def cost(self, parameters: float, draft_parameters: float = 0.0) -> float:
        """Multiplications by weights: positions fed times the parameters of what they went through."""
        return self.positions * parameters + self.draft_positions * draft_parameters


Measure = Callable[[Sample], tuple[float, float]]  # above and below the line
MEASURES: Mapping[str, Measure] = {
    "accuracy": lambda one: (one.score, 1),
    "tokens_per_forward": lambda one: (one.tokens, one.forwards + one.draft_forwards),
    "forwards": lambda one: (one.forwards + one.draft_forwards, 1),
    "tokens": lambda one: (one.tokens, 1),
}


class Paired:
    """All variants' answers to the same cases, resampled together. Raises ValueError without cases."""

    def __init__(self, samples: Mapping[str, Sequence[Sample]], resamples: int = RESAMPLES, seed: int = 0) -> None:
        sizes = {len(own) for own in samples.values()}
        if len(sizes) != 1 or not all(sizes):
            raise ValueError("every variant needs an answer to each of the cases, and there must be some")
        self.cases = sizes.pop()
        self._samples = samples
        random = np.random.default_rng(seed)
        # [resamples, cases]: how often each case was drawn
        self._counts = random.multinomial(self.cases, np.full(self.cases, 1 / self.cases), resamples).astype(np.float64)

    def of(self, name: str, measure: str | Measure) -> Estimate:
        """One measure of one variant."""
        return estimate(*self._ratio(name, measure))

    def less(self, name: str, other: str, measure: str | Measure = "accuracy") -> Estimate:
        """The first variant's less the other's."""
        (mine, my), (theirs, their) = self._ratio(name, measure), self._ratio(other, measure)
        return estimate(mine - theirs, my - their)

    def times(self, name: str, other: str, measure: str | Measure = "tokens_per_forward") -> Estimate:
        """The first variant's over the other's."""
        (mine, my), (theirs, their) = self._ratio(name, measure), self._ratio(other, measure)
        return estimate(mine / theirs, my / their)

    def best(self, names: Sequence[str], reference: str, points: float = POINT) -> Best | None:
        """The variant with most tokens per forward among those no more than `points` less accurate than the reference.

        None where there is none; resamples in which there is none do not count.
        """
        accuracies = [self._ratio(name, "accuracy") for name in names]
        lengths = [self._ratio(name, "tokens_per_forward") for name in names]
        (right, rights), (length, many) = (self._ratio(reference, key) for key in ("accuracy", "tokens_per_forward"))
        fitting = np.array([one >= right - points - _ROUNDING for one, _ in accuracies])
        if not fitting.any():
            return None
        chosen = int(np.where(fitting, [one for one, _ in lengths], -np.inf).argmax())
        each = np.stack([own >= rights - points - _ROUNDING for _, own in accuracies])
        tried = np.where(each, np.stack([own for _, own in lengths]), -np.inf).max(axis=0) / many
        ratio = estimate(lengths[chosen][0] / length, tried)
        return Best(
            names[chosen], self.of(names[chosen], "tokens_per_forward"), self.less(names[chosen], reference), ratio
        )

    def sides(self, name: str, other: str) -> tuple[int, int, int]:
        """Cases that took the first variant fewer forwards than the other, as many, and more."""
        ours, theirs = ([MEASURES["forwards"](one)[0] for one in self._samples[key]] for key in (name, other))
        signs = [(mine > their) - (mine < their) for mine, their in zip(ours, theirs, strict=True)]
        return signs.count(-1), signs.count(0), signs.count(1)

    def _ratio(self, name: str, measure: str | Measure) -> tuple[float, Sums]:
        """On all cases, and of each resample."""
        take = MEASURES[measure] if isinstance(measure, str) else measure
        parts = np.array([take(one) for one in self._samples[name]], dtype=np.float64)
        above, below = parts[:, 0], parts[:, 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            resampled = (self._counts @ above) / (self._counts @ below)
            return float(np.divide(above.sum(), below.sum())), resampled


@dataclass(frozen=True, slots=True)
class Best:
    """The fastest of some variants at equal accuracy: `less` in accuracy, and `times` as many tokens per forward."""

    name: str
    tokens_per_forward: Estimate
    less: Estimate
    times: Estimate


def halves(samples: Sequence[Sample]) -> tuple[list[int], list[int]]:
    """Places of the half of the cases that the model is surest of, and of the others; ties stay in their order."""
    order = sorted(range(len(samples)), key=lambda place: -samples[place].confidence)
    middle = (len(order) + 1) // 2
    return sorted(order[:middle]), sorted(order[middle:])


def part(samples: Mapping[str, Sequence[Sample]], places: Iterable[int]) -> dict[str, list[Sample]]:
    """Some of the cases."""
    chosen = list(places)
    return {name: [own[place] for place in chosen] for name, own in samples.items()}


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of those that none beats: by rising first value, each with a higher second one than all dearer ones.

    A point is (gain, quality), more of both is better.
    """
    kept: list[str] = []
    highest = -np.inf
    for name in sorted(points, key=lambda key: (-points[key][0], -points[key][1])):
        if points[name][1] > highest:
            kept.append(name)
            highest = points[name][1]
    return kept[::-1]
