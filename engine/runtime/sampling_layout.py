"""How the rows of one batch composition are to be drawn: groups of rows with their parameters as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.runtime.logit_rules import LogitRules
from engine.runtime.rng import Draw
from engine.runtime.sampling_state import SamplingState
from engine.runtime.truncation import Truncation, truncates


class RowGroup:
    """Rows that are drawn in the same way."""

    def __init__(self, rows: list[int], states: Sequence[SamplingState], device: torch.device) -> None:
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self._states = [states[row] for row in rows]
        self._whole = len(rows) == len(states)
        temperatures = [state.sampling.temperature for state in self._states]
        self._temperature = torch.tensor(temperatures, dtype=torch.float32, device=device).unsqueeze(1)

    def draws(self) -> list[Draw]:
        return [state.draw() for state in self._states]

    def take(self, batch: Tensor) -> Tensor:
        """The group's rows of [n, ...]; not a copy where they are all of them."""
        return batch if self._whole else batch.index_select(0, self.rows)

    def tempered(self, logits: Tensor, largest: Tensor) -> Tensor:
        """New scores [m, V]: logits [n, V] over the temperature, shifted by each row's largest [n] to end at 0."""
        return (self.take(logits) - self.take(largest).unsqueeze(1)).div_(self._temperature)


class Layout:
    """A batch composition. `greedy`, `free` (temperature alone) and `truncated` share out the rows; None where none."""

    def __init__(self, states: Sequence[SamplingState], vocab_size: int, device: torch.device) -> None:
        self._states = list(states)  # held, so that identity stays a valid test
        self._device = device
        sampled = [row for row, state in enumerate(states) if not state.greedy]
        truncated = [row for row in sampled if truncates(states[row].sampling)]
        free = [row for row in sampled if not truncates(states[row].sampling)]
        greedy = [row for row, state in enumerate(states) if state.greedy]
        self.greedy = RowGroup(greedy, states, device) if greedy else None
        self.free = RowGroup(free, states, device) if free else None
        self.truncated = RowGroup(truncated, states, device) if truncated else None
        self.truncation = Truncation([states[row].sampling for row in truncated], vocab_size, device)
        self.rules = LogitRules(states, vocab_size, device)
        self.plain_greedy = not sampled and not self.rules

    def fits(self, states: Sequence[SamplingState], device: torch.device) -> bool:
        """Was this laid out for these very states?"""
        same = len(states) == len(self._states) and device == self._device
        return same and all(new is old for new, old in zip(states, self._states, strict=True))
