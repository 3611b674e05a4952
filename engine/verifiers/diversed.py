"""DIVERSED: the ensemble with a weight of its own at every position, which a trained head reads off hidden states.

The head sees the draft's hidden state at the position and the target's at the row before it, so tokens before the
drafted one and nothing of that one itself: what is committed has the law of the mixture exactly. See `ensemble` for it,
and for chosen drafts. "DIVERSED" (2026), section on the dynamic ensemble; here the laws are mixed, not the logits.

`min_weight` bounds what the head may say from below; 1 is lossless.
"""

from __future__ import annotations

from engine.protocols import DraftProposal, TargetRows, Verdict, VerifierHead
from engine.verification import Knob, VerifierCard
from engine.verifiers.kernel import blend, setting


class DiversedVerifier:
    """See `protocols.Verifier`. Chains only. `head` was trained for this target and this draft."""

    card = VerifierCard(
        "diversed",
        False,
        "verifies against a mixture of the target and the draft, weighed by a trained head",
        (Knob("min_weight", 0.5, 0.0, 1.0, "least weight of the target that the head may choose", neutral=1.0),),
        drawn=True,
    )
    needs_laws = needs_marginal = needs_states = True
    trees = False

    def __init__(self, head: VerifierHead) -> None:
        self._head = head

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        assert proposal.hidden is not None and target.states is not None
        width = proposal.tokens.shape[1]
        weights = self._head.weights(proposal.hidden[:, :width], target.states[:, :width]).double()
        return blend(proposal, target, weights.clamp(max=1.0).maximum(setting(target, "min_weight")))
