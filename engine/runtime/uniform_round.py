"""One round of uniform sequences, from the device's own state to new tokens: what a captured step does.

The same function is captured into a CUDA graph on GPUs and run as it is on any other device. It reads and writes the
same tensors each time, asks the host for nothing and tells it nothing: no shape and no launch depends on a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from engine.runtime.batch import AttentionMode, DeviceBatch
from engine.runtime.device_draw import RowDraws, draw
from engine.runtime.device_state import DeviceState


class BatchRunner(Protocol):
    """As much of a runner as a round needs."""

    @property
    def vocab_size(self) -> int: ...

    def forward_batch(self, batch: DeviceBatch, wanted: Tensor) -> Tensor:
        """fp32 logits [len(wanted), vocabulary or more] of these rows of the packed tokens."""
        ...


@runtime_checkable
class DeviceDraft(Protocol):
    """A draft network that reads a batch made on the device. Its pool shares the target's block ids."""

    @property
    def block_length(self) -> int:
        """Tokens that it is fed for each sequence: the last committed one, and those that stand for the draft."""
        ...

    @property
    def spare_blocks(self) -> tuple[int, int]:
        """The first block that is no sequence's, and how many a sequence may take of those that follow."""
        ...

    def draft_batch(self, batch: DeviceBatch, anchors: Tensor, count: int) -> Tensor:
        """Tokens [n, count] int64 after the last committed ones, `anchors` [n]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Desk:
    """Where rounds find what the host says, and leave what it wants to know. R rows, drafts of at most k tokens.

    `rows` [R] int64 are slots of the state, `limits` [R] int64 most drafted tokens that may stand, `drafts` [R, k]
    int64. `report` [R, k + 2] int64: new tokens, then in the last column how many; 0 where nothing can be drawn.
    """

    rows: Tensor
    limits: Tensor
    drafts: Tensor
    report: Tensor


def make_desk(state: DeviceState, rows: int, most: int) -> Desk:
    device = state.device
    return Desk(
        rows=torch.full((rows,), state.scratch, dtype=torch.int64, device=device),
        limits=torch.zeros(rows, dtype=torch.int64, device=device),
        drafts=torch.zeros(rows, most, dtype=torch.int64, device=device),
        report=torch.zeros(rows, most + 2, dtype=torch.int64, device=device),
    )


def verify_round(runner: BatchRunner, state: DeviceState, desk: Desk, count: int, query: int) -> Callable[[], None]:
    """Of the first `count` rows: feed the last token and query - 1 drafted ones, draw at each, keep what agrees.

    The strict verifier's rule (`verifiers.strict`); with a query of 1 it is plain decoding. The follower of the runner
    writes its entries in the same pass.
    """

    def run() -> None:
        rows, drafts = desk.rows[:count], desk.drafts[:count, : query - 1]
        last = state.last.index_select(0, rows).unsqueeze(1)
        batch, places = uniform_batch(state, rows, torch.cat((last, drafts), dim=1))
        wanted = torch.arange(count * query, device=state.device)
        logits = runner.forward_batch(batch, wanted)[:, : runner.vocab_size]
        each = rows.unsqueeze(1).expand(-1, query).reshape(-1)
        how = RowDraws(
            state.keys.index_select(1, each), places.reshape(-1) + 1, state.temperature.index_select(0, each)
        )
        tokens, new = accept(draw(logits, how).view(count, query), drafts, desk.limits[:count])
        state.move(rows, tokens.gather(1, (new - 1).clamp_(min=0).unsqueeze(1)).squeeze(1), new)
        desk.report[:count, :query].copy_(tokens)
        desk.report[:count, -1].copy_(new)

    return run


def draft_round(draft: DeviceDraft, state: DeviceState, desk: Desk, count: int) -> Callable[[], None]:
    """Fill the drafts of the first `count` rows."""
    first, each = draft.spare_blocks

    def run() -> None:
        rows = desk.rows[:count]
        anchors = state.last.index_select(0, rows)
        ids = anchors.unsqueeze(1).expand(-1, draft.block_length)
        # A block's slots see each other through the pool, so those behind a sequence's own blocks need some of theirs.
        spare = first + each * torch.arange(count, device=state.device)
        batch, _ = uniform_batch(state, rows, ids, AttentionMode.BIDIRECTIONAL, spare)
        desk.drafts[:count].copy_(draft.draft_batch(batch, anchors, desk.drafts.shape[1]))

    return run


def accept(draws: Tensor, drafts: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """New tokens [n, q] and how many of them count [n], for the target's own tokens [n, q] and drafts [n, q - 1].

    A draft stands while it is what the target drew (-1: nothing could be drawn) and no more than `limits` [n] do; the
    target's token follows. Where there is none, the last that stood is the last token: see `pipelines.referee`.
    """
    query = draws.shape[1]
    places = torch.arange(query, device=draws.device)
    agrees = (draws[:, :-1] == drafts) & (places[: query - 1] < limits.unsqueeze(1))
    stand = agrees.long().cumprod(1).sum(1, keepdim=True)
    following = draws.gather(1, stand)
    tokens = torch.where(places < stand, draws, following)
    return tokens, (stand + (following >= 0)).squeeze(1)


def uniform_batch(
    state: DeviceState,
    rows: Tensor,
    ids: Tensor,
    mode: AttentionMode = AttentionMode.CAUSAL,
    spare: Tensor | None = None,
) -> tuple[DeviceBatch, Tensor]:
    """A batch that feeds ids [n, q] from each sequence's last token on, and the places [n, q] of these.

    What lies behind a sequence's own blocks goes to the scratch block, or, with `spare` [n], to blocks from there on.
    """
    bounds, (count, query) = state.bounds, ids.shape
    places = (state.length.index_select(0, rows) - 1).unsqueeze(1) + torch.arange(query, device=state.device)
    own = state.allocated.index_select(0, rows).unsqueeze(1)
    columns = torch.arange(bounds.width, device=state.device)
    behind = bounds.num_blocks if spare is None else (spare.unsqueeze(1) + columns - own).int()
    tables = torch.where(columns < own, state.tables.index_select(0, rows), behind)
    blocks = tables.gather(1, places // bounds.block_size).long()
    batch = DeviceBatch(
        ids=ids.reshape(-1),
        positions=places.clamp(max=bounds.max_len - 1).reshape(-1),
        slots=(blocks * bounds.block_size + places % bounds.block_size).reshape(-1),
        query_starts=torch.arange(0, (count + 1) * query, query, dtype=torch.int32, device=state.device),
        kv_lens=(places[:, -1] + 1).int(),
        block_tables=tables,
        block_size=bounds.block_size,
        query_lens=(query,) * count,
        kv_lens_host=(bounds.width * bounds.block_size,) * count,
        mode=mode,
        aligned=True,
        bounded=True,
    )
    return batch, places
