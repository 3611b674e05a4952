"""The sdpa backend against a plain loop over queries, in every mode, over scattered blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from engine.attention.sdpa import SdpaAttention
from engine.runtime.batch import AttentionMode, DeviceBatch, SeqInput, TreeRows, pack
from engine.runtime.kv_cache import LayerCache, LayerShape, PagedKVCache

CPU = torch.device("cpu")
BLOCK = 4


def naive(
    query: torch.Tensor,
    cache: LayerCache,
    batch: DeviceBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One query, one head and one key at a time, in fp64."""
    out = torch.zeros(query.shape[0], query.shape[1], cache.shape.value_dim, dtype=torch.float64)
    fold = query.shape[1] // cache.shape.kv_heads
    for seq, (begin, end) in enumerate(pairwise(batch.query_starts.tolist())):
        for row in range(begin, end):
            keys = range(batch.kv_lens_host[seq])
            if batch.mode is AttentionMode.TREE:
                visible = [key for key in keys if sees_in_tree(batch, seq, row, key, window)]
            else:
                visible = [key for key in keys if sees(batch, int(batch.positions[row]), key, window)]
            slots = [int(batch.block_tables[seq, key // BLOCK]) * BLOCK + key % BLOCK for key in visible]
            for head in range(query.shape[1]):
                scores = [float(query[row, head].double() @ cache.key[s, head // fold].double()) * scale for s in slots]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                weights = [math.exp(score) for score in scores]
                total = sum(weights) + (math.exp(float(sinks[head])) if sinks is not None else 0.0)
                for slot, weight in zip(slots, weights, strict=True):
                    out[row, head] += cache.value[slot, head // fold].double() * (weight / total)
    return out


def sees(batch: DeviceBatch, query: int, key: int, window: int | None) -> bool:
    if batch.mode is AttentionMode.CAUSAL:
        near = window is None or query - key < window
        return key <= query and near
    near = window is None or abs(query - key) < window
    if batch.mode is AttentionMode.BLOCK_CAUSAL:
        return key // batch.block_length <= query // batch.block_length and near
    return near


def sees_in_tree(batch: DeviceBatch, seq: int, row: int, key: int, window: int | None) -> bool:
    """The masks read bit by bit; a key that is one of the queries lies at that query's position."""
    assert batch.tree_starts is not None and batch.tree_masks is not None
    first_fed = batch.kv_lens_host[seq] - batch.query_lens[seq]
    place = key if key < first_fed else int(batch.positions[int(batch.query_starts[seq]) + key - first_fed])
    near = window is None or int(batch.positions[row]) - place < window
    node = key - int(batch.tree_starts[row])
    if node < 0:
        return near
    word, bit = divmod(node, 64)
    words = [int(value) % 2**64 for value in batch.tree_masks[row]]
    return near and word < len(words) and bool(words[word] >> bit & 1)


def some_tree(root: int, nodes: int) -> TreeRows:
    """Node i hangs below node (i - 1) // 2: a binary heap, cut at 3 roots."""
    positions: list[int] = []
    ancestors: list[int] = []
    for node in range(nodes):
        parent = (node - 1) // 2 if node > 2 else -1
        positions.append(root if parent < 0 else positions[parent] + 1)
        ancestors.append((0 if parent < 0 else ancestors[parent]) | 1 << node)
    return TreeRows(root, positions, ancestors)


def scenario(mode: AttentionMode, shape: Sequence[tuple[int, int]]) -> tuple[DeviceBatch, LayerCache, torch.Tensor]:
    """Sequences of (query length, kv length) over scattered blocks of a pool full of noise, and queries [T, 6, 8]."""
    torch.manual_seed(len(shape))
    cache = PagedKVCache((LayerShape(kv_heads=2, key_dim=8, value_dim=12),), 64, BLOCK, torch.float32, CPU).layers[0]
    torch.nn.init.normal_(cache.joint)
    blocks = torch.randperm(64).tolist()
    inputs = []
    for query_len, kv_len in shape:
        table = [blocks.pop() for _ in range(-(-kv_len // BLOCK))]
        ahead = 2 if mode in (AttentionMode.BLOCK_CAUSAL, AttentionMode.BIDIRECTIONAL) else 0
        start = max(kv_len - query_len - ahead, 0)
        tree = some_tree(start, query_len) if mode is AttentionMode.TREE and query_len % 2 else None
        inputs.append(SeqInput([1] * query_len, start, table, kv_len, tree))
    batch = pack(inputs, BLOCK, CPU, mode, block_length=5)
    return batch, cache, torch.randn(batch.ids.numel(), 6, 8)


SHAPES = {
    "decode": [(1, 9), (1, 1), (1, 30), (1, 9)],
    "prefill": [(7, 7)],
    "long prefill": [(40, 47)],
    "mixed": [(1, 9), (5, 13), (1, 80), (5, 6), (40, 40), (1, 3)],
}


@pytest.mark.parametrize("mode", list(AttentionMode))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks"),
    [(None, None, False), (5, None, False), (None, 3.0, False), (None, None, True), (4, 2.0, True)],
)
def test_sdpa_equals_plain_loop(
    mode: AttentionMode, shape: str, window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    batch, cache, query = scenario(mode, SHAPES[shape])
    sinks = torch.randn(6) if with_sinks else None
    step = SdpaAttention().prepare(batch)
    got = step.attend(query, cache, scale=0.3, window=window, softcap=softcap, sinks=sinks)
    expected = naive(query, cache, batch, 0.3, window, softcap, sinks)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_sdpa_reads_masks_of_more_than_a_word(window: int | None) -> None:
    batch, cache, query = scenario(AttentionMode.TREE, [(9, 20), (9, 9), (8, 12), (67, 69)])
    assert batch.tree_masks is not None and batch.tree_masks.shape[1] == 2
    got = SdpaAttention().prepare(batch).attend(query, cache, scale=0.3, window=window)
    torch.testing.assert_close(got.double(), naive(query, cache, batch, 0.3, window, None, None), rtol=0, atol=2e-5)


def test_padding_never_reads_a_foreign_block() -> None:
    """NaN anywhere outside a sequence's own slots leaves its output alone, though groups are padded."""
    batch, cache, query = scenario(AttentionMode.CAUSAL, [(1, 9), (1, 30)])
    expected = SdpaAttention().prepare(batch).attend(query, cache, scale=1.0)
    own = {
        int(batch.block_tables[seq, key // BLOCK]) * BLOCK + key % BLOCK
        for seq in range(2)
        for key in range(batch.kv_lens_host[seq])
    }
    strangers = [slot for slot in range(cache.joint.shape[0]) if slot not in own]
    cache.joint[strangers] = float("nan")
    assert torch.equal(SdpaAttention().prepare(batch).attend(query, cache, scale=1.0), expected)


def test_written_rows_come_back_in_their_slots() -> None:
    cache = PagedKVCache((LayerShape(2, 3, 4),), 3, BLOCK, torch.float32, CPU).layers[0]
    key, value = torch.randn(2, 2, 3), torch.randn(2, 2, 4)
    cache.write(torch.tensor([7, 2]), key, value)
    assert torch.equal(cache.key[[7, 2]], key) and torch.equal(cache.value[[7, 2]], value)
    assert cache.joint.count_nonzero() == key.numel() + value.numel()


def test_pack_lays_out_slots_and_positions() -> None:
    inputs = [SeqInput([5, 6, 7], 3, [9, 2], 6), SeqInput([8], 0, [4], 1)]
    batch = pack(inputs, BLOCK, CPU)
    assert batch.ids.tolist() == [5, 6, 7, 8]
    assert batch.positions.tolist() == [3, 4, 5, 0]
    assert batch.slots.tolist() == [9 * 4 + 3, 2 * 4 + 0, 2 * 4 + 1, 4 * 4 + 0]
    assert batch.query_starts.tolist() == [0, 3, 4]
    assert batch.block_tables.tolist() == [[9, 2], [4, 0]]
    assert batch.aligned and batch.tree_masks is None


def test_pack_lays_out_trees() -> None:
    """Places in the block table go on by one, positions do not; a chain of committed tokens is causal."""
    tree = TreeRows(3, positions=[4, 4, 5], ancestors=[0b10, 0b100, 1 << 64 | 0b100])
    batch = pack(
        [SeqInput([5, 6, 7], 4, [9, 2], 7, tree), SeqInput([8, 9], 3, [4, 1], 5)], BLOCK, CPU, AttentionMode.TREE
    )
    assert batch.positions.tolist() == [4, 4, 5, 3, 4]
    assert batch.slots.tolist() == [2 * 4 + 0, 2 * 4 + 1, 2 * 4 + 2, 4 * 4 + 3, 1 * 4 + 0]
    assert batch.tree_starts is not None and batch.tree_starts.tolist() == [3, 3, 3, 4, 5]
    assert batch.tree_masks is not None and batch.tree_masks.tolist() == [[2, 0], [4, 0], [4, 1], [0, 0], [0, 0]]


def test_pack_knows_where_keys_reach_past_the_queries() -> None:
    assert not pack([SeqInput([5], 3, [9, 2], 6)], BLOCK, CPU, AttentionMode.BIDIRECTIONAL).aligned


def test_a_path_through_a_tree_equals_the_chain_of_its_tokens() -> None:
    """Rows 0, 2 and 5 of a tree attend as if they had been fed alone, one after another."""
    torch.manual_seed(0)
    path, base = [0, 2, 5], 6
    tree = TreeRows(base, positions=[6, 6, 7, 7, 8, 8], ancestors=[1, 2, 5, 9, 13, 37])
    cache = PagedKVCache((LayerShape(1, 8, 8),), 8, BLOCK, torch.float32, CPU)
    torch.nn.init.normal_(cache.layers[0].joint)
    query = torch.randn(6, 2, 8)
    batch = pack([SeqInput([1] * 6, base, [3, 1, 6], base + 6, tree)], BLOCK, CPU, AttentionMode.TREE)
    in_tree = SdpaAttention().prepare(batch).attend(query, cache.layers[0], scale=0.3)[path]
    cache.compact(batch.slots[path], batch.slots[: len(path)])
    chain = pack([SeqInput([1] * 3, base, [3, 1, 6], base + 3)], BLOCK, CPU)
    alone = SdpaAttention().prepare(chain).attend(query[path], cache.layers[0], scale=0.3)
    torch.testing.assert_close(in_tree, alone, rtol=0, atol=1e-6)


def test_compact_reads_all_before_it_writes() -> None:
    """Source and target overlap both ways, and pairs of equal slots do nothing, in every layer."""
    cache = PagedKVCache((LayerShape(1, 2, 2), LayerShape(2, 1, 3)), 2, BLOCK, torch.float32, CPU)
    for layer in cache.layers:
        layer.joint.copy_(torch.arange(8.0)[:, None].expand_as(layer.joint))
    cache.compact(torch.tensor([1, 3, 2, 0, 0]), torch.tensor([2, 1, 3, 0, 0]))
    for layer in cache.layers:
        assert layer.joint[:, -1].tolist() == [0.0, 3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0]
