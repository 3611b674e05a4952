"""Block verification: the whole draft is weighed, and what stands is its longest prefix that a coin lets pass.

With c_i = min(1, c_(i-1) p_i / g_i) at the drafted tokens and R_i = sum (c_i p_(i+1) - g_(i+1))+, a prefix of i tokens
passes with R_i / (R_i + 1 - c_i), the whole draft with its c. Every prefix has a coin of its own, the largest that
passes counts, and after it comes a draw from (c_i p_(i+1) - g_(i+1))+. The law of what is written is the target's, and
no verifier that knows no more accepts more tokens of a draft: a token that falls by itself may stand in good company.
Sun et al., "Block Verification Accelerates Speculative Decoding" (2024), algorithm 2.

All coins are looked at, those behind the end of the prefix too: no later round may meet them again. Chosen tokens gain
nothing by it, and are verified one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.protocols import Delta, Dense, DraftProposal, TargetRows, Verdict
from engine.verification import VerifierCard
from engine.verifiers.kernel import Drafted, chosen, conclude, left_over, log_ratios, widened


class BlockVerifier:
    """See `protocols.Verifier`. Chains only."""

    card = VerifierCard("block", True, "weighs a draft as a whole; accepts no less than rejection", drawn=True)
    needs_laws = True
    needs_marginal = needs_states = trees = False

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        match proposal.law:
            case Delta():
                return chosen(Drafted(proposal.law, proposal.tokens, target))
            case Dense():
                return _as_a_whole(Drafted(proposal.law, proposal.tokens, target))


def _as_a_whole(drafted: Drafted[Dense]) -> Verdict:
    before, passes = weights(drafted)
    lengths = torch.arange(1, passes.shape[1] + 1, device=passes.device)
    stands = (drafted.coins.uniforms() < passes) * lengths
    accepted = stands.amax(1) if passes.shape[1] else stands.sum(1)
    return conclude(drafted, accepted, left_over(drafted.law, drafted.log_probs, before))


def weights(drafted: Drafted[Dense]) -> tuple[Tensor, Tensor]:
    """c before each drafted token [n, k], and with which probability the prefix that ends with it passes [n, k]."""
    ratio = log_ratios(drafted.law, drafted).exp()
    before, passes = torch.ones_like(ratio), torch.zeros_like(ratio)
    width, size = ratio.shape[1], drafted.log_probs.shape[2]
    for step in range(width):
        weight = (before[:, step] * ratio[:, step]).clamp(max=1.0)
        passes[:, step] = weight
        if step + 1 == width:
            break
        before[:, step + 1] = weight
        p, g = drafted.log_probs[:, step + 1].exp(), widened(drafted.law.probs[:, step + 1], size)
        left = (p * weight.unsqueeze(1)).sub_(g).clamp_(min=0).sum(1)
        share = (left / (left + 1 - weight)).nan_to_num(1.0)  # 0 / 0: both laws agree, and nothing speaks against it
        ends = (drafted.tokens[:, step + 1] < 0) | left.isnan()  # so does a draft before a row without a law
        passes[:, step] = torch.where(ends, weight, share)
    return before, passes
