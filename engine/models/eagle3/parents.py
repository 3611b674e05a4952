"""Which place each token of a batch follows, in a chain or in a draft tree."""

from __future__ import annotations

import torch

from engine.runtime.batch import DeviceBatch


def parent_places(batch: DeviceBatch, rows: torch.Tensor) -> torch.Tensor:
    """The place [T] int64 of the token before each: that of position 0 is itself. `rows` [T]: each token's sequence."""
    if batch.tree_starts is None or batch.tree_masks is None:
        return (batch.positions - 1).clamp(min=0)
    lens = batch.query_starts.diff()
    places = torch.arange(len(rows), device=rows.device) + (batch.kv_lens - lens - batch.query_starts[:-1])[rows]
    bits = (batch.tree_masks.unsqueeze(-1) >> torch.arange(64, device=rows.device)) & 1
    bits = bits.flatten(1)  # [T, 64 * words], one for each place from the tree's start
    nodes = torch.arange(bits.shape[1], device=rows.device)
    starts = batch.tree_starts.long()
    itself = nodes == (places - starts).unsqueeze(1)
    above = (bits * (nodes + 1)).masked_fill(itself, 0).amax(1)  # 1 + the last ancestor's place in the tree, 0: none
    in_tree = batch.tree_masks.ne(0).any(1)
    return torch.where(in_tree, starts + above - 1, places - 1).clamp(min=0)
