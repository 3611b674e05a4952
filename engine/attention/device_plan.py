"""`work.plan` on the device: for steps that are captured once and run again over other lengths.

A plan from the host is as good as the lengths it was made for. A captured step sees every length from 1 to the context,
in every mix: planned for the longest, a batch of one long sequence and many short ones would wait for the long one's
few large items. So the host fixes only what a launch needs (the number of items, the tile) from its bounds, and a small
kernel, captured with the step and run before its first layer, shares the real keys out: all items get about the same
number of keys, and items that are left over do nothing.

The splits are those that `work._splits` would choose, as far as they fit; items are not sorted, for being of one length
none of them is left for the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention.work import (
    GOOD_ENOUGH,
    ITEM_COST,
    MAX_SPLITS,
    MERGE_COST,
    SPLITS,
    Layout,
    Machine,
    Tile,
    choose_tile,
)

WAVES = 2  # rounds of all multiprocessors that splitting may fill, beyond one item for each tile of rows


@dataclass(frozen=True, slots=True)
class Uniform:
    """What the host knows of a batch of `count` sequences of `query` tokens each; `slots` programs run at once."""

    count: int
    query: int
    fold: int
    kv_heads: int
    tile: Tile
    slots: int
    causal: bool
    window: int | None
    longest: int  # keys, at most

    @property
    def tiles(self) -> int:
        """Of rows, of each sequence."""
        return -(-self.query * self.fold // self.tile.block_m)

    @property
    def merges(self) -> int:
        return self.count * self.tiles

    @property
    def capacity(self) -> int:
        """Items that a launch has room for."""
        most = min(MAX_SPLITS, -(-self.longest // self.tile.block_n))
        return min(self.merges + WAVES * -(-self.slots // self.kv_heads), self.merges * most)


def uniform(
    count: int, query: int, longest: int, layout: Layout, machine: Machine, causal: bool, window: int | None
) -> Uniform:
    tile = choose_tile(query * layout.fold, layout, machine)
    slots = machine.processors * tile.resident
    return Uniform(count, query, layout.fold, layout.shape.kv_heads, tile, slots, causal, window, longest)


def plan_reference(kv_lens: torch.Tensor, batch: Uniform) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of `triton_plan.plan`: items [capacity, 8] and merges [merges, 8] int32, as in `work.Plan`.

    A split item's partial result has the item's own place. Items of no tokens do nothing.
    """
    device = kv_lens.device
    work = _key_tiles(kv_lens.long(), batch)
    chunk = _chunk(work, batch)
    splits = (work + chunk - 1) // chunk
    ends = splits.cumsum(0)
    starts = ends - splits
    place = torch.arange(batch.capacity, device=device)
    owner = torch.searchsorted(ends, place, right=True).clamp(max=batch.merges - 1)
    used = place < ends[-1:]
    owner = torch.where(used, owner, 0)
    count = torch.where(used, splits.index_select(0, owner), 1)
    split = torch.where(used, place - starts.index_select(0, owner), 0)
    sequence, number = owner // batch.tiles, owner % batch.tiles
    zero = torch.zeros_like(place)
    partial = torch.where(used & (count > 1), place, -1)
    tokens = torch.where(used, batch.query, 0)
    items = [sequence, sequence * batch.query, tokens, number, split, count, partial, zero]
    tile = torch.arange(batch.merges, device=device)
    merged = torch.where(splits > 1, batch.query, 0)
    rest = torch.zeros_like(tile)
    merges = [tile // batch.tiles * batch.query, merged, tile % batch.tiles, starts, splits, rest, rest, rest]
    return torch.stack(items, 1).int(), torch.stack(merges, 1).int()


def _key_tiles(keys: torch.Tensor, batch: Uniform) -> torch.Tensor:
    """As `work._key_tiles`, for all tiles of rows: [count * tiles] int64."""
    tile = batch.tile
    number = torch.arange(batch.tiles, device=keys.device)
    first = number * tile.block_m // batch.fold
    last = (((number + 1) * tile.block_m - 1) // batch.fold).clamp(max=batch.query - 1)
    before = keys.unsqueeze(1) - batch.query
    end = before + last + 1 if batch.causal else keys.unsqueeze(1).expand(-1, batch.tiles)
    begin = torch.zeros_like(end) if batch.window is None else (before + first - batch.window + 1).clamp(min=0)
    return ((end + tile.block_n - 1) // tile.block_n - begin // tile.block_n).clamp(min=1).flatten()


def _chunk(work: torch.Tensor, batch: Uniform) -> torch.Tensor:
    """Tiles of keys of the longest item, a scalar: as `work._splits` weighs it, among what there is room for."""
    longest, total = work.amax(), work.sum().float()
    splits = torch.arange(1, MAX_SPLITS + 1, device=work.device)
    chunks = (longest + splits - 1) // splits
    count = ((work.unsqueeze(0) + chunks.unsqueeze(1) - 1) // chunks.unsqueeze(1)).sum(1)
    rounds = ((count * batch.kv_heads + batch.slots - 1) // batch.slots).float()
    time = torch.maximum((chunks + ITEM_COST).float(), rounds * (total / count.float() + ITEM_COST))
    time = time + torch.where(splits > 1, MERGE_COST + splits.float() / 4, 0.0)
    known = torch.zeros_like(splits, dtype=torch.bool)
    for candidate in SPLITS:
        known = known | (splits == candidate)
    time = torch.where(known & (splits <= longest) & (count <= batch.capacity), time, float("inf"))
    best = (time <= GOOD_ENOUGH * time.amin()).int().argmax()
    return chunks.index_select(0, best.view(1))
