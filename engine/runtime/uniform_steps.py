"""Uniform steps: every sequence feeds its last token, and as many drafted ones as all others. Captured at the start.

The host knows which requests take part and upper bounds of their lengths; tokens and lengths it learns when a step's
report arrives, which may be after it launched the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from engine.runtime.cuda_graphs import GraphPool, buckets
from engine.runtime.device_state import Bounds, DeviceState, Entry
from engine.runtime.outbox import Flight, Outbox
from engine.runtime.transfer import to_device
from engine.runtime.uniform_round import BatchRunner, DeviceDraft, draft_round, make_desk, verify_round


@dataclass(frozen=True, slots=True)
class Seat:
    """A request in a step. `entry`: what it is, where the device's own row of it is not up to date.

    At most `limit` drafted tokens may stand; its blocks hold the positions of these.
    """

    request_id: str
    block_ids: Sequence[int]
    limit: int = 0
    entry: Entry | None = None


class UniformSteps:
    """Launches them. Keeps the device's row of each request that took part until `forget`."""

    def __init__(
        self,
        runner: BatchRunner,
        bounds: Bounds,
        device: torch.device,
        *,
        rows: int,
        capture: bool,
        draft: DeviceDraft | None = None,
        most: int = 0,
        max_tokens: int | None = None,
    ) -> None:
        """`rows`: sequences of the largest step; `most`: tokens of a draft; `max_tokens`: that a step may feed.

        Captures nothing yet: see `prepare`.
        """
        self._state = DeviceState(bounds, device)
        self._sizes = buckets(rows)
        self._desk = make_desk(self._state, self._sizes[-1], most)
        self._outbox = Outbox(len(self._desk.rows), most + 2, device)
        self._pool = GraphPool(device, capture=capture)
        self._runner, self._draft, self._most = runner, draft, most if draft is not None else 0
        self._max_tokens = max_tokens
        self._slots: dict[str, int] = {}
        self._free = list(range(bounds.slots))
        self._given: dict[str, int] = {}  # blocks that the table of each has
        self._seated: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # rows and limits as the desk has them

    def prepare(self, least: int = 1) -> int:
        """Capture all steps, the largest first; how many. Raises RuntimeError where one can't be.

        Steps of fewer than `least` sequences are left out.
        """
        for size in reversed([size for size in self._sizes if size >= least]):
            for query in sorted({1, self._most + 1}, reverse=True):
                if self._max_tokens is None or size * query <= self._max_tokens or size == 1:
                    self._pool.add((size, query), verify_round(self._runner, self._state, self._desk, size, query))
            if self._draft is not None and (size, self._most + 1) in self._pool:
                self._pool.add((size, 0), draft_round(self._draft, self._state, self._desk, size))
        return len(self._pool)

    @property
    def most(self) -> int:
        """Tokens of a draft that is made on the device; 0 where none are."""
        return self._most

    def fits(self, count: int, drafts: bool) -> bool:
        """Is there a step for so many sequences?"""
        size = self._size(count)
        return size is not None and (size, self._most + 1 if drafts else 1) in self._pool

    def knows(self, request_id: str) -> bool:
        """Has the device a row of it?"""
        return request_id in self._slots

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            slot = self._slots.pop(request_id, None)
            self._given.pop(request_id, None)
            if slot is not None:
                self._free.append(slot)

    @torch.inference_mode()
    def launch(self, seats: Sequence[Seat], *, drafts: bool = False) -> Flight:
        """Queue one step: `fits` was true, and a seat without an entry took part in the last step of its request.

        The flight's rows are the seats': new tokens, then how many of those there are.
        """
        size = self._size(len(seats))
        assert size is not None
        self._enter(seats)
        self._give(seats)
        self._seat(seats, size)
        self._outbox.ready()
        if drafts:
            self._pool.run((size, 0))
        self._pool.run((size, self._most + 1 if drafts else 1))
        return self._outbox.send(self._desk.report, len(seats))

    def _size(self, count: int) -> int | None:
        return next((size for size in self._sizes if size >= count), None)

    def _enter(self, seats: Sequence[Seat]) -> None:
        entries = []
        for seat in seats:
            if seat.entry is None:
                continue
            if seat.request_id not in self._slots:
                self._slots[seat.request_id] = self._free.pop()
            self._given[seat.request_id] = 0
            entries.append((self._slots[seat.request_id], seat.entry))
        if entries:
            self._state.enter(entries)

    def _give(self, seats: Sequence[Seat]) -> None:
        cells, counts = [], []
        for seat in seats:
            had = self._given[seat.request_id]
            if len(seat.block_ids) > had:
                slot = self._slots[seat.request_id]
                cells += [(slot, column, seat.block_ids[column]) for column in range(had, len(seat.block_ids))]
                counts.append((slot, len(seat.block_ids)))
                self._given[seat.request_id] = len(seat.block_ids)
        if cells:
            self._state.give(cells, counts)

    def _seat(self, seats: Sequence[Seat], size: int) -> None:
        spare = size - len(seats)
        rows = (*(self._slots[seat.request_id] for seat in seats), *[self._state.scratch] * spare)
        limits = (*(min(seat.limit, self._most) for seat in seats), *[0] * spare)
        if (rows, limits) == self._seated:
            return
        self._seated = rows, limits
        rows_there, limits_there = to_device((torch.tensor(rows), torch.tensor(limits)), self._state.device)
        self._desk.rows[:size].copy_(rows_there)
        self._desk.limits[:size].copy_(limits_there)
