"""Results on their way to the host: copied behind the device's back, into one of two pinned buffers in turn."""

from __future__ import annotations

import torch
from torch import Tensor


class Flight:
    """Rows of integers that a launched step will leave. `rows` waits for these alone."""

    def __init__(self, buffer: Tensor, arrived: torch.cuda.Event | None) -> None:
        self._buffer = buffer
        self._arrived = arrived
        self._rows: list[list[int]] | None = None

    def rows(self) -> list[list[int]]:
        if self._rows is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            self._rows = self._buffer.tolist()
        return self._rows


class Outbox:
    """Sends tensors of one shape [R, n] int64. At most two flights are under way: a third waits for the first."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._buffers = [torch.empty(rows, columns, dtype=torch.int64, pin_memory=self._cuda) for _ in range(2)]
        self._flights: list[Flight | None] = [None, None]
        self._next = 0
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._arrived = [torch.cuda.Event() for _ in range(2)]

    def ready(self) -> None:
        """The source of the last flight may be written again by what is queued from now on."""
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[1 - self._next])

    def send(self, source: Tensor, count: int) -> Flight:
        """The first `count` rows of `source`, as what is queued by now will leave them."""
        place, self._next = self._next, 1 - self._next
        before = self._flights[place]
        if before is not None:
            before.rows()  # keeps them: its buffer is about to be written
        buffer = self._buffers[place][:count]
        if not self._cuda:
            buffer.copy_(source[:count])
            self._flights[place] = flight = Flight(buffer, None)
            return flight
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(source[:count], non_blocking=True)
            self._arrived[place].record(self._stream)
        self._flights[place] = flight = Flight(buffer, self._arrived[place])
        return flight
