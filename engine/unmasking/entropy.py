"""Dream's "entropy": as many positions as the schedule asks for, those whose distribution has the least entropy.

Ye et al., "Dream 7B: Diffusion Large Language Models" (2025).
"""

from __future__ import annotations

from torch import Tensor

from engine.diffusion import RuleCard
from engine.protocols import Profile
from engine.unmasking.ranking import surest


class EntropyRule:
    """See `protocols.UnmaskRule`. Confidences are sums of p log p."""

    card = RuleCard(
        "entropy",
        "commits where the distribution has the least entropy, by a schedule",
        measure="entropy",
        scheduled=True,
    )

    def choose(self, profile: Profile) -> Tensor:
        return surest(profile, profile.quota)
