"""Distributions of token counts, as a user writes them: 128, 100-300, normal:200:50, lognormal:150:0.8."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["fixed", "uniform", "normal", "lognormal"]


@dataclass(frozen=True, slots=True)
class Lengths:
    """`a` and `b` are: N and N; the lowest and highest; mean and standard deviation; median and sigma of the log."""

    kind: Kind
    a: float
    b: float

    @classmethod
    def fixed(cls, count: int) -> Lengths:
        return cls("fixed", count, count)

    def draw(self, source: random.Random) -> int:
        """A count of at least 1; the tails of normal and lognormal are cut at four times the middle."""
        if self.kind in ("fixed", "uniform"):
            return source.randint(int(self.a), int(self.b))
        drawn = source.gauss(self.a, self.b) if self.kind == "normal" else self.a * math.exp(source.gauss(0, self.b))
        return max(1, min(round(drawn), round(4 * self.a)))


def parse_lengths(text: str) -> Lengths:
    """Raises ValueError with a sentence for the user."""
    kind, *numbers = text.split(":")
    try:
        if not numbers:
            low, dash, high = text.partition("-")
            first, last = int(low), int(high if dash else low)
            if 1 <= first <= last:
                return Lengths("uniform" if dash else "fixed", first, last)
        elif kind in ("normal", "lognormal"):
            middle, spread = map(float, numbers)
            if 1 <= middle < math.inf and 0 <= spread < math.inf:
                return Lengths("normal" if kind == "normal" else "lognormal", middle, spread)
    except ValueError:
        pass
    raise ValueError(f"{text!r} is none of N, LOW-HIGH, normal:MEAN:SD and lognormal:MEDIAN:SIGMA, from 1 up")
