"""Fast-dLLM's rule: every token that is sure enough, c >= threshold, and always the surest.

Wu et al., "Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding" (2025),
section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.diffusion import RuleCard
from engine.protocols import Profile
from engine.unmasking.ranking import confidences, knob, surest
from engine.verification import Knob


class ThresholdRule:
    """See `protocols.UnmaskRule`. Above 1, one token a step."""

    card = RuleCard(
        "threshold",
        "commits all tokens whose probability is at least the threshold",
        (Knob("threshold", 0.9, 0.0, 2.0, "least probability; above 1, one token a step"),),
    )

    def choose(self, profile: Profile) -> Tensor:
        best = surest(profile, torch.ones_like(profile.quota))
        return best | (profile.candidates & (confidences(profile) >= knob(profile, "threshold")))
