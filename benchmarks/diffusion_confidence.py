"""How sure a model is of the places it could commit: every confidence that an unmask rule was shown, counted.

For as long as a run lasts, the rules count before they choose as ever.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from engine.diffusion import RuleCard
from engine.protocols import Profile, UnmaskRule
from engine.registry import RULES, resolve

if TYPE_CHECKING:
    import torch

    Choose = Callable[[UnmaskRule, Profile], torch.Tensor]

EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999, 1.0)
LEVELS = (0.9, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Confidences at candidate positions of every pass of a run: `counts[i]` from `edges[i]` up to the next.

    `above`: (level, share of them at least so high).
    """

    variant: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    above: tuple[tuple[float, float], ...]

    @property
    def total(self) -> int:
        return sum(self.counts)


class Confidences:
    """Counts what a run's rules are shown."""

    def __init__(self) -> None:
        self._counts = [0] * (len(EDGES) - 1)
        self._above = dict.fromkeys(LEVELS, 0)

    def take(self, values: list[float]) -> None:
        values.sort()
        places = [bisect_left(values, edge) for edge in EDGES[:-1]] + [len(values)]
        for i, (first, last) in enumerate(pairwise(places)):
            self._counts[i] += last - first
        for level in LEVELS:
            self._above[level] += len(values) - bisect_left(values, level)

    def histogram(self, variant: str) -> Histogram:
        total = max(sum(self._counts), 1)
        shares = tuple((level, count / total) for level, count in self._above.items())
        return Histogram(variant, EDGES, tuple(self._counts), shares)


@contextmanager
def watching() -> Iterator[Confidences]:
    """Count what all rules of this process that look at probabilities are shown meanwhile."""
    seen = Confidences()
    kinds = [cast(type[UnmaskRule], resolve(RULES, name, "unmask rule")) for name in RULES]
    before = [(kind, kind.choose) for kind in kinds if cast(RuleCard, kind.card).measure == "probability"]
    for kind, choose in before:
        setattr(kind, "choose", _counted(choose, seen))  # noqa: B010  # a method is no variable to assign to
    try:
        yield seen
    finally:
        for kind, choose in before:
            setattr(kind, "choose", choose)  # noqa: B010


def _counted(choose: Choose, seen: Confidences) -> Choose:
    def counted(rule: UnmaskRule, profile: Profile) -> torch.Tensor:
        seen.take(profile.confidence[profile.candidates].tolist())
        return choose(rule, profile)

    return counted
