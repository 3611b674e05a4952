"""Strict verification: the target draws its own token at every row, and a draft stands exactly while it equals it.

The draw is the one that plain decoding makes at that position (randomness keyed by seed, choice and position), so the
tokens are those of plain decoding, whatever was drafted and however long the drafts are. For a draft that was chosen
and not drawn this accepts as often as any lossless rule can: with the probability that the target gives its token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.protocols import DraftProposal, TargetRows, Verdict
from engine.verification import VerifierCard


class StrictVerifier:
    """See `protocols.Verifier`."""

    card = VerifierCard(
        "strict", True, "the target draws its own token at every row; a draft stands while it equals it", exact=True
    )
    needs_laws = needs_marginal = needs_states = False
    trees = True

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        tokens, draws = proposal.tokens, target.draws
        if proposal.parents is not None:
            return _walk(tokens, proposal.parents, draws)
        width = tokens.shape[1]
        # The padding of both sides is -1: it must not count as agreement.
        agrees = (tokens == draws[:, :width]) & (tokens >= 0)
        accepted = agrees.long().cumprod(1).sum(1)
        steps = torch.arange(width, device=tokens.device).expand_as(tokens)
        path = torch.where(steps < accepted.unsqueeze(1), steps, -1)
        return Verdict(accepted, path, draws.gather(1, accepted.unsqueeze(1)).squeeze(1))

    def path(self, drafts: Sequence[int], parents: Sequence[int] | None, draws: Sequence[int]) -> list[int]:
        """See `protocols.PathVerifier`."""
        if parents is None:
            stood = 0
            while stood < len(drafts) and drafts[stood] == draws[stood]:
                stood += 1
            return list(range(stood))
        nodes = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, drafts, strict=True))}
        path: list[int] = []
        last: int | None = -1
        while last is not None and (last := nodes.get((last, draws[last + 1]))) is not None:
            path.append(last)
        return path


def _walk(tokens: torch.Tensor, parents: torch.Tensor, draws: torch.Tensor) -> Verdict:
    """From the root, down to the child that the target drew, as long as there is one; siblings differ.

    `tokens` and `parents` [n, k] as in `DraftProposal`, `draws` [n, k + 1].
    """
    width = tokens.shape[1]
    # Do a node and its nearest 2^t ancestors stand? Once t is large enough: the whole path. Column 0 is the root.
    above = torch.cat((torch.zeros_like(parents[:, :1]), parents + 1), dim=1)
    stands = torch.ones_like(above, dtype=torch.bool)
    stands[:, 1:] = (tokens == draws.gather(1, above[:, 1:])) & (tokens >= 0)
    for _ in range(width.bit_length()):
        stands &= stands.gather(1, above)
        above = above.gather(1, above)
    stands = stands[:, 1:]
    nodes = torch.arange(width, device=tokens.device).expand_as(tokens)
    path = nodes.masked_fill(~stands, width).sort(1).values  # parents come before children
    row = (nodes + 1).masked_fill(~stands, 0).amax(1, keepdim=True)
    return Verdict(stands.sum(1), path.masked_fill(path == width, -1), draws.gather(1, row).squeeze(1))
