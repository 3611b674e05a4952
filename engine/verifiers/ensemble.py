"""The static ensemble: the law of a drafted token is v = w p + (1 - w) q, w being the weight of the target.

Drawn drafts: accept with min(1, v / g), else draw from (v - g)+; what is committed has the law v exactly, at a distance
of (1 - w) TV(p, q) from the target's, and what is rejected and what is wrong add up to TV(p, q) whatever w is. This is
the static form of DIVERSED (2026) and `assistant_ensemble_weight` of transformers, but for one thing: q is what the
target's masks leave of g, so that no forbidden token is ever written.

Chosen drafts: the drafted token x keeps a mass of max(p(x), w p(x) + (1 - w) q(x)), q(x) being what the draft thinks of
it. That is (1 - w) (q(x) - p(x))+ away from the target, and buys more acceptance for it than v would.

w = 1 is lossless.
"""

from __future__ import annotations

from engine.protocols import DraftProposal, TargetRows, Verdict
from engine.verification import Knob, VerifierCard
from engine.verifiers.kernel import blend, setting


class EnsembleVerifier:
    """See `protocols.Verifier`. Chains only."""

    card = VerifierCard(
        "ensemble",
        False,
        "verifies against a mixture of the target and the draft",
        (Knob("target_weight", 0.7, 0.0, 1.0, "weight of the target in the mixture", neutral=1.0),),
        drawn=True,
    )
    needs_laws = needs_marginal = True
    needs_states = trees = False

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        return blend(proposal, target, setting(target, "target_weight"))
