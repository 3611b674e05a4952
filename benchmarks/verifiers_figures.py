"""Arithmetic of `slipstream bench verifiers`: from answers to measures, with bootstrap intervals over prompts.

Every measure is a ratio of two sums over answers, so that long answers count for what they are. Prompts are drawn anew
with replacement, all answers to a prompt together, and the same draws serve every verifier: differences between two of
them are paired (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, percentile intervals).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.drafts_figures import Round, first_difference

RESAMPLES = 2000
LEVEL = 0.95
Sums = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. `rounds` are those whose drafts were not cut by the end of the answer.

    `nll`: minus the sum of the target's raw log-probabilities of its tokens, in nats; `best`: how many of these were
    the target's most likely token there; `bias`: the sum of what is reported per token. `kept` of `length` tokens are
    those of the strict greedy answer before the first difference; None where there is no such answer.
    """

    prompt: int
    tokens: tuple[int, ...]
    rounds: tuple[Round, ...] = ()
    nll: float = 0.0
    best: int = 0
    bias: float = 0.0
    score: float | None = None
    kept: int | None = None
    length: int = 0

    def beside(self, strict: Sequence[int]) -> Sample:
        """The same, compared with the strict greedy answer."""
        at = first_difference(strict, self.tokens)
        return replace(self, kept=len(strict) if at is None else at, length=len(strict))

    @property
    def equal(self) -> bool:
        return self.kept == self.length == len(self.tokens)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measure and its 95 % interval; NaN where there was nothing to divide by."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Estimate:
        """Through a rising function."""
        return Estimate(function(self.value), function(self.low), function(self.high))


Part = tuple[float, float]  # of one answer, above and below the line; (0, 0) counts for nothing
NOTHING = (0.0, 0.0)
MEASURES: Mapping[str, Callable[[Sample], Part]] = {
    "tokens_per_round": lambda s: (sum(one.tokens for one in s.rounds), len(s.rounds)),
    "acceptance": lambda s: (sum(one.accepted for one in s.rounds), sum(one.drafted for one in s.rounds)),
    "bias": lambda s: (s.bias, len(s.tokens)),
    "nll": lambda s: (s.nll, len(s.tokens)),
    "target_best": lambda s: (s.best, len(s.tokens)),
    "score": lambda s: NOTHING if s.score is None else (s.score, 1.0),
    "equal_answers": lambda s: NOTHING if s.kept is None else (s.equal, 1.0),
    "equal_tokens": lambda s: NOTHING if s.kept is None else (s.kept, s.length),
    "answer_tokens": lambda s: (len(s.tokens), 1.0),
}


class Bootstrap:
    """Resamples of so many prompts; one object serves all that is to be compared."""

    def __init__(self, prompts: int, resamples: int = RESAMPLES, seed: int = 0) -> None:
        """Raises ValueError without prompts."""
        if prompts < 1:
            raise ValueError("no prompts")
        random = np.random.default_rng(seed)
        # [resamples, prompts]: how often each prompt was drawn
        self._counts = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(np.float64)
        self._prompts = prompts

    def ratio(self, samples: Sequence[Sample], measure: Callable[[Sample], Part]) -> Estimate:
        """One measure of some answers."""
        above, below = self._sums(samples, measure)
        return estimate(_divide(above.sum(), below.sum()), self._resampled(above, below))

    def change(self, ours: Sequence[Sample], theirs: Sequence[Sample], measure: Callable[[Sample], Part]) -> Estimate:
        """Ours less theirs, of answers to the same prompts."""
        mine, other = self._sums(ours, measure), self._sums(theirs, measure)
        value = _divide(mine[0].sum(), mine[1].sum()) - _divide(other[0].sum(), other[1].sum())
        return estimate(value, self._resampled(*mine) - self._resampled(*other))

    def _sums(self, samples: Sequence[Sample], measure: Callable[[Sample], Part]) -> tuple[Sums, Sums]:
        """Of each prompt, over all of its answers: [prompts] above and below the line."""
        above, below = np.zeros(self._prompts), np.zeros(self._prompts)
        for sample in samples:
            part = measure(sample)
            above[sample.prompt] += part[0]
            below[sample.prompt] += part[1]
        return above, below

    def _resampled(self, above: Sums, below: Sums) -> Sums:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.divide(self._counts @ above, self._counts @ below)


def _divide(above: float, below: float) -> float:
    return float(above / below) if below else math.nan


def estimate(value: float, resampled: Sums) -> Estimate:
    """The percentile interval of a value; resamples that divided by nothing do not count."""
    seen = resampled[np.isfinite(resampled)]
    if not len(seen) or math.isnan(value):
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(seen, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def histogram(samples: Sequence[Sample]) -> tuple[int, ...]:
    """[a]: rounds in which a drafted tokens stood."""
    stood = [one.accepted for sample in samples for one in sample.rounds]
    return tuple(stood.count(a) for a in range(max(stood, default=-1) + 1))


def estimates(bootstrap: Bootstrap, samples: Sequence[Sample]) -> dict[str, Estimate]:
    """All measures, and the perplexity that follows from the mean negative log-likelihood per token."""
    found = {name: bootstrap.ratio(samples, measure) for name, measure in MEASURES.items()}
    return found | {"perplexity": found["nll"].map(math.exp)}


def changes(bootstrap: Bootstrap, ours: Sequence[Sample], strict: Sequence[Sample]) -> dict[str, Estimate]:
    """All measures less those of strict, paired by prompt."""
    return {name: bootstrap.change(ours, strict, measure) for name, measure in MEASURES.items()}
