"""Draft trees: the likeliest paths through the options of a draft's positions, verified in one pass.

A block draft says for each of its positions what it thinks of every token, as if positions were independent. A tree of
the likeliest paths then stands deeper than the one likeliest path, for the price of a wider pass: DDTree
(arXiv 2604.12989). Grown best first, so that a tree of b nodes is the beginning of any larger one of the same draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import exp, inf, log

from engine.runtime.batch import TreeRows


@dataclass(frozen=True, slots=True)
class Tree:
    """Nodes of a draft tree, the likeliest first, so that parents come before children; siblings differ.

    `parents` are indices of nodes, -1 for the last committed token; `depths` count from 1 below it. `weights` are the
    chances that all of the path down to a node stands; they never rise.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    weights: tuple[float, ...]

    def first(self, count: int) -> Tree:
        """The tree of its `count` likeliest nodes."""
        return Tree(self.tokens[:count], self.parents[:count], self.depths[:count], self.weights[:count])

    def kept(self, legal: Sequence[bool]) -> Tree:
        """The tree without the nodes that are not legal; what follows one of these is not legal either."""
        if all(legal):
            return self
        nodes = [node for node, stays in enumerate(legal) if stays]
        places = {-1: -1} | {node: place for place, node in enumerate(nodes)}
        return Tree(
            tuple(self.tokens[node] for node in nodes),
            tuple(places[self.parents[node]] for node in nodes),
            tuple(self.depths[node] for node in nodes),
            tuple(self.weights[node] for node in nodes),
        )

    def is_chain(self) -> bool:
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def spine(self) -> list[int]:
        """The path of likeliest tokens: the first child of the first child, and so on."""
        path: list[int] = []
        for node, parent in enumerate(self.parents):
            if parent == (path[-1] if path else -1):
                path.append(node)
        return path

    def rows(self, position: int) -> TreeRows:
        """The tree below the token at `position`, which is fed before the nodes, all in the places that follow it."""
        ancestors = [1]
        for node, parent in enumerate(self.parents):
            ancestors.append(ancestors[parent + 1] | 2 << node)
        return TreeRows(position, [position, *(position + depth for depth in self.depths)], ancestors)


def grow(tokens: Sequence[Sequence[int]], log_probs: Sequence[Sequence[float]], budget: int) -> Tree:
    """The `budget` likeliest nodes of the tree whose node at depth d + 1 is one of tokens[d] and weighs log_probs[d].

    Both are [k][width], best first. Options of no probability are left out. Ties: the shallower node first, then the
    child of the older one.
    """
    nodes: list[tuple[int, int, int]] = []
    weights: list[float] = []
    heap: list[tuple[float, int, int, int]] = []  # minus the path's log-probability, depth, parent, rank

    def offer(cost: float, step: float, depth: int, parent: int, rank: int) -> None:
        if step < inf:  # false for what is no number, too
            heappush(heap, (cost + max(step, 0.0), depth, parent, rank))

    if budget > 0 and len(tokens):
        offer(0.0, -log_probs[0][0], 1, -1, 0)
    while heap and len(nodes) < budget:
        cost, depth, parent, rank = heappop(heap)
        node, row = len(nodes), log_probs[depth - 1]
        nodes.append((tokens[depth - 1][rank], parent, depth))
        weights.append(exp(-cost))
        if rank + 1 < len(row):
            offer(cost, row[rank] - row[rank + 1], depth, parent, rank + 1)
        if depth < len(log_probs):
            offer(cost, -log_probs[depth][0], depth + 1, node, 0)
    ids, parents, depths = zip(*nodes, strict=True) if nodes else ((), (), ())
    return Tree(ids, parents, depths, tuple(weights))


def calibrated(log_probs: Sequence[Sequence[float]], chances: Sequence[float]) -> list[list[float]]:
    """The same options [k][width] where the best of position d has probability chances[d].

    The others keep their proportions among each other and share the rest, but none outgrows a better one.
    """
    found = []
    for row, chance in zip(log_probs, chances, strict=True):
        best = exp(row[0])
        scale = (1.0 - chance) / (1.0 - best) if best < 1.0 else 0.0
        bound = chance
        line: list[float] = []
        for value in row:
            bound = min(bound, chance if not line else scale * exp(value))
            line.append(log(bound) if bound > 0.0 else -inf)
        found.append(line)
    return found


def moves(start: int, path: Sequence[int], block_ids: Sequence[int], block_size: int) -> list[tuple[int, int]]:
    """Slots (from, to) that bring the nodes of `path`, fed from place `start` on, into the first places in order."""

    def slot(place: int) -> int:
        return block_ids[place // block_size] * block_size + place % block_size

    return [(slot(start + node), slot(start + depth)) for depth, node in enumerate(path) if node != depth]
