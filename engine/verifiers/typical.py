"""Typical acceptance: a drafted token stands if the target finds it likely enough for how sure it is.

It always stands if p(x) > min(posterior_threshold, posterior_alpha exp(-H(p))), H being the entropy of p in nats, and
else as in `rejection`. Cai et al., "Medusa" (2024), section 3.3.2; there a token that is not typical never stands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.protocols import DraftProposal, TargetRows, Verdict
from engine.verification import Knob, VerifierCard
from engine.verifiers.kernel import setting, stretch


class TypicalVerifier:
    """See `protocols.Verifier`. Chains only."""

    card = VerifierCard(
        "typical",
        False,
        "accepts what is likely enough under the target, by its entropy",
        (
            Knob("posterior_threshold", 0.3, 0.0, 1.0, "probability above which a token always stands"),
            Knob("posterior_alpha", 0.09, 0.0, 100.0, "the same, as a multiple of exp(-entropy)"),
        ),
        drawn=True,
    )
    needs_laws = True
    needs_marginal = needs_states = trees = False

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        assert target.log_probs is not None
        typical = setting(target, "posterior_alpha").log() - entropies(target.log_probs[:, :-1])
        floor = setting(target, "posterior_threshold").log().minimum(typical)
        return stretch(proposal, target, _above, floor)


def _above(log_p: Tensor, floor: Tensor) -> Tensor:
    return torch.where(log_p > floor, float("inf"), 0.0)


def entropies(log_probs: Tensor) -> Tensor:
    """In nats, [n, k] float64, of rows [n, k, vocabulary]; one position after another."""
    found = log_probs.new_zeros(log_probs.shape[:2], dtype=torch.float64)
    for step in range(found.shape[1]):
        log_p = log_probs[:, step]
        found[:, step] = log_p.clamp(min=-1e4).mul_(log_p.exp()).sum(1).neg_()  # the least: no NaN where p is 0
    return found
