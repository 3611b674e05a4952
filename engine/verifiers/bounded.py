"""The ensemble with the largest share of the draft that moves no token's law by more than epsilon. Nothing is trained.

Drawn drafts: w = max(0, 1 - epsilon / TV(p, q)) at each position, so that (1 - w) TV(p, q) is at most epsilon, and a
draft stands with 1 - TV(p, q) + epsilon where p allows all that was drawn. Chosen drafts: the drafted token keeps a
mass of max(p(x), min(q(x), p(x) + epsilon)). See `ensemble` for the rest. epsilon = 0 is lossless.
"""

from __future__ import annotations

from engine.protocols import Delta, Dense, DraftProposal, TargetRows, Verdict
from engine.verification import Knob, VerifierCard
from engine.verifiers.kernel import Drafted, chosen, mixed, own_mass, setting


class BoundedVerifier:
    """See `protocols.Verifier`. Chains only."""

    card = VerifierCard(
        "bounded",
        False,
        "accepts what a bounded distance from the target's law allows",
        (Knob("epsilon", 0.1, 0.0, 1.0, "most total variation at each token", neutral=0.0),),
        drawn=True,
    )
    needs_laws = needs_marginal = True
    needs_states = trees = False

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        epsilon = setting(target, "epsilon")
        match proposal.law:
            case Delta():
                chain = Drafted(proposal.law, proposal.tokens, target)
                return chosen(chain, own_mass(proposal).minimum(chain.log_p.exp() + epsilon))
            case Dense():
                drafted = Drafted(proposal.law, proposal.tokens, target)
                return mixed(drafted, lambda distance: (1 - epsilon / distance).clamp(min=0.0))
