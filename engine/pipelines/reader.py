"""What requests that read get from a pass: pooled hidden states and laws at chosen places (`engine/reading.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from engine.reading import LAST, MEAN, Law, Reading, Readout

_ROWS_AT_ONCE = 64  # whose laws are made together


class Reader:
    """What has been read of one request so far. Sums are float64, so that chunks of any size come to the same."""

    def __init__(self, reading: Reading, length: int, shift: int = 1) -> None:
        """`length`: of the prompt. The law of a position is in the row `shift` before it."""
        self.length = length
        self._reading = reading
        self._rows = [probe.position - shift for probe in reading.probes]
        self._sum: Tensor | None = None
        self._laws: dict[int, Law] = {}  # by probe

    def probes(self, start: int, end: int) -> list[int]:
        """Indices of the probes whose rows are among these positions."""
        return [index for index, row in enumerate(self._rows) if start <= row < end]

    def row(self, probe: int) -> int:
        return self._rows[probe]

    def pooled(self, start: int, end: int) -> range:
        """Those of these positions whose hidden states count."""
        if self._reading.pooling == MEAN:
            return range(start, end)
        return range(max(start, self.length - 1), end) if self._reading.pooling == LAST else range(0)

    def add_states(self, states: Tensor) -> None:
        """[rows, width]"""
        part = states.double().sum(0)
        self._sum = part if self._sum is None else self._sum + part

    def add_law(self, probe: int, logprobs: Tensor) -> None:
        """[vocabulary]"""
        wanted = torch.tensor(self._reading.probes[probe].token_ids, dtype=torch.int64, device=logprobs.device)
        best = int(logprobs.argmax()) if bool(logprobs.isfinite().any()) else -1
        self._laws[probe] = Law(tuple(logprobs[wanted].tolist()), best)

    def readout(self) -> Readout | None:
        """All that was asked for, once the prompt is computed; None where any of it is no number."""
        laws = tuple(self._laws[index] for index in range(len(self._rows)))
        if any(law.best < 0 for law in laws):
            return None
        vector = b""
        if self._sum is not None:
            pooled = self._sum / (self.length if self._reading.pooling == MEAN else 1)
            length = pooled.norm()
            if not bool(length.isfinite()) or (self._reading.normalize and not bool(length > 0)):
                return None
            pooled = pooled / length if self._reading.normalize else pooled
            vector = pooled.float().cpu().numpy().astype("<f4").tobytes()
        return Readout(vector, laws)


@dataclass(slots=True, eq=False)
class Wanted:
    """The rows of a step's packed tokens that readings need: `laws` for their logits, `states` for hidden states."""

    laws: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    _probes: list[tuple[Reader, int]] = field(default_factory=list)
    _pooled: list[tuple[Reader, int]] = field(default_factory=list)  # and how many rows

    def add(self, reader: Reader, start: int, end: int, first: int) -> None:
        """A request that feeds these positions, the first of them in row `first`."""
        for probe in reader.probes(start, end):
            self.laws.append(first + reader.row(probe) - start)
            self._probes.append((reader, probe))
        rows = reader.pooled(start, end)
        if rows:
            self.states.extend(first + row - start for row in rows)
            self._pooled.append((reader, len(rows)))

    def take(self, logits: Tensor, states: Tensor | None) -> None:
        """`logits` [laws, vocabulary] float32, `states` [states, width]."""
        for start in range(0, len(self._probes), _ROWS_AT_ONCE):
            part = logits[start : start + _ROWS_AT_ONCE].log_softmax(1)
            for (reader, probe), logprobs in zip(self._probes[start : start + _ROWS_AT_ONCE], part, strict=True):
                reader.add_law(probe, logprobs)
        ends = list(accumulate(count for _, count in self._pooled))
        for (reader, count), end in zip(self._pooled, ends, strict=True):
            assert states is not None
            reader.add_states(states[end - count : end])
