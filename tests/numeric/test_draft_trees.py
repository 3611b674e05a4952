"""Draft trees: which nodes they grow, which path the target takes through them, and what that leaves in the KV pool."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch

from engine.config import ModelConfig
from engine.pipelines.trees import Tree, calibrated, grow, moves
from engine.protocols import DraftProposal, TargetRows
from engine.runtime.batch import AttentionMode, SeqInput
from engine.runtime.loading import load_checked
from engine.runtime.runner import ModelRunner
from engine.runtime.sampler import SamplingState
from engine.types import Request, SamplingParams
from engine.verifiers.strict import StrictVerifier
from tests.tiny import save_tiny


def options(rng: random.Random, depth: int, width: int) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities [depth][width], best first."""
    tokens = [rng.sample(range(100), width) for _ in range(depth)]
    weights = [sorted((rng.random() for _ in range(width)), reverse=True) for _ in range(depth)]
    return tokens, [[math.log(weight / (sum(row) + 0.1)) for weight in row] for row in weights]


def paths(tree: Tree) -> list[tuple[int, ...]]:
    """The tokens on the way to each node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((*found[parent], token) if parent >= 0 else (token,))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_grown_nodes_are_the_likeliest_of_all(seed: int) -> None:
    rng = random.Random(seed)
    depth, width = rng.randint(1, 4), rng.randint(1, 4)
    tokens, log_probs = options(rng, depth, width)
    every = {
        tuple(tokens[d][rank] for d, rank in enumerate(ranks)): sum(log_probs[d][rank] for d, rank in enumerate(ranks))
        for length in range(1, depth + 1)
        for ranks in itertools.product(range(width), repeat=length)
    }
    order = sorted(every, key=lambda path: -every[path])
    for budget in (1, 2, 3, 7, len(every), len(every) + 5):
        tree = grow(tokens, log_probs, budget)
        assert paths(tree) == order[:budget]
        assert tree.weights == pytest.approx([math.exp(every[path]) for path in order[:budget]])
        assert list(tree.depths) == [len(path) for path in paths(tree)]
        assert all(parent < node for node, parent in enumerate(tree.parents))
    assert grow(tokens, log_probs, 9).first(4) == grow(tokens, log_probs, 4)


def test_what_has_no_probability_is_not_grown() -> None:
    never = -math.inf
    tree = grow([[1, 2, 3], [4, 5, 6]], [[math.log(0.9), never, never], [math.nan, never, never]], 9)
    assert (tree.tokens, tree.parents, tree.is_chain()) == ((1,), (-1,), True)
    assert grow([], [], 5).tokens == grow([[1]], [[never]], 5).tokens == grow([[1]], [[0.0]], 0).tokens == ()
    sure = grow([[1, 2], [3, 4], [5, 6]], [[0.0, never]] * 3, 9)
    assert (sure.tokens, sure.weights) == ((1, 3, 5), (1.0, 1.0, 1.0))


def test_calibration_moves_the_best_and_lets_the_others_share_the_rest() -> None:
    rows = [[math.log(x) for x in (0.6, 0.2, 0.1)], [math.log(x) for x in (0.5, 0.4)], [0.0, -math.inf]]
    found = [[math.exp(value) for value in row] for row in calibrated(rows, [0.8, 0.3, 0.7])]
    assert found[0] == pytest.approx([0.8, 0.1, 0.05])
    assert found[1] == pytest.approx([0.3, 0.3])  # not more than the best
    assert found[2] == pytest.approx([0.7, 0.0])


#      root
#    7      8          nodes 0, 1
#  5   6    5          nodes 2, 4, 3
#  9                   node 5
TREE = Tree((7, 8, 5, 5, 6, 9), (-1, -1, 0, 1, 0, 2), (1, 1, 2, 2, 2, 3), (0.5, 0.4, 0.3, 0.2, 0.1, 0.05))


@pytest.mark.parametrize(
    ("draws", "path", "following"),
    [
        ([7, 5, 0, 9, 0, 0, 4], [0, 2, 5], 4),
        ([7, 6, 0, 9, 0, 3, 4], [0, 4], 3),
        ([8, 5, 5, 9, 2, 0, 4], [1, 3], 2),
        ([8, 5, 6, 9, 2, 0, 4], [1], 6),  # 6 is a child of node 0 only
        ([3, 5, 5, 9, 2, 0, 4], [], 3),
        ([7, -1, 5, 9, 2, 0, 4], [0], -1),  # nothing can be drawn there
        ([-1, 5, 5, 9, 2, 0, 4], [], -1),
    ],
)
def test_the_walk_follows_the_target(draws: list[int], path: list[int], following: int) -> None:
    """`draws`: the target's token at the root and after each node. Beside it stand a chain and an empty draft."""
    pad = [-1] * 4
    tokens = torch.tensor([TREE.tokens, (7, 5, *pad), (-1, -1, *pad)])
    parents = torch.tensor([TREE.parents, (-1, 0, *pad), (-1, -1, *pad)])
    rows = torch.tensor([draws, (7, 5, 3, *pad), (2, -1, -1, *pad)])
    verdict = StrictVerifier().verify(DraftProposal(tokens, (6, 2, 0), parents=parents), TargetRows(rows))
    assert verdict.accepted.tolist() == [len(path), 2, 0]
    assert verdict.path.tolist() == [path + [-1] * (6 - len(path)), [0, 1, *pad], [-1] * 6]
    assert verdict.next_token.tolist() == [following, 3, 2]


