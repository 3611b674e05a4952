"""The factor rule as Fast-dLLM's published code has it, to reproduce published numbers.

Its scan ends at the first candidate that fails and commits those before it, but where that candidate is the last of
all, it is committed, too: of two masks with c = (.4, .3) both go.
"""

from __future__ import annotations

from torch import Tensor

from engine.diffusion import RuleCard
from engine.protocols import Profile
from engine.unmasking.factor import FACTOR, passes
from engine.unmasking.ranking import surest


class FactorCompatRule:
    """See `protocols.UnmaskRule`."""

    card = RuleCard(
        "factor_compat", "factor as in its published code, which also commits a failing last token", (FACTOR,)
    )

    def choose(self, profile: Profile) -> Tensor:
        counts = passes(profile).clamp(min=1)
        last = counts == profile.candidates.sum(1) - 1
        return surest(profile, counts + last.long())
