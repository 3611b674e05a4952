"""Ratio rejection: a drafted token stands with probability min(1, p / g); a rejected one is drawn anew from (p - g)+.

p is the target's law at the row, g the law that the token was really drawn from. What is committed at a position then
has the law p exactly, and a draft stands as often as any lossless rule can let it: 1 - TV(p, g). For a token that was
chosen and not drawn, g is 1 at that token. Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding" (2023), theorem 1 and appendix A.1; Chen et al., "Accelerating Large Language Model Decoding with Speculative
Sampling" (2023). After a draft that stands as a whole comes the target's own draw.

The coins come in streams of their own: the same law as plain decoding, not the same tokens. A greedy request's law is
one-hot, and its tokens are those of `strict`.
"""

from __future__ import annotations

from engine.protocols import Delta, Dense, DraftProposal, TargetRows, Verdict
from engine.verification import VerifierCard
from engine.verifiers.kernel import Drafted, chosen, drawn, log_ratios


class RejectionVerifier:
    """See `protocols.Verifier`. Chains only."""

    card = VerifierCard("rejection", True, "a draft stands with probability min(1, p / q)", drawn=True)
    needs_laws = True
    needs_marginal = needs_states = trees = False

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        match proposal.law:
            case Delta():
                return chosen(Drafted(proposal.law, proposal.tokens, target))
            case Dense():
                drafted = Drafted(proposal.law, proposal.tokens, target)
                return drawn(drafted, log_ratios(proposal.law, drafted).exp())
