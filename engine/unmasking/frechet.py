"""Fast-dLLM++'s rule: the surest n whose joint probability certainly beats any other's by more than delta.

arXiv 2606.02955. L_n = sum_{j<=n} c_(j) - (n - 1) is the Frechet-Hoeffding lower bound on the probability that all n
are right, U_n = 1 - c_(n) bounds that of any other choice; the largest n with L_n - U_n > delta is taken. In errors:
sum_{j<=n} e_(j) + e_(n) < 1 - delta. The left side grows with n. Where all confidences are equal that is `factor` with
1 - delta; elsewhere it commits no fewer.
"""

from __future__ import annotations

from torch import Tensor

from engine.diffusion import RuleCard
from engine.protocols import Profile
from engine.unmasking.ranking import falling, knob, surest
from engine.verification import Knob


class FrechetRule:
    """See `protocols.UnmaskRule`. From delta 1 on, one token a step."""

    card = RuleCard(
        "frechet",
        "commits the likeliest n tokens while the Frechet bound beats every other choice by more than delta",
        (Knob("delta", 0.25, -8.0, 8.0, "safety margin of the bound; 1 and more is one token a step"),),
    )

    def choose(self, profile: Profile) -> Tensor:
        errors = 1 - falling(profile)
        return surest(profile, (errors.cumsum(1) + errors < 1 - knob(profile, "delta")).sum(1))
