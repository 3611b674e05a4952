"""What of a proposal is verified: how many tokens of each chain, or trees in their place.

It is decided by margins and options, which are known before a token is drawn, and never by the drawn tokens: so
sampled drafts keep their law whatever is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import exp
from operator import mul

import torch

from engine.pipelines.forcing import chain, force
from engine.pipelines.rounds import Round
from engine.pipelines.states import Share
from engine.pipelines.survival import LengthChoice, SurvivalByKind, foreseen
from engine.pipelines.trees import Tree, calibrated, grow
from engine.protocols import Dense, DraftProposal, Options, Rows, Scalar
from engine.types import CostTable

WIDTH = 16  # options of each position that a tree is grown from
BARREN = 8  # so many times in a row no tree paid in steps of about this size: then none are grown,
RETRY = 64  # but for every so manieth time

Points = tuple[tuple[int, float], ...]
Table = list[list[float]]


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """What is verified in a step, and what was thought of all that was drafted; `chances` as far as they are known.

    `sure`: whose drafts are forced. They say nothing of the drafter's.
    """

    proposal: DraftProposal
    margins: torch.Tensor | None = None
    chances: Table | None = None
    sure: frozenset[int] = frozenset()


class Shaper:
    """Shapes the drafts of a step. `tree`: most nodes of a draft tree, 0 for chains only; `most`: most tokens of those.

    Without measured costs every drafted token is verified, and trees are as large as they may be.
    """

    def __init__(self, tree: int = 0, most: int = 1 << 30) -> None:
        self._tree, self._most = tree, most
        self._survival = SurvivalByKind()
        self._barren: dict[int, int] = {}  # by the bit length of a step's requests
        self.set_costs((), (), ())

    def set_costs(self, steps: Points, drafts: Points, trees: Points) -> None:
        """(tokens fed, seconds) of plain passes and of those with trees; (requests drafted for, seconds) of drafts."""
        self._steps, self._trees, self._drafts = CostTable(steps), CostTable(trees or steps), CostTable(drafts)
        self._lengths, self._sizes = LengthChoice(steps, drafts), LengthChoice(trees or steps, drafts)

    def width(self, shares: Sequence[Share]) -> int:
        """Options to ask the drafter for.

        Trees are grown only where every request feeds a single token, and has a verifier that knows trees.
        """
        if not self._tree or not all(share.samples and len(share.ids) == 1 and _branches(share) for share in shares):
            return 0
        if not self._trees:
            return WIDTH
        barren = self._barren.get(len(shares).bit_length(), 0)
        self._barren[len(shares).bit_length()] = barren + 1  # until a tree is chosen
        return WIDTH if barren < BARREN or barren % RETRY == 0 else 0

    def shape(self, drawing: Sequence[Share], fed: int, proposal: DraftProposal) -> Shape:
        """Set the drafts of all shares that draw, in a step that feeds `fed` committed tokens."""
        assert proposal.parents is None, "trees are grown here, from options"
        proposal, sure = force(drawing, proposal, self._most)
        if not any(proposal.lengths):
            return Shape(proposal)
        margins, chances, options = proposal.margins, None, proposal.options
        if margins is not None:
            chances = self._survival.chances([*map(_kind, drawing)], margins, proposal.lengths)
        if options is not None:
            log_probs = _rows(options.log_probs, proposal.lengths)
            if chances is None:
                chances = [[exp(best[0]) for best in row] for row in log_probs]
            else:
                log_probs = [calibrated(row, chance) for row, chance in zip(log_probs, chances, strict=True)]
            trees = self._grow(drawing, options, log_probs, proposal.lengths)
            for i in sure:
                trees[i], chances[i] = chain(_tokens(proposal, i)), [1.0] * proposal.lengths[i]
            if (shaped := self._with_trees(drawing, fed, trees, chances)) is not None:
                return Shape(shaped, margins, chances, sure)
        elif chances is not None:
            chances = [[1.0] * proposal.lengths[i] if i in sure else row for i, row in enumerate(chances)]
        lengths = proposal.lengths if chances is None else self._choose(chances, fed, proposal)
        allowed = lawful(drawing, proposal, lengths)
        if chances is not None:  # what comes behind an illegal token would never have stood
            chances = [
                row[:kept] if kept < length else row
                for row, kept, length in zip(chances, allowed, lengths, strict=True)
            ]
        proposal = cut(proposal, allowed)
        for share, draft, length in zip(drawing, proposal.tokens.tolist(), proposal.lengths, strict=True):
            share.drafts = draft[:length]
        return Shape(proposal, margins, chances, sure)

    def observe(self, drawing: Sequence[Share], shape: Shape, rounds: Sequence[Round]) -> None:
        """Learn from what came of the drafts."""
        if shape.chances is None:
            return
        lengths, accepted = [], []
        for i, (share, round_, chances) in enumerate(zip(drawing, rounds, shape.chances, strict=True)):
            # Of a tree, its spine says what would have become of the chain.
            spine = range(len(share.drafts)) if share.tree is None else share.tree.spine()
            stood = sum(a == b for a, b in zip(spine, round_.path, strict=False))
            lengths.append(0 if i in shape.sure else len(spine))
            accepted.append(stood)
            if share.tree is None:
                round_.foreseen = foreseen(chances, len(share.drafts), stood)
        if shape.margins is not None:
            self._survival.observe([*map(_kind, drawing)], shape.margins, lengths, accepted)

    def _choose(self, chances: Table, fed: int, proposal: DraftProposal) -> list[int]:
        law = proposal.law
        if not isinstance(law, Dense):
            return self._lengths.choose(chances, fed)
        # Perhaps they were drawn one after another: then margins tell of earlier tokens.
        return self._lengths.choose_in_turn(chances, fed, range(len(chances)) if law.rows is None else law.rows)

    def _grow(
        self, drawing: Sequence[Share], options: Options, log_probs: list[Table], lengths: Sequence[int]
    ) -> list[Tree]:
        """The largest tree of each request that its granted slots hold."""
        tokens = _rows(options.tokens, lengths)
        trees = [
            grow(ids, weights, min(self._tree, share.item.lookahead))
            for share, ids, weights in zip(drawing, tokens, log_probs, strict=True)
        ]
        grammars = [share.state.sampling.grammar for share in drawing]
        return [
            tree if grammar is None else tree.kept(grammar.legal(tree.tokens, tree.parents))
            for tree, grammar in zip(trees, grammars, strict=True)
        ]

    def _with_trees(
        self, drawing: Sequence[Share], fed: int, trees: list[Tree], chances: Table
    ) -> DraftProposal | None:
        """Give the shares trees, if these promise more tokens per second than chains do."""
        if self._trees:
            ratios = [[b / a for a, b in zip((1.0, *t.weights), t.weights, strict=False)] for t in trees]
            sizes = self._sizes.choose(ratios, fed)
            trees = [tree.first(size) for tree, size in zip(trees, sizes, strict=True)]
        if all(tree.is_chain() for tree in trees):
            return None
        if self._trees:
            reaches = [list(accumulate(row, mul)) for row in chances]
            chains = [row[:length] for row, length in zip(reaches, self._lengths.choose(chances, fed), strict=True)]
            if self._speed(self._trees, fed, [tree.weights for tree in trees]) <= self._speed(self._steps, fed, chains):
                return None
        self._barren[len(drawing).bit_length()] = 0
        for share, tree in zip(drawing, trees, strict=True):
            share.drafts, share.tree = tree.tokens, tree
        return as_proposal(trees)

    def _speed(self, costs: CostTable, fed: int, reaches: Sequence[Sequence[float]]) -> float:
        """Expected tokens per second of a step that verifies tokens which stand with these chances."""
        seconds = costs.seconds(fed + sum(map(len, reaches)))
        if self._drafts:
            seconds += self._drafts.seconds(len(reaches))
        return (len(reaches) + sum(map(sum, reaches))) / seconds


def lawful(drawing: Sequence[Share], proposal: DraftProposal, lengths: Sequence[int]) -> list[int]:
    """At most these lengths: no token is verified behind one that its request's grammar does not allow.

    Neither is that token, unless it was drawn. Then it has to be seen to fall: a draft that ends before it would leave
    out what the law of the draft spends on it. The target's law has nothing there, so that nothing behind it matters.
    """
    found = [*lengths]
    for i, share in enumerate(drawing):
        grammar = share.state.sampling.grammar
        if grammar is None or not lengths[i]:
            continue
        legal = grammar.legal(proposal.tokens[i, : lengths[i]].tolist())
        if not all(legal):
            found[i] = legal.index(False) + (isinstance(proposal.law, Dense) and _kind(share)[1])
    return found


def cut(proposal: DraftProposal, lengths: Sequence[int]) -> DraftProposal:
    """The chains of `proposal` without their tokens past `lengths`."""
    if tuple(lengths) == proposal.lengths:
        return proposal
    most = max(lengths)
    tokens, law, marginal = proposal.tokens[:, :most], proposal.law, proposal.marginal
    past = torch.arange(most).expand(len(lengths), most) >= torch.tensor(lengths).unsqueeze(1)
    if isinstance(law, Dense):
        law = replace(law, probs=law.probs[:, :most])
    if isinstance(marginal, Scalar | Rows):
        marginal = type(marginal)(marginal.probs[:, :most])
    return replace(
        proposal,
        tokens=tokens.masked_fill(past.to(tokens.device), -1),
        lengths=tuple(lengths),
        law=law,
        marginal=marginal,
        hidden=None if proposal.hidden is None else proposal.hidden[:, :most],
        margins=None if proposal.margins is None else proposal.margins[:, :most],
        options=None,
    )


def _tokens(proposal: DraftProposal, i: int) -> list[int]:
    return proposal.tokens[i, : proposal.lengths[i]].tolist()


def _branches(share: Share) -> bool:
    return share.state.choice is None or share.state.choice.verifier.trees


def _kind(share: Share) -> tuple[str, bool]:
    """What the chances of a request's drafts depend on beside their margins."""
    choice = share.state.choice
    return ("", False) if choice is None else (choice.verifier.card.name, choice.drawn)


def as_proposal(trees: Sequence[Tree]) -> DraftProposal:
    """Trees side by side."""
    width = max(len(tree.tokens) for tree in trees)
    rows = [[*tree.tokens, *([-1] * (width - len(tree.tokens)))] for tree in trees]
    parents = [[*tree.parents, *([-1] * (width - len(tree.tokens)))] for tree in trees]
    lengths = tuple(len(tree.tokens) for tree in trees)
    return DraftProposal(torch.tensor(rows), lengths, parents=torch.tensor(parents))


def _rows(values: torch.Tensor, lengths: Sequence[int]) -> list:
    """[n, k, width] as lists, each of its own length."""
    return [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]
