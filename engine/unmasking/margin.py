"""Dream's "topk_margin": as many positions as the schedule asks for, those whose best token leads by most.

Kim et al., "Train for the Worst, Plan for the Best" (ICML 2025); Ye et al., "Dream 7B" (2025).
"""

from __future__ import annotations

from torch import Tensor

from engine.diffusion import RuleCard
from engine.protocols import Profile
from engine.unmasking.ranking import surest


class MarginRule:
    """See `protocols.UnmaskRule`. Confidences are the distances of the two largest probabilities."""

    card = RuleCard(
        "margin", "commits where the best token leads the next by most, by a schedule", measure="margin", scheduled=True
    )

    def choose(self, profile: Profile) -> Tensor:
        return surest(profile, profile.quota)
