"""How one step's attention is cut into work items: plain arithmetic on the host, from bounds it knows without a sync.

Lengths of queries are exact; kv lengths are upper bounds (kernels read the real ones on the device, and each split
takes its share of the real keys). Nothing here needs a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.runtime.kv_cache import LayerShape

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
MAX_SPLITS = SPLITS[-1]
# Costs in units of one tile of keys: what an item costs besides its keys (its start, its result), and one more launch.
ITEM_COST = 3
MERGE_COST = 4
GOOD_ENOUGH = 1.1  # fewer splits are taken if their estimate is within this factor of the best
MIN_DIM = 16  # smallest extent of a matrix product in Triton


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan needs to know of a device."""

    processors: int  # streaming multiprocessors
    shared_memory: int  # bytes that one program may use
    wgmma: bool = True  # Hopper's matrix instructions, which read keys and values from shared memory alone


@dataclass(frozen=True, slots=True)
class Tile:
    """Shape of one program: rows of queries, keys per turn of its loop, and how it is compiled."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    resident: int  # programs that fit on one multiprocessor, about


@dataclass(frozen=True, slots=True)
class Layout:
    """The heads of one layer. `fold` query heads share a KV head."""

    fold: int
    shape: LayerShape
    itemsize: int  # bytes of a pool element


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sequences of one launch: where their queries start, how many there are, and at most how many keys."""

    index: torch.Tensor  # [n] int64, place in the batch
    starts: torch.Tensor  # [n] int64
    queries: torch.Tensor  # [n] int64
    keys: torch.Tensor  # [n] int64


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Work items of one launch, on the host.

    items [w, 8] int32: sequence, its first token, its tokens, tile of rows, split, splits, place of the partial
    result (-1: write the output), 0. merges [s, 8] int32: first token, tokens, tile of rows, first partial, splits.
    """

    tile: Tile
    items: torch.Tensor
    merges: torch.Tensor
    partials: int


def padded(dim: int) -> int:
    """The extent that a head dimension takes in a tile: a power of two, 16 at least."""
    return max(MIN_DIM, 1 << (dim - 1).bit_length())


def choose_tile(rows: int, layout: Layout, machine: Machine) -> Tile:
    """The tile for sequences of at most `rows` query rows (tokens times fold).

    Up to 16 rows (decode) a tile is one matrix instruction high and the loop waits for memory; 64 rows is the least
    that Hopper's wgmma takes; more rows than that read each key once per 128 of them, with two warpgroups. A turn's
    keys and values are 32 KB (64 keys of 128 wide heads in 16 bits): two buffers of that, the compiler's pipeline, keep
    enough bytes in flight and leave room for a second program on a multiprocessor.
    """
    key_width, value_width = padded(layout.shape.key_dim), padded(layout.shape.value_dim)
    block_m = next((size for size in (16, 32, 64) if rows <= size), 128)
    if layout.itemsize == 4:  # exact fp32 products run without matrix units: small tiles, or registers spill
        block_m = 16
    # The sums of a tile lie in registers: 128 of a thread's 255 at most, half of that where operands are there too.
    while block_m * value_width > 8 * 32 * (128 if machine.wgmma else 64):
        block_m //= 2
    warps = 8 if block_m == 128 or block_m * value_width >= 128 * 128 else 4
    turn = (key_width + value_width) * layout.itemsize
    block_n, stages = min(128, max(MIN_DIM, _power_below(32768 // turn))), 3

    def too_large() -> bool:
        """Queries, buffers of keys and values, and less than 2 KB of page ids and sums."""
        buffers = 2 if stages > 1 else 1
        return block_m * key_width * layout.itemsize + buffers * block_n * turn + 2048 > machine.shared_memory

    while too_large() and block_n > MIN_DIM:
        block_n //= 2
    while too_large() and block_m > MIN_DIM:
        block_m //= 2
    if too_large():
        stages = 1
    resident = {16: 3, 32: 3, 64: 2, 128: 1}[block_m]  # by registers, of heads 128 wide
    return Tile(block_m, block_n, warps, stages, resident)


def by_height(query_lens: Sequence[int], fold: int) -> list[list[int]]:
    """Sequences that share a launch: those of up to 64 query rows, and the longer ones. Empty groups are left out."""
    groups: tuple[list[int], list[int]] = ([], [])
    for index, length in enumerate(query_lens):
        groups[length * fold > 64].append(index)
    return [group for group in groups if group]


def plan(lengths: Lengths, layout: Layout, machine: Machine, causal: bool, window: int | None) -> Plan:
    """Tiles of all sequences, split over their keys where that fills the machine, longest first.

    `causal`: no query sees keys after itself (else all keys count). Both arguments only shape the estimate of a
    tile's work; they do not change what a kernel computes.
    """
    tile = choose_tile(int(lengths.queries.max()) * layout.fold, layout, machine)
    rows = lengths.queries * layout.fold
    tiles = _ceil(rows, tile.block_m)
    owner = torch.repeat_interleave(torch.arange(rows.numel()), tiles)
    number = torch.arange(owner.numel()) - (tiles.cumsum(0) - tiles)[owner]
    work = _key_tiles(lengths, owner, number, tile, layout.fold, causal, window)
    splits = _splits(work, layout.shape.kv_heads, machine.processors * tile.resident)
    order = torch.argsort(work / splits, descending=True, stable=True)  # long items last would leave a tail
    owner, number, splits = owner[order], number[order], splits[order]
    return _lay_out(tile, lengths, owner, number, splits)


def _key_tiles(
    lengths: Lengths,
    owner: torch.Tensor,
    number: torch.Tensor,
    tile: Tile,
    fold: int,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """About how many tiles of keys each tile of rows has to read, at least 1."""
    keys, queries = lengths.keys[owner], lengths.queries[owner]
    first = number * tile.block_m // fold
    last = torch.minimum(((number + 1) * tile.block_m - 1) // fold, queries - 1)
    end = keys - queries + last + 1 if causal else keys
    begin = torch.zeros_like(end) if window is None else (keys - queries + first - window + 1).clamp(min=0)
    return (_ceil(end, tile.block_n) - begin // tile.block_n).clamp(min=1)


def _splits(work: torch.Tensor, kv_heads: int, slots: int) -> torch.Tensor:
    """Into how many items each tile is cut, when `slots` programs run at once.

    All tiles are cut to one length of chunk. For each candidate length the time is estimated as that of the longest
    item, or of the mean item times the rounds that all items take, whichever is more; the longest chunk that is about
    as good as the best wins. (FlashAttention-3 weighs rounds against splits in the same way, for equal lengths.)
    """
    longest = int(work.max())
    candidates = torch.tensor([splits for splits in SPLITS if splits <= longest])
    chunks = _ceil(torch.tensor(longest), candidates)  # [c]
    items = _ceil(work[None], chunks[:, None])  # [c, tiles]
    count = items.sum(1)
    rounds = _ceil(count * kv_heads, torch.tensor(slots))
    mean = work.sum() / count
    time = torch.maximum(chunks + ITEM_COST, rounds * (mean + ITEM_COST))
    time = time + torch.where(candidates > 1, MERGE_COST + candidates / 4, 0.0)
    best = int(torch.nonzero(time <= GOOD_ENOUGH * time.min())[0])
    return items[best]


def _lay_out(tile: Tile, lengths: Lengths, owner: torch.Tensor, number: torch.Tensor, splits: torch.Tensor) -> Plan:
    parts = torch.repeat_interleave(torch.arange(owner.numel()), splits)
    split = torch.arange(parts.numel()) - (splits.cumsum(0) - splits)[parts]
    shared = splits > 1
    kept = torch.where(shared, splits, 0)
    first_partial = kept.cumsum(0) - kept
    partial = torch.where(shared[parts], first_partial[parts] + split, -1)
    sequence, first_token, tokens = lengths.index[owner], lengths.starts[owner], lengths.queries[owner]
    zero = torch.zeros_like(split)
    items = [sequence[parts], first_token[parts], tokens[parts], number[parts], split, splits[parts], partial, zero]
    merges = [first_token, tokens, number, first_partial, splits, *[torch.zeros_like(splits)] * 3]
    return Plan(
        tile,
        torch.stack(items, 1).to(torch.int32),
        torch.stack(merges, 1)[shared].to(torch.int32),
        int(kept.sum()),
    )


def _power_below(value: int) -> int:
    return 1 << (value.bit_length() - 1) if value else 0


def _ceil(value: torch.Tensor, by: torch.Tensor | int) -> torch.Tensor:
    return (value + by - 1) // by
