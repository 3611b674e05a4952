"""How attention is cut into work items: every query row once, every split once, and enough of them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from engine.attention.work import MAX_SPLITS, Layout, Lengths, Machine, Plan, by_height, choose_tile, padded, plan
from engine.runtime.kv_cache import LayerShape

HOPPER = Machine(processors=132, shared_memory=232448)
AMPERE = Machine(processors=108, shared_memory=166912, wgmma=False)
ADA = Machine(processors=58, shared_memory=101376, wgmma=False)


def layout(kv_heads: int = 8, fold: int = 4, key_dim: int = 128, value_dim: int = 128, itemsize: int = 2) -> Layout:
    return Layout(fold, LayerShape(kv_heads, key_dim, value_dim), itemsize)


def planned(
    lengths: list[tuple[int, int]],
    of: Layout,
    machine: Machine = HOPPER,
    causal: bool = True,
    window: int | None = None,
) -> Plan:
    queries, keys = torch.tensor(lengths).unbind(1)
    index = torch.arange(len(lengths)) + 100
    return plan(Lengths(index, queries.cumsum(0) - queries, queries, keys), of, machine, causal, window)


LENGTHS = {
    "decode": [(1, 1000)] * 3,
    "one long decode": [(1, 100_000)],
    "one among many": [(1, 50_000), *[(1, 300)] * 40],
    "verify": [(16, 4000), (9, 20), (1, 1)],
    "prefill": [(2048, 2048)],
    "late chunk": [(128, 100_000)],
    "full batch": [(1, 1000)] * 300,
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("fold", [1, 4, 7])
@pytest.mark.parametrize("window", [None, 500])
def test_every_row_has_its_items(name: str, fold: int, window: int | None) -> None:
    """Tiles cover the rows of each sequence; splits, partial results and merges belong together."""
    lengths = LENGTHS[name]
    made = planned(lengths, layout(fold=fold), window=window)
    tiles: Counter[tuple[int, int]] = Counter()
    for sequence, first_token, tokens, tile, split, splits, partial, _ in made.items.tolist():
        assert (tokens, first_token) == (lengths[sequence - 100][0], sum(n for n, _ in lengths[: sequence - 100]))
        assert 0 <= split < splits <= MAX_SPLITS and (partial >= 0) == (splits > 1)
        tiles[sequence - 100, tile] += 1
    assert all(count == 1 for count in Counter(map(tuple, made.items[:, [0, 3, 4]].tolist())).values())
    for i, (queries, _) in enumerate(lengths):
        covered = -(-queries * fold // made.tile.block_m)
        assert sorted(tile for sequence, tile in tiles if sequence == i) == list(range(covered))
    partials = {}
    for sequence, first_token, tokens, tile, split, splits, partial, _ in made.items.tolist():
        assert tiles[sequence - 100, tile] == splits
        if partial >= 0:
            partials[partial] = (first_token, tokens, tile, split, splits)
    merged = {
        first + split: (first_token, tokens, tile, split, splits)
        for first_token, tokens, tile, first, splits, *_ in made.merges.tolist()
        for split in range(splits)
    }
    assert merged == partials and sorted(partials) == list(range(made.partials))


@pytest.mark.parametrize(("name", "least"), [("one long decode", 30), ("one among many", 8), ("late chunk", 3)])
def test_long_contexts_are_split(name: str, least: int) -> None:
    assert planned(LENGTHS[name], layout()).items[:, 5].max() >= least


@pytest.mark.parametrize("query", range(1, 33))
def test_a_verify_step_is_split_as_a_decode_step_is(query: int) -> None:
    assert planned([(query, 8000)] * 2, layout()).items[:, 5].min() > 4


@pytest.mark.parametrize(("name", "window"), [("full batch", None), ("prefill", None), ("one long decode", 128)])
def test_what_fills_the_machine_or_reads_little_is_not_split(name: str, window: int | None) -> None:
    assert planned(LENGTHS[name], layout(), window=window).items[:, 5].max() == 1


def test_one_kv_head_is_split_more_than_eight() -> None:
    few, many = (int(planned([(1, 30_000)] * 4, layout(kv_heads=heads)).items[:, 5].max()) for heads in (1, 8))
    assert few > 2 * many > 2


def test_long_items_come_first() -> None:
    """Tiles of a causal prefill grow with their rows, 64 keys every other tile: the short ones fill gaps at the end."""
    causal, every = (planned(LENGTHS["prefill"], layout(), causal=causal).items[:, 3] for causal in (True, False))
    assert (causal // 2).tolist() == sorted((causal // 2).tolist(), reverse=True)
    assert every.tolist() == list(range(64))


def test_short_and_long_queries_have_launches_of_their_own() -> None:
    assert by_height([1, 16, 17, 2], fold=4) == [[0, 1, 3], [2]]
    assert by_height([500], fold=1) == [[0]]


@pytest.mark.parametrize("machine", [HOPPER, AMPERE, ADA])
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (512, 512)])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 5000])
def test_tiles_fit_into_shared_memory(machine: Machine, dims: tuple[int, int], itemsize: int, rows: int) -> None:
    tile = choose_tile(rows, layout(key_dim=dims[0], value_dim=dims[1], itemsize=itemsize), machine)
    queries = tile.block_m * padded(dims[0])
    buffers = min(tile.stages, 2) * tile.block_n * (padded(dims[0]) + padded(dims[1]))
    assert (queries + buffers) * itemsize <= machine.shared_memory
    assert tile.block_n >= 16 and tile.block_n & (tile.block_n - 1) == 0
