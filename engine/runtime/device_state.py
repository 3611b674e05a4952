"""What captured steps keep of each request on the device, by slot: nothing of it is ever read back.

A step takes its inputs from here and moves the state on by itself, so the next step can be launched before anybody
knows what the last one drew. The host adds what it alone knows: which requests run, and the blocks they were given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.runtime.transfer import to_device

_SIGN = 1 << 63


@dataclass(frozen=True, slots=True)
class Entry:
    """A request as the host knows it, with all results in: `length` committed tokens, the last of which is `last`.

    `temperature` 0 is greedy. Seed and choice are the key of its draws (`rng.Draw`).
    """

    last: int
    length: int
    seed: int
    choice: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the state has room for. Blocks from `num_blocks` on are nobody's: padding writes there."""

    slots: int  # requests
    max_len: int  # tokens of a sequence
    reach: int  # positions past its last token that a step may touch
    block_size: int
    num_blocks: int

    @property
    def width(self) -> int:
        """Blocks of the longest sequence, with its reach."""
        return -(-(self.max_len + self.reach) // self.block_size)


class DeviceState:
    """One row per slot; the last row, `scratch`, is for what pads a batch: one token in a block of nobody's.

    `last` and `length` [slots + 1] int64, `keys` [2, slots + 1] int64 (seed, choice), `temperature` [slots + 1]
    float32, `tables` [slots + 1, width] int32, `allocated` [slots + 1] int64: blocks of each table that are its own;
    the others are the scratch block.
    """

    def __init__(self, bounds: Bounds, device: torch.device) -> None:
        self.bounds = bounds
        self.device = device
        self.scratch = bounds.slots
        rows = bounds.slots + 1
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)
        self.length = torch.ones(rows, dtype=torch.int64, device=device)
        self.keys = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.temperature = torch.zeros(rows, dtype=torch.float32, device=device)
        self.allocated = torch.ones(rows, dtype=torch.int64, device=device)
        self.tables = torch.full((rows, bounds.width), bounds.num_blocks, dtype=torch.int32, device=device)

    def enter(self, entries: Sequence[tuple[int, Entry]]) -> None:
        """Set the rows of these slots, without their blocks. Queued, not waited for."""
        numbers = [[slot, entry.last, entry.length, _signed(entry.seed), entry.choice] for slot, entry in entries]
        host = torch.tensor(numbers, dtype=torch.int64).T.contiguous()
        heat = torch.tensor([entry.temperature for _, entry in entries], dtype=torch.float32)
        numbers_there, heat_there = to_device((host, heat), self.device)
        slots, last, length, seed, choice = numbers_there.unbind(0)
        self.last.index_copy_(0, slots, last)
        self.length.index_copy_(0, slots, length)
        self.keys.index_copy_(1, slots, torch.stack((seed, choice)))
        self.temperature.index_copy_(0, slots, heat_there)

    def give(self, cells: Sequence[tuple[int, int, int]], counts: Sequence[tuple[int, int]]) -> None:
        """Blocks (slot, column, block) for the tables, and how many (slot, blocks) each of these slots has then."""
        where = torch.tensor(cells, dtype=torch.int64).view(-1, 3).T.contiguous()
        totals = torch.tensor(counts, dtype=torch.int64).view(-1, 2).T.contiguous()
        where_there, totals_there = to_device((where, totals), self.device)
        places = where_there[0] * self.bounds.width + where_there[1]
        self.tables.view(-1).index_copy_(0, places, where_there[2].int())
        self.allocated.index_copy_(0, totals_there[0], totals_there[1])

    def move(self, rows: Tensor, last: Tensor, count: Tensor) -> None:
        """After a step over `rows` [n]: each has `count` [n] tokens more, the last of which is `last` [n].

        Rows of no new token stay as they are; so does the padding, which may come several times.
        """
        moved = (count > 0) & (rows < self.scratch)
        self.last.index_copy_(0, rows, torch.where(moved, last, self.last.index_select(0, rows)))
        self.length.index_copy_(0, rows, self.length.index_select(0, rows) + torch.where(moved, count, 0))


def _signed(value: int) -> int:
    """`value` mod 2^64 as the int64 of the same bits."""
    return (value + _SIGN) % (2 * _SIGN) - _SIGN
