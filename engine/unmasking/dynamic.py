"""SDAR's "low_confidence_dynamic": all tokens with c > threshold where that is at least the schedule's quota of them,
else the surest tokens up to the quota.

Cheng et al., "SDAR: A Synergistic Diffusion-AutoRegression Paradigm for Scalable Sequence Generation" (2025).
"""

from __future__ import annotations

from torch import Tensor

from engine.diffusion import RuleCard
from engine.protocols import Profile
from engine.unmasking.ranking import confidences, knob, surest
from engine.verification import Knob


class DynamicRule:
    """See `protocols.UnmaskRule`."""

    card = RuleCard(
        "dynamic",
        "commits all tokens more probable than the threshold, and never fewer than the schedule asks for",
        (Knob("threshold", 0.85, 0.0, 2.0, "probability that a token must exceed"),),
        scheduled=True,
    )

    def choose(self, profile: Profile) -> Tensor:
        sure = profile.candidates & (confidences(profile) > knob(profile, "threshold"))
        # At least the quota are above the threshold, or the quota's surest hold all that are: it is a union.
        return sure | surest(profile, profile.quota)
