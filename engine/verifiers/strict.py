"""Strict verification: the target draws its own token at every row, and a draft stands exactly while it equals it.

The draw is the one that plain decoding makes at that position (randomness keyed by seed, choice and position), so the
tokens are those of plain decoding, whatever was drafted and however long the drafts are. For a draft that was chosen
and not drawn this accepts as often as any lossless rule can: with the probability that the target gives its token.
"""

from __future__ import annotations

import torch

from engine.protocols import DraftProposal, TargetRows, Verdict


class StrictVerifier:
    """See `protocols.Verifier`. Chains only."""

    lossless = True
    needs_laws = False
    trees = False

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        tokens, draws = proposal.tokens, target.draws
        width = tokens.shape[1]
        # The padding of both sides is -1: it must not count as agreement.
        agrees = (tokens == draws[:, :width]) & (tokens >= 0)
        accepted = agrees.long().cumprod(1).sum(1)
        steps = torch.arange(width, device=tokens.device).expand_as(tokens)
        path = torch.where(steps < accepted.unsqueeze(1), steps, -1)
        return Verdict(accepted, path, draws.gather(1, accepted.unsqueeze(1)).squeeze(1))
