"""Ratio rejection: a drafted token stands with probability min(1, p / q); a rejected one is drawn anew from (p - q)+.

p is the target's law at the row, q the law that the token was really drawn from. What is committed at a position then
has the law p exactly, and a draft stands as often as any lossless rule can let it: 1 - TV(p, q). For a token that was
chosen and not drawn, q is 1 at that token. Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding" (2023), theorem 1 and appendix A.1; Chen et al., "Accelerating Large Language Model Decoding with Speculative
Sampling" (2023). After a draft that stands as a whole comes the target's own draw.

The coins come in streams of their own: the same law as plain decoding, not the same tokens. A greedy request's law is
one-hot, and its tokens are those of `strict`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.protocols import Dense, DraftProposal, TargetRows, Verdict

NEVER = float("-inf")


class RejectionVerifier:
    """See `protocols.Verifier`. Chains only."""

    lossless = True
    needs_laws = True
    trees = False

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        assert target.log_probs is not None and target.chance is not None
        tokens = proposal.tokens
        stands = target.chance.uniforms() < acceptance(proposal, target)
        accepted = stands.long().cumprod(1).sum(1)
        steps = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        path = torch.where(steps < accepted.unsqueeze(1), steps, -1)
        following = target.draws.gather(1, accepted.unsqueeze(1)).squeeze(1)
        # A row without a law (-1) keeps its -1: nothing can be drawn there.
        drafts = ((accepted < (tokens >= 0).sum(1)) & (following >= 0)).nonzero().squeeze(1)
        if drafts.numel():
            rows = accepted[drafts]
            weights = residual(proposal, target.log_probs, drafts, rows)
            following[drafts] = target.chance.draw(weights, drafts, rows)
        return Verdict(accepted, path, following)


def acceptance(proposal: DraftProposal, target: TargetRows) -> Tensor:
    """With which probability each drafted token stands where those before it do, [n, k] float64.

    0 for padding, for rows without a law, and for tokens that their own proposal law excludes.
    """
    assert target.log_probs is not None
    width = proposal.tokens.shape[1]
    places = proposal.tokens.clamp(min=0).unsqueeze(-1)
    log_p = target.log_probs[:, :width].gather(-1, places).squeeze(-1).double()
    log_q = torch.zeros_like(log_p)
    if isinstance(proposal.law, Dense):
        log_q = proposal.law.probs.gather(-1, places).squeeze(-1).double().log()
    possible = (proposal.tokens >= 0) & (target.draws[:, :width] >= 0) & (log_q > NEVER)
    return torch.where(possible, (log_p - log_q).clamp(max=0.0).exp(), 0.0)


def residual(proposal: DraftProposal, log_probs: Tensor, drafts: Tensor, steps: Tensor) -> Tensor:
    """log (p - q)+ [m, vocabulary] float64, not normalised, at row steps[i] of draft drafts[i].

    Where nothing is left of p (p and q are equal but for rounding), or q is no number, it is log p.
    """
    log_p = log_probs[drafts, steps].double()
    if isinstance(proposal.law, Dense):
        log_q = proposal.law.probs[drafts, steps].double().log_()
        weights = torch.where(log_q < log_p, log_p + (log_q - log_p).expm1().neg().log(), NEVER)
    else:
        weights = log_p.scatter(1, proposal.tokens[drafts, steps].unsqueeze(1), NEVER)
    empty = weights.amax(1, keepdim=True) == NEVER
    return torch.where(empty, log_p, weights)
