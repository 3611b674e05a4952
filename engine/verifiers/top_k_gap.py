"""Relaxed top-k: a drafted token stands if it is one of the target's best, and not far behind the very best.

It always stands if it is among the top relaxed_topk of p and log p(x) >= log p(best) - relaxed_delta, and else as in
`rejection`. A token is among the top k if fewer than k are likelier. TensorRT-LLM has the rule in thinking spans, where
other tokens stand only if they are the best; a request's `thinking_only` keeps it to these spans here, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.protocols import DraftProposal, TargetRows, Verdict
from engine.verification import Knob, VerifierCard
from engine.verifiers.kernel import setting, stretch


class TopKGapVerifier:
    """See `protocols.Verifier`. Chains only."""

    card = VerifierCard(
        "top_k_gap",
        False,
        "accepts the target's best tokens if they are close to the very best",
        (
            Knob("relaxed_topk", 8, 1, 1000, "how many of the best tokens", whole=True),
            Knob("relaxed_delta", 0.5, 0.0, 100.0, "how far below the best log-probability, in nats"),
        ),
        drawn=True,
    )
    needs_laws = True
    needs_marginal = needs_states = trees = False

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        assert target.log_probs is not None
        rows = target.log_probs[:, :-1]
        counts = setting(target, "relaxed_topk").long().clamp(max=rows.shape[2])
        best = rows.topk(int(counts.max()), dim=2).values.double()
        last = best.gather(2, (counts - 1).unsqueeze(2).expand(-1, rows.shape[1], 1)).squeeze(2)
        floor = (best[:, :, 0] - setting(target, "relaxed_delta")).maximum(last)
        return stretch(proposal, target, _from, floor)


def _from(log_p: Tensor, floor: Tensor) -> Tensor:
    return torch.where(log_p >= floor, float("inf"), 0.0)
