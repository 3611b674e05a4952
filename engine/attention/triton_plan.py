"""The kernel of `device_plan`: shares the keys of a captured step's sequences out to its items, from their lengths."""

import torch
import triton
import triton.language as tl

from engine.attention.device_plan import Uniform
from engine.attention.work import GOOD_ENOUGH, ITEM_COST, MERGE_COST, SPLITS

FIELDS = tl.constexpr(8)
ITEMS = 32  # that one program lays out
_ITEM_COST, _MERGE_COST = tl.constexpr(ITEM_COST), tl.constexpr(MERGE_COST)
_GOOD_ENOUGH = tl.constexpr(GOOD_ENOUGH)
NUM_SPLITS = tl.constexpr(len(SPLITS))


# fmt: off
@triton.jit
def _key_tiles(
    kv_lens, tile, valid, TILES: tl.constexpr, QUERY: tl.constexpr, FOLD: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Tiles of keys that each tile of rows reads; 0 where there is no such tile."""
    keys = tl.load(kv_lens + tile // TILES, mask=valid, other=0)
    number = tile % TILES
    first = number * BLOCK_M // FOLD
    last = tl.minimum(((number + 1) * BLOCK_M - 1) // FOLD, QUERY - 1)
    end = keys
    if CAUSAL:
        end = keys - QUERY + last + 1
    begin = keys * 0
    if WINDOW > 0:
        begin = tl.maximum(keys - QUERY + first - WINDOW + 1, 0)
    tiles = tl.maximum((end + BLOCK_N - 1) // BLOCK_N - begin // BLOCK_N, 1)
    return tl.where(valid, tiles, 0)


@triton.jit
def _chunk(work, KV_HEADS: tl.constexpr, SLOTS: tl.constexpr, CAPACITY: tl.constexpr):
    """Tiles of keys of the longest item: the fewest splits that are about as good as the best of `work.SPLITS`."""
    index = tl.arange(0, 16)
    even = tl.where(index == 0, 1, 3 << tl.maximum(index // 2 - 1, 0))
    splits = tl.where(index % 2 == 1, 1 << ((index + 1) // 2), even)  # 1, 2, 3, 4, 6, 8, 12, ...
    longest = tl.max(work, 0)
    chunks = (longest + splits - 1) // splits
    count = tl.sum((work[None, :] + chunks[:, None] - 1) // chunks[:, None], 1)
    rounds = ((count * KV_HEADS + SLOTS - 1) // SLOTS).to(tl.float32)
    mean = tl.div_rn(tl.sum(work, 0).to(tl.float32), count.to(tl.float32))
    time = tl.maximum((chunks + _ITEM_COST).to(tl.float32), rounds * (mean + _ITEM_COST))
    time = time + tl.where(splits > 1, _MERGE_COST + splits.to(tl.float32) / 4, 0.0)
    time = tl.where((index < NUM_SPLITS) & (splits <= longest) & (count <= CAPACITY), time, float("inf"))
    good = time <= tl.min(time, 0) * _GOOD_ENOUGH
    return tl.max(tl.where(good, chunks, 0), 0)


@triton.jit
def lay_out(
    kv_lens, items, merges,
    MERGES: tl.constexpr, TILES: tl.constexpr, QUERY: tl.constexpr, FOLD: tl.constexpr, KV_HEADS: tl.constexpr,
    SLOTS: tl.constexpr, CAPACITY: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PADDED: tl.constexpr, ITEMS: tl.constexpr,
):
    """Program i lays out items i * ITEMS on; the first one the merges, too. Each finds the splits for itself."""
    tile = tl.arange(0, PADDED)
    valid = tile < MERGES
    work = _key_tiles(kv_lens, tile, valid, TILES, QUERY, FOLD, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    chunk = _chunk(work, KV_HEADS, SLOTS, CAPACITY)
    splits = (work + chunk - 1) // chunk
    ends = tl.cumsum(splits, 0)
    starts = ends - splits
    place = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    before = valid[None, :] & (starts[None, :] <= place[:, None])
    owner = tl.sum(before.to(tl.int32), 1) - 1
    mine = tile[None, :] == owner[:, None]
    used = place < tl.sum(splits, 0)
    count = tl.where(used, tl.sum(tl.where(mine, splits[None, :], 0), 1), 1)
    split = tl.where(used, place - tl.sum(tl.where(mine, starts[None, :], 0), 1), 0)
    owner = tl.where(used, owner, 0)
    inside = place < CAPACITY
    item = items + place * FIELDS
    tl.store(item, owner // TILES, mask=inside)
    tl.store(item + 1, owner // TILES * QUERY, mask=inside)
    tl.store(item + 2, tl.where(used, QUERY, 0), mask=inside)
    tl.store(item + 3, owner % TILES, mask=inside)
    tl.store(item + 4, split, mask=inside)
    tl.store(item + 5, count, mask=inside)
    tl.store(item + 6, tl.where(used & (count > 1), place, -1), mask=inside)
    tl.store(item + 7, place * 0, mask=inside)
    if tl.program_id(0) == 0:
        merge = merges + tile * FIELDS
        tl.store(merge, tile // TILES * QUERY, mask=valid)
        tl.store(merge + 1, tl.where(splits > 1, QUERY, 0), mask=valid)
        tl.store(merge + 2, tile % TILES, mask=valid)
        tl.store(merge + 3, starts, mask=valid)
        tl.store(merge + 4, splits, mask=valid)
        for field in tl.static_range(5, 8):
            tl.store(merge + field, tile * 0, mask=valid)
# fmt: on


def plan(kv_lens: torch.Tensor, batch: Uniform) -> tuple[torch.Tensor, torch.Tensor]:
    """Items [capacity, 8] and merges [merges, 8] int32 for kv_lens [count] int32, queued as one kernel."""
    items = torch.empty(batch.capacity, FIELDS.value, dtype=torch.int32, device=kv_lens.device)
    merges = torch.empty(batch.merges, FIELDS.value, dtype=torch.int32, device=kv_lens.device)
    lay_out[(triton.cdiv(batch.capacity, ITEMS),)](
        *(kv_lens, items, merges),
        MERGES=batch.merges,
        TILES=batch.tiles,
        QUERY=batch.query,
        FOLD=batch.fold,
        KV_HEADS=batch.kv_heads,
        SLOTS=batch.slots,
        CAPACITY=batch.capacity,
        CAUSAL=batch.causal,
        WINDOW=batch.window or 0,
        BLOCK_M=batch.tile.block_m,
        BLOCK_N=batch.tile.block_n,
        PADDED=triton.next_power_of_2(batch.merges),
        ITEMS=ITEMS,
    )
    return items, merges
