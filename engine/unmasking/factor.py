"""Fast-dLLM's factor rule: the surest n with (n + 1)(1 - c_(n)) <= factor, for the largest such n.

Wu et al., "Fast-dLLM" (2025), theorem 1: with a factor of 1, where all n errors are below e and (n + 1) e <= 1, the
likeliest tokens of the marginals are the likeliest of the joint. Equality counts (their paper writes <). Errors grow
with n and so does the left side: the first n that fails is the end.
"""

from __future__ import annotations

from torch import Tensor

from engine.diffusion import RuleCard
from engine.protocols import Profile
from engine.unmasking.ranking import falling, knob, numbers, surest
from engine.verification import Knob

FACTOR = Knob("factor", 1.0, 0.0, 64.0, "most that (n + 1) times the n-th error may be; 0 is one token a step")


class FactorRule:
    """See `protocols.UnmaskRule`."""

    card = RuleCard("factor", "commits the likeliest n tokens while (n + 1)(1 - c_n) <= factor", (FACTOR,))

    def choose(self, profile: Profile) -> Tensor:
        return surest(profile, passes(profile))


def passes(profile: Profile) -> Tensor:
    """[n] int64: how many of the surest candidates pass; the test has the form, and so the rounding, of their code."""
    rows = falling(profile)
    return (rows >= 1 - knob(profile, "factor") / (numbers(rows) + 1)).sum(1)
