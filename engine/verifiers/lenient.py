"""Lenience: a drafted token may stand until its law is 1 / lenience times what the target gives it.

Drawn drafts: accept with min(1, p / (l g)), else draw from (p - g)+, which is the rest that moves the law least. Chosen
drafts: the drafted token keeps a mass of min(1, p / l). No token that the target forbids is ever written. l = 1 is
lossless. Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), appendix A.5.
"""

from __future__ import annotations

from engine.protocols import DraftProposal, TargetRows, Verdict
from engine.verification import Knob, VerifierCard
from engine.verifiers.kernel import setting, stretch


class LenientVerifier:
    """See `protocols.Verifier`. Chains only."""

    card = VerifierCard(
        "lenient",
        False,
        "lets a token be 1 / lenience times as likely as the target says",
        (Knob("lenience", 0.5, 0.01, 1.0, "1 is the target's law", neutral=1.0),),
        drawn=True,
    )
    needs_laws = True
    needs_marginal = needs_states = trees = False

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        return stretch(proposal, target, lambda _, lenience: -lenience.log(), setting(target, "lenience"))