@pytest.mark.parametrize("seed", range(10))
def test_the_walk_through_deep_trees(seed: int) -> None:
    """Against a loop, up to the widest tree there may be."""
    rng = random.Random(seed)
    tree = grow(*options(rng, 30, 2), rng.choice((31, 64, 256)))
    draws = [rng.randrange(100) for _ in range(len(tree.tokens) + 1)]
    for node, parent in enumerate(tree.parents):
        if rng.random() < 0.8:
            draws[parent + 1] = tree.tokens[node]
    path: list[int] = []
    while True:
        at = path[-1] if path else -1
        down = [n for n, p in enumerate(tree.parents) if p == at and tree.tokens[n] == draws[at + 1]]
        if not down:
            break
        path += down
    proposal = DraftProposal(torch.tensor([tree.tokens]), (len(tree.tokens),), parents=torch.tensor([tree.parents]))
    verdict = StrictVerifier().verify(proposal, TargetRows(torch.tensor([draws])))
    assert verdict.path[0, : int(verdict.accepted)].tolist() == path
    assert verdict.next_token.tolist() == [draws[path[-1] + 1 if path else 0]]


def test_rows_see_their_ancestors() -> None:
    rows = TREE.rows(40)
    assert list(rows.positions) == [40, 41, 41, 42, 42, 42, 43]
    assert rows.root == 40
    assert [format(mask, "07b") for mask in rows.ancestors] == [
        "0000001", "0000011", "0000101", "0001011", "0010101", "0100011", "1001011",
    ]  # fmt: skip
    assert TREE.spine() == [0, 2, 5] and not TREE.is_chain() and TREE.first(1).is_chain()


def test_states_along_the_paths() -> None:
    """Each node's draw sees the tokens above it and no others."""
    state = SamplingState(Request("x", (1, 2), SamplingParams(max_tokens=9, repetition_penalty=1.2)))
    states = state.ahead(TREE.tokens, TREE.parents)
    assert [one.position for one in states] == [2, 3, 3, 4, 4, 4, 5]
    assert [set(one.counts.ids.tolist()) - {1, 2} for one in states if one.counts is not None] == [
        set(), {7}, {8}, {7, 5}, {8, 5}, {7, 6}, {7, 5, 9},
    ]  # fmt: skip


def test_moves_follow_the_block_table() -> None:
    assert moves(6, [0, 2, 5], (9, 4, 7), 4) == [(7 * 4 + 0, 4 * 4 + 3), (7 * 4 + 3, 7 * 4 + 0)]
    assert moves(6, [0, 1, 2], (9, 4, 7), 4) == []


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_the_pool_holds_what_plain_decoding_leaves(family: str, tmp_path: Path) -> None:
    """Prompt, then a tree of which a winding path stands: logits, and after compaction keys and values."""
    folder = save_tiny(family, tmp_path)
    loaded = load_checked(ModelConfig(str(folder), quant="none", device="cpu"), folder, lambda _: None)
    prompt, blocks = list(range(50, 61)), (5, 2, 7, 3, 1, 6)
    path = [0, 2, 5]
    tokens = [TREE.tokens[node] for node in path]

    def runner() -> ModelRunner:
        made = loaded.runner(8, 4)
        made.forward([SeqInput(prompt, 0, blocks, len(prompt))], [])
        return made

    plain, drafted = runner(), runner()
    start = len(prompt)
    want = plain.forward([SeqInput([3, *tokens], start, blocks, start + 4)], range(4))
    nodes = SeqInput([3, *TREE.tokens], start, blocks, start + 7, TREE.rows(start))
    got = drafted.forward([nodes], range(7), AttentionMode.TREE)
    torch.testing.assert_close(got[[0, *(node + 1 for node in path)]], want, atol=1e-5, rtol=1e-5)
    source, target = zip(*moves(start + 1, path, blocks, drafted.block_size), strict=True)
    drafted.compact(torch.tensor(source), torch.tensor(target))
    slots = [blocks[place // 4] * 4 + place % 4 for place in range(start + 4)]
    for ours, theirs in zip(drafted.cache.layers, plain.cache.layers, strict=True):
        torch.testing.assert_close(ours.joint[slots], theirs.joint[slots], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_a_path_on_the_host_is_the_verdict_of_tensors(seed: int) -> None:
    """Of chains and of trees, with rows where nothing can be drawn."""
    chance, verifier = random.Random(seed), StrictVerifier()
    for _ in range(50):
        size = chance.randint(1, 9)
        parents: list[int] = []
        tokens: list[int] = []
        for node in range(size):
            parents.append(node - 1 if seed % 2 else chance.randint(-1, node - 1))
            siblings = {token for token, parent in zip(tokens, parents, strict=False) if parent == parents[-1]}
            tokens.append(chance.choice([token for token in range(12) if token not in siblings]))
        draws = [chance.choice((-1, *range(12))) for _ in range(size + 1)]
        for node, parent in enumerate(parents):  # likely paths
            if chance.random() < 0.5:
                draws[parent + 1] = tokens[node]
        chain = all(parent == node - 1 for node, parent in enumerate(parents))
        proposal = DraftProposal(torch.tensor([tokens]), (size,), parents=None if chain else torch.tensor([parents]))
        verdict = verifier.verify(proposal, TargetRows(torch.tensor([draws])))
        path = verifier.path(tokens, None if chain else parents, draws)
        assert path == verdict.path[0, : int(verdict.accepted[0])].tolist()
        assert draws[path[-1] + 1 if path else 0] == int(verdict.next_token[0])
