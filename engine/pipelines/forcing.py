"""Tokens that a grammar leaves no choice about, as drafts: they stand for certain, whatever the drafter says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from engine.pipelines.choices import Choice
from engine.pipelines.states import Share
from engine.pipelines.trees import Tree
from engine.protocols import Dense, DraftProposal


def force(drawing: Sequence[Share], proposal: DraftProposal, most: int) -> tuple[DraftProposal, frozenset[int]]:
    """`proposal` with up to `most` forced tokens in place of the chains that begin otherwise; and which these are.

    Drawn drafts stay as they are: their law is what they were drawn from. What a drafter says beside its tokens has no
    room for more of them, and nothing to say of these.
    """
    width, alone = proposal.tokens.shape[1], _says_nothing_else(proposal)
    found: dict[int, list[int]] = {}
    for i, share in enumerate(drawing):
        grammar, limit = share.state.sampling.grammar, min(share.item.lookahead, most)
        if grammar is None or not limit or (isinstance(proposal.law, Dense) and _drawn(share.state.choice)):
            continue
        tokens = grammar.forced(limit if alone else min(limit, width))
        if tokens and proposal.tokens[i, : min(proposal.lengths[i], len(tokens))].tolist() != tokens:
            found[i] = tokens
    if not found:
        return proposal, frozenset()
    widest = max(width, *map(len, found.values()))
    whole = proposal.tokens.new_full((len(drawing), widest), -1)
    whole[:, :width] = proposal.tokens
    lengths = [*proposal.lengths]
    for i, tokens in found.items():
        whole[i] = -1
        whole[i, : len(tokens)] = torch.tensor(tokens)
        lengths[i] = len(tokens)
    return replace(proposal, tokens=whole, lengths=tuple(lengths)), frozenset(found)


def chain(tokens: Sequence[int]) -> Tree:
    """A tree of one path that stands for certain."""
    size = len(tokens)
    return Tree(tuple(tokens), tuple(range(-1, size - 1)), tuple(range(1, size + 1)), (1.0,) * size)


def _drawn(choice: Choice | None) -> bool:
    return choice is not None and choice.drawn


def _says_nothing_else(proposal: DraftProposal) -> bool:
    said = (proposal.marginal, proposal.hidden, proposal.margins, proposal.options)
    return not isinstance(proposal.law, Dense) and all(part is None for part in said)
