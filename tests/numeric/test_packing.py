"""Batches of one pool after another: kept block tables against tables made anew."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from engine.runtime.batch import AttentionMode, Packer, SeqInput, TreeRows, pack
from engine.runtime.block_tables import BlockTables

CPU = torch.device("cpu")
NAMES = ("ids", "positions", "slots", "query_starts", "kv_lens", "block_tables", "tree_starts", "tree_masks")


def padded(tables: list[tuple[int, ...]]) -> list[list[int]]:
    width = max(map(len, tables), default=0)
    return [[*table, *([0] * (width - len(table)))] for table in tables]


@pytest.mark.parametrize("seed", range(6))
def test_kept_tables_equal_new_ones_over_a_long_life(seed: int) -> None:
    """Tables grow, shrink, come, go and change places, many at a time."""
    chance, kept = random.Random(seed), BlockTables()
    running: list[tuple[int, ...]] = []
    for _ in range(300):
        running = [table for table in running if chance.random() > 0.05]
        for place, table in enumerate(running):
            roll = chance.random()
            if roll < 0.15:
                running[place] = (*table, *(chance.randrange(1, 999) for _ in range(chance.randint(1, 3))))
            elif roll < 0.18:
                running[place] = table[: len(table) // 2]
            elif roll < 0.2:
                running[place] = tuple(chance.randrange(1, 999) for _ in table)
        while chance.random() < 0.4 and len(running) < 20:
            running.insert(chance.randint(0, len(running)), tuple(range(1, chance.randint(2, 40))))
        if chance.random() < 0.1:
            chance.shuffle(running)
        some = running if chance.random() < 0.8 else running[: len(running) // 2]
        rows = kept.rows(some)
        assert rows.dtype == np.int32 and rows.flags.c_contiguous
        assert rows.tolist() == padded(some)
        rows[:] = -1  # the caller's own


def test_a_list_that_changes_in_place_is_seen() -> None:
    kept, table = BlockTables(), [4, 5]
    assert kept.rows([table, (1,)]).tolist() == [[4, 5], [1, 0]]
    table[0] = 7
    assert kept.rows([table, (1,)]).tolist() == [[7, 5], [1, 0]]


@pytest.mark.parametrize("mode", [AttentionMode.CAUSAL, AttentionMode.TREE])
def test_a_packer_gives_the_batches_that_fresh_ones_give(mode: AttentionMode) -> None:
    chance, packer = random.Random(3), Packer(4, CPU)
    tables = [tuple(chance.sample(range(1, 90), 20)) for _ in range(6)]
    for _ in range(40):
        inputs = []
        for table in chance.sample(tables, chance.randint(1, 6)):
            count, start = chance.choice((1, 1, 1, 3, 9)), chance.randrange(60)
            ids = [chance.randrange(1000) for _ in range(count)]
            tree = None
            if mode is AttentionMode.TREE and chance.random() < 0.5:
                tree = TreeRows(
                    start, [start + (node > 0) for node in range(count)], [1 | 1 << n for n in range(count)]
                )
            ahead = 0 if mode is AttentionMode.TREE else chance.choice((0, 0, 5))
            inputs.append(SeqInput(ids, start, table, start + count + ahead, tree))
        kept, fresh = packer.pack(inputs, mode), pack(inputs, 4, CPU, mode)
        for name in (
            "ids",
            "positions",
            "slots",
            "query_starts",
            "kv_lens",
            "block_tables",
            "tree_starts",
            "tree_masks",
        ):
            ours, theirs = getattr(kept, name), getattr(fresh, name)
            assert (ours is None and theirs is None) or (ours.dtype is theirs.dtype and torch.equal(ours, theirs)), name
        places = [(item, item.start + i) for item in inputs for i in range(len(item.ids))]
        assert kept.slots.tolist() == [item.block_ids[at // 4] * 4 + at % 4 for item, at in places]
        assert kept.ids.tolist() == [token for item in inputs for token in item.ids]
        if mode is AttentionMode.CAUSAL:
            assert kept.positions.tolist() == [at for _, at in places]
        assert kept.aligned == all(item.kv_len == item.start + len(item.ids) for item in inputs)
        assert (kept.query_lens, kept.kv_lens_host) == (
            tuple(len(item.ids) for item in inputs),
            tuple(item.kv_len for item in inputs),
        )
