"""How many tokens a denoise step has to commit, for rules that follow a schedule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.diffusion import DiffusionSpec, RuleCard
from engine.types import Request

_LAST_TIME = 1e-3  # Dream's process ends a little before time 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """`steps` of a whole block; 0: as many as it has masks, one token a step.

    LLaDA's gives every step an equal share, the larger shares first. In Dream's (`times`), time goes from 1 to nearly
    0 in equal steps, and from time t to s a mask falls with probability 1 - s / t.
    """

    steps: int = 0
    times: bool = False

    @classmethod
    def of(cls, request: Request, spec: DiffusionSpec, length: int, card: RuleCard) -> Schedule:
        """`request.diffusion.steps` are those of a whole canvas: each block of `length` gets its share of them.

        Rules that follow no schedule are asked for one token a step.
        """
        params = request.diffusion
        if not (card.scheduled and params.steps):
            return cls()
        room = params.canvas or -(-max(request.sampling.max_tokens, 1) // length) * length
        return cls(max(1, round(params.steps * length / room)), spec.dream_schedule)

    def quota(self, step: int, begun: int, left: int) -> int:
        """For denoise step `step` (0 is the first) of a block that began with `begun` masks and has `left` of them."""
        steps = min(self.steps or begun, begun)
        if not self.times:
            return max(1, begun // steps + (step < begun % steps))
        if step >= steps - 1:
            return left
        times = np.linspace(1.0, _LAST_TIME, steps + 1)
        return max(1, int(left * (1 - times[step + 1] / times[step])))
