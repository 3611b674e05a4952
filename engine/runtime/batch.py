"""DeviceBatch: one step's tokens of all sequences, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from engine.records import record
from engine.runtime.block_tables import BlockTables
from engine.runtime.transfer import to_device

Integers = npt.NDArray[np.int64]


class AttentionMode(Enum):
    """Which keys a query sees, by absolute position. All modes also need key < kv_len."""

    CAUSAL = "causal"  # key <= query
    BLOCK_CAUSAL = "block_causal"  # key's block <= query's block, blocks of `block_length` positions from 0
    BIDIRECTIONAL = "bidirectional"  # every key
    # Keys are counted by their place in the block table, and a query's own place may be another than its position:
    # siblings of a draft tree share a position. See `DeviceBatch.tree_masks`.
    TREE = "tree"


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBatch:
    """Inputs of one forward pass. T tokens of n sequences lie one after another.

    Queries of sequence i are rows query_starts[i] to query_starts[i + 1]; their positions are consecutive. It attends
    to the slots of positions 0 to kv_lens[i] - 1, which its row of `block_tables` names; kv_lens may reach past the
    queries. `query_lens` and `kv_lens_host` are the host's copies, so that nothing has to be read back from a device;
    attention takes kv_lens_host as upper bounds only.

    In mode TREE keys are places 0 to kv_lens[i] - 1 of the block table, the queries are the last of them, and each
    query sees the keys before tree_starts[row], and key tree_starts[row] + 64 * w + b for each bit b that is set in
    tree_masks[row, w]: its ancestors and itself. A window of w hides keys whose positions are w or more before the
    query's; keys that are no queries of this step count as lying at the position of their place.
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
    tree_starts: torch.Tensor | None = None  # of TREE, [T] int32
    tree_masks: torch.Tensor | None = None  # of TREE, [T, words] int64
    aligned: bool = False  # known to the host: the queries of each sequence are the last of its kv_len keys
    # Made on the device, to be run again over other contents: query_lens are equal, and kv_lens_host is the most that
    # kv_lens can ever be. What is planned for it must be planned there.
    bounded: bool = False

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)


@dataclass(frozen=True, slots=True)
class TreeRows:
    """The queries of a sequence as nodes of a draft tree, parents before children.

    Each sees the keys before place `root` of the block table, where the tree begins, and key root + b for each bit b
    of its `ancestors`, which count itself. `root` is before the first query where parts of the tree were fed earlier.
    """

    root: int
    positions: Sequence[int]
    ancestors: Sequence[int]


@record
class SeqInput:
    """One sequence's part of a batch, on the host: feed `ids` from position `start`; `kv_len` keys are visible.

    With a `tree`, which needs mode TREE, `start` is a place in the block table; kv_len must be start + len(ids).
    """

    ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    kv_len: int
    tree: TreeRows | None = None


class Packer:
    """Packs the batches of one pool, one after another; knows block tables again by identity."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._tables = BlockTables()

    def pack(
        self,
        inputs: Sequence[SeqInput],
        mode: AttentionMode = AttentionMode.CAUSAL,
        block_length: int = 1,
    ) -> DeviceBatch:
        """See `pack`."""
        size = self._block_size
        query_lens, kv_lens = tuple([len(item.ids) for item in inputs]), tuple([item.kv_len for item in inputs])
        first = np.array([item.start for item in inputs], dtype=np.int64)
        lens = np.array(query_lens, dtype=np.int64)
        tables = self._tables.rows([item.block_ids for item in inputs])
        starts = np.zeros(len(inputs) + 1, dtype=np.int32)
        lens.cumsum(out=starts[1:])
        total = int(starts[-1])
        ids = np.fromiter(chain.from_iterable([item.ids for item in inputs]), dtype=np.int64, count=total)
        if max(query_lens) == 1:
            rows, places = np.arange(total), first
        else:
            rows = np.repeat(np.arange(len(inputs)), lens)
            places = np.arange(total) + (first - starts[:-1])[rows]
        slots = tables[rows, places // size].astype(np.int64) * size + places % size
        positions, *trees = _pack_trees(inputs, places) if mode is AttentionMode.TREE else (places,)
        keys = np.array(kv_lens, dtype=np.int32)
        assert mode is AttentionMode.TREE or all(item.tree is None for item in inputs)
        host = [torch.from_numpy(part) for part in (ids, positions, slots, starts, keys, tables, *trees)]
        ids_there, positions_there, slots_there, starts_there, keys_there, tables_there, *trees_there = to_device(
            host, self._device
        )
        return DeviceBatch(
            ids=ids_there,
            positions=positions_there,
            slots=slots_there,
            query_starts=starts_there,
            kv_lens=keys_there,
            block_tables=tables_there,
            block_size=size,
            query_lens=query_lens,
            kv_lens_host=kv_lens,
            mode=mode,
            block_length=block_length,
            tree_starts=trees_there[0] if trees_there else None,
            tree_masks=trees_there[1] if trees_there else None,
            aligned=bool((keys == first + lens).all()),
        )


def pack(
    inputs: Sequence[SeqInput],
    block_size: int,
    device: torch.device,
    mode: AttentionMode = AttentionMode.CAUSAL,
    block_length: int = 1,
) -> DeviceBatch:
    """Pack sequences into one batch. No loop over tokens."""
    return Packer(block_size, device).pack(inputs, mode, block_length)


def _pack_trees(inputs: Sequence[SeqInput], places: Integers) -> tuple[Integers, npt.NDArray[np.int32], Integers]:
    """Positions [T], tree_starts [T] and tree_masks [T, words] of a TREE batch.

    `places` [T] are the queries' places in their block tables. A sequence without a tree is causal.
    """
    assert all(item.kv_len == item.start + len(item.ids) for item in inputs)
    bits = max((mask.bit_length() for item in inputs if item.tree for mask in item.tree.ancestors), default=0)
    words = max(-(-bits // 64), 1)
    positions, starts, masks = places.copy(), places.astype(np.int32) + 1, bytearray()
    row = 0
    for item in inputs:
        end = row + len(item.ids)
        if item.tree is None:
            masks += bytes(8 * words * len(item.ids))
        else:
            positions[row:end] = item.tree.positions
            starts[row:end] = item.tree.root
            masks += b"".join(mask.to_bytes(8 * words, "little") for mask in item.tree.ancestors)
        row = end
    return positions, starts, np.frombuffer(masks, dtype=np.int64).reshape(-1, words)
