"""As many positions as the schedule asks for, in random order: the plain reverse process of masked diffusion."""

from __future__ import annotations

from torch import Tensor

from engine.diffusion import RuleCard
from engine.protocols import Profile
from engine.unmasking.ranking import surest


class RandomRule:
    """See `protocols.UnmaskRule`. The order is that of uniform numbers, which come in as confidences."""

    card = RuleCard("random", "commits tokens in random order, by a schedule", measure="random", scheduled=True)

    def choose(self, profile: Profile) -> Tensor:
        return surest(profile, profile.quota)
