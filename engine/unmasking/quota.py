"""LLaDA's rule: as many of the surest positions as an even schedule over the block's steps asks for.

Nie et al., "Large Language Diffusion Models" (2025), low-confidence remasking.
"""

from __future__ import annotations

from torch import Tensor

from engine.diffusion import RuleCard
from engine.protocols import Profile
from engine.unmasking.ranking import surest


class QuotaRule:
    """See `protocols.UnmaskRule`."""

    card = RuleCard("quota", "commits the likeliest tokens, an equal share of the block in each step", scheduled=True)

    def choose(self, profile: Profile) -> Tensor:
        return surest(profile, profile.quota)
