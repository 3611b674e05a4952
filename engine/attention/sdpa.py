"""Attention over the paged pool in plain torch: the CPU path, and the reference for every other backend.

Sequences are grouped by query length, and by kv length so that padding stays under a factor of two; each group
is one gather and one `scaled_dot_product_attention`, so a decode step has no Python loop over sequences.
Grouped-query heads are folded into query rows (much faster than `enable_gqa` for short queries, never slower).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.runtime.batch import AttentionMode, DeviceBatch
from engine.runtime.kv_cache import LayerCache

# Queries longer than this run one sequence at a time: they are matrix-bound, and padding would only cost.
MAX_GROUPED_QUERY = 32
MIN_BUCKET = 64


@dataclass(slots=True, eq=False)
class Group:
    """Sequences of one query length m, padded to one kv length L. b sequences."""

    rows: torch.Tensor | slice  # [b * m] rows of the packed queries; a slice where they lie together
    slots: torch.Tensor  # [b * L] slots to gather; rows past a sequence's kv_len repeat a real slot and are masked
    size: tuple[int, int, int]  # b, m, L
    query_positions: torch.Tensor  # [b, m]
    kv_lens: torch.Tensor  # [b]
    masks: dict[int | None, torch.Tensor | None]  # window -> additive mask [b, 1, m, L], None: everything is visible
    tree: tuple[torch.Tensor, torch.Tensor] | None = None  # of TREE: starts [b, m], masks [b, m, words]


@dataclass(slots=True, eq=False)
class SdpaStep:
    """See `protocols.StepAttention`."""

    groups: list[Group]
    mode: AttentionMode
    block_length: int
    bounded: bool = False

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if len(self.groups) == 1:
            group = self.groups[0]
            return _attend_group(query, cache, group, self.mask(group, window), scale, softcap, sinks)
        out = query.new_empty(query.shape[0], query.shape[1], cache.shape.value_dim)
        for group in self.groups:
            mask = self.mask(group, window)
            out[group.rows] = _attend_group(query[group.rows], cache, group, mask, scale, softcap, sinks)
        return out

    def mask(self, group: Group, window: int | None) -> torch.Tensor | None:
        """Additive mask [b, 1, m, L] of 0 and -inf, or None if every key is visible; made once per step and window."""
        if window not in group.masks:
            if group.tree is None:
                visible = visibility(
                    self.mode, self.block_length, group.query_positions, group.kv_lens, group.size[2], window
                )
            else:
                visible = tree_visibility(*group.tree, group.query_positions, group.kv_lens, group.size[2], window)
            mask = None
            if self.bounded or not bool(visible.all()):
                mask = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))[:, None]
            group.masks[window] = mask
        return group.masks[window]


class SdpaAttention:
    """See `protocols.AttentionBackend`. Stateless: masks live in what `prepare` returns, for one step."""

    def check_block_size(self, block_size: int) -> None:
        """Any will do."""

    def prepare(self, batch: DeviceBatch) -> SdpaStep:
        if batch.bounded:
            return SdpaStep([_bounded_group(batch)], batch.mode, batch.block_length, bounded=True)
        buckets: dict[tuple[int, int], list[int]] = {}
        for index, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens_host, strict=True)):
            alone = query_len > MAX_GROUPED_QUERY
            bucket = -index - 1 if alone else max(kv_len - 1, MIN_BUCKET - 1).bit_length()
            buckets.setdefault((query_len, bucket), []).append(index)
        return SdpaStep([_group(batch, members) for members in buckets.values()], batch.mode, batch.block_length)


def _bounded_group(batch: DeviceBatch) -> Group:
    """All sequences of a batch that was made on the device, without a word from the host: as long as they can get."""
    count, query_len, longest = batch.num_seqs, batch.query_lens[0], batch.kv_lens_host[0]
    kv_lens = batch.kv_lens.long()
    keys = torch.arange(longest, device=kv_lens.device)
    clamped = torch.minimum(keys[None], kv_lens[:, None] - 1)
    blocks = batch.block_tables.long().gather(1, clamped // batch.block_size)
    return Group(
        rows=slice(0, count * query_len),
        slots=(blocks * batch.block_size + clamped % batch.block_size).flatten(),
        size=(count, query_len, longest),
        query_positions=batch.positions.view(count, query_len),
        kv_lens=kv_lens,
        masks={},
    )


def _group(batch: DeviceBatch, members: list[int]) -> Group:
    """Index tensors of one group, shared by all layers."""
    device = batch.block_tables.device
    lens = [batch.kv_lens_host[i] for i in members]
    query_len, longest = batch.query_lens[members[0]], max(lens)
    pick = torch.tensor(members, device=device)
    starts = batch.query_starts[pick].long()
    together = members == list(range(members[0], members[-1] + 1))
    rows = (starts[:, None] + torch.arange(query_len, device=device)).flatten()
    positions = torch.arange(longest, device=device)
    kv_lens = batch.kv_lens[pick].long()
    # Positions past the end repeat the last real one: a stray slot could hold NaN, and 0 * NaN is NaN.
    clamped = torch.minimum(positions[None], kv_lens[:, None] - 1)
    blocks = batch.block_tables[pick].long().gather(1, clamped // batch.block_size)
    begin = int(sum(batch.query_lens[: members[0]]))
    tree = None
    if batch.tree_starts is not None and batch.tree_masks is not None:
        tree = batch.tree_starts[rows].view(len(members), -1), batch.tree_masks[rows].view(*pick.shape, query_len, -1)
    return Group(
        rows=slice(begin, begin + query_len * len(members)) if together else rows,
        slots=(blocks * batch.block_size + clamped % batch.block_size).flatten(),
        size=(len(members), query_len, longest),
        query_positions=batch.positions[rows].view(len(members), query_len),
        kv_lens=kv_lens,
        masks={},
        tree=tree,
    )


def visibility(
    mode: AttentionMode,
    block_length: int,
    query_positions: torch.Tensor,
    kv_lens: torch.Tensor,
    size: int,
    window: int | None,
) -> torch.Tensor:
    """Which keys each query sees: bool [b, m, size] for query positions [b, m] and kv_lens [b].

    A window of w shows a causal query the keys at distance 0 to w - 1 (itself included), as in `transformers`.
    """
    keys = torch.arange(size, device=query_positions.device)
    query = query_positions[:, :, None]
    visible = (keys < kv_lens[:, None])[:, None, :]
    if mode is AttentionMode.CAUSAL:
        visible = visible & (keys <= query)
    elif mode is AttentionMode.BLOCK_CAUSAL:
        visible = visible & (keys // block_length <= query // block_length)
    else:
        visible = visible.expand(-1, query_positions.shape[1], -1)
    if window is not None:
        visible = visible & (keys > query - window)
        if mode is not AttentionMode.CAUSAL:
            visible = visible & (keys < query + window)
    return visible


def tree_visibility(
    starts: torch.Tensor,
    masks: torch.Tensor,
    query_positions: torch.Tensor,
    kv_lens: torch.Tensor,
    size: int,
    window: int | None,
) -> torch.Tensor:
    """`visibility` in mode TREE, for tree starts [b, m] and ancestor masks [b, m, words]; see `DeviceBatch`."""
    keys = torch.arange(size, device=starts.device)
    node = keys - starts[:, :, None]
    bits = masks.gather(-1, (node // 64).clamp(0, masks.shape[-1] - 1)) >> (node % 64) & 1
    on_path = (node >= 0) & (node < 64 * masks.shape[-1]) & bits.bool()
    visible = ((node < 0) | on_path) & (keys < kv_lens[:, None])[:, None, :]
    if window is not None:
        fed = keys - kv_lens[:, None] + query_positions.shape[1]  # [b, size]: which of the queries a key is
        places = query_positions.gather(1, fed.clamp(0, query_positions.shape[1] - 1))
        visible = visible & (torch.where(fed >= 0, places, keys)[:, None] > query_positions[:, :, None] - window)
    return visible


def _attend_group(
    query: torch.Tensor,
    cache: LayerCache,
    group: Group,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query [b * m, heads, key_dim] -> [b * m, heads, value_dim]."""
    size, length, longest = group.size
    heads, kv_heads = query.shape[1], cache.shape.kv_heads
    fold = heads // kv_heads
    joint = cache.joint.index_select(0, group.slots).to(query.dtype)  # the pool may hold narrower numbers
    key, value = cache.split(joint.view(size, longest, -1))
    key, value = key.transpose(1, 2), value.transpose(1, 2)  # [b, kv_heads, L, dim]
    # [b, m, kv_heads, fold, dim] -> [b, kv_heads, fold * m, dim]
    folded = (
        query.view(size, length, kv_heads, fold, -1).permute(0, 2, 3, 1, 4).reshape(size, kv_heads, fold * length, -1)
    )
    if mask is not None and length > 1:
        mask = mask.repeat(1, 1, fold, 1)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    else:
        out = _explicit(folded, key, value, mask, scale, softcap, sinks, length)
    out = out.view(size, kv_heads, fold, length, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(size * length, heads, -1)


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    length: int,
) -> torch.Tensor:
    """Attention with a logit soft cap (Gemma 2) and per-head sink logits (gpt-oss), which torch's kernel lacks."""
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        probs = scores.softmax(-1)
    else:
        # [heads] -> [1, kv_heads, fold * m, 1]: one more key that takes probability and gives no value
        sink = (
            sinks.float()
            .view(1, key.shape[1], -1, 1)
            .repeat_interleave(length, dim=2)
            .expand(scores.shape[0], -1, -1, -1)
        )
        probs = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    return (probs @ value.float()).to(query.dtype)
