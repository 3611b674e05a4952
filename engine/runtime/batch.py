"""DeviceBatch: one step's tokens of all sequences, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch


class AttentionMode(Enum):
    """Which keys a query sees, by absolute position. All modes also need key < kv_len."""

    CAUSAL = "causal"  # key <= query
    BLOCK_CAUSAL = "block_causal"  # key's block <= query's block, blocks of `block_length` positions from 0
    BIDIRECTIONAL = "bidirectional"  # every key


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBatch:
    """Inputs of one forward pass. T tokens of n sequences lie one after another.

    Queries of sequence i are rows query_starts[i] to query_starts[i + 1]; their positions are consecutive. It attends
    to the slots of positions 0 to kv_lens[i] - 1, which its row of `block_tables` names; kv_lens may reach past the
    queries. `query_lens` and `kv_lens_host` are the host's copies, so that nothing has to be read back from a device.
    """

    ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64: where each token's K/V goes, block_id * block_size + offset
    query_starts: torch.Tensor  # [n + 1] int32
    kv_lens: torch.Tensor  # [n] int32
    block_tables: torch.Tensor  # [n, max_blocks] int32, padded with 0 (never read past kv_lens)
    block_size: int
    query_lens: tuple[int, ...]
    kv_lens_host: tuple[int, ...]
    mode: AttentionMode = AttentionMode.CAUSAL
    block_length: int = 1  # of BLOCK_CAUSAL

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)


@dataclass(frozen=True, slots=True)
class SeqInput:
    """One sequence's part of a batch, on the host: feed `ids` from position `start`; `kv_len` keys are visible."""

    ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    kv_len: int


def pack(
    inputs: Sequence[SeqInput],
    block_size: int,
    device: torch.device,
    mode: AttentionMode = AttentionMode.CAUSAL,
    block_length: int = 1,
) -> DeviceBatch:
    """Pack sequences into one batch. All index arithmetic is vectorised: no loop over tokens."""
    query_lens = tuple(len(item.ids) for item in inputs)
    kv_lens = tuple(item.kv_len for item in inputs)
    lens = torch.tensor(query_lens)
    starts = torch.zeros(len(inputs) + 1, dtype=torch.int32)
    torch.cumsum(lens, 0, out=starts[1:])
    ids = torch.tensor([token for item in inputs for token in item.ids])
    rows = torch.repeat_interleave(torch.arange(len(inputs)), lens)
    first = torch.tensor([item.start for item in inputs]) - starts[:-1]
    positions = torch.arange(int(starts[-1])) + first[rows]
    width = max(len(item.block_ids) for item in inputs)
    tables = torch.tensor([[*item.block_ids, *([0] * (width - len(item.block_ids)))] for item in inputs])
    slots = tables[rows, positions // block_size] * block_size + positions % block_size
    return DeviceBatch(
        ids=ids.to(device),
        positions=positions.to(device),
        slots=slots.to(device),
        query_starts=starts.to(device),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        block_tables=tables.to(device, torch.int32),
        block_size=block_size,
        query_lens=query_lens,
        kv_lens_host=kv_lens,
        mode=mode,
        block_length=block_length,
    )
