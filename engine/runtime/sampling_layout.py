"""How the rows of one batch composition are to be drawn: groups of rows with their parameters as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.runtime.logit_rules import LogitRules
from engine.runtime.rng import Draw
from engine.runtime.sampling_state import SamplingState
from engine.runtime.truncation import NEVER, Truncation, truncates

_WORD = 1 << 64
POSITION, PURPOSE, STEP = 2, 3, 4  # columns of keys


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
    """A batch composition. `greedy`, `free` (temperature alone) and `truncated` share out the rows; None where none.

    `wishes` and `keys()` say the same to `kernels.choose`.
    """

    def __init__(
        self, states: Sequence[SamplingState], vocab_size: int, device: torch.device, *, ruled: bool = True
    ) -> None:
        """`ruled`: false where the rules are done with."""
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
        self.rules = LogitRules(states if ruled else (), vocab_size, device)
        self.plain_greedy = not sampled and not self.rules
        self.wishes = np.array([_wishes(state, vocab_size) for state in states], dtype=np.float64).reshape(-1, 5)
        self._keys = np.array([[part % _WORD for part in state.draw()] for state in states], dtype=np.uint64)

    def keys(self) -> npt.NDArray[np.uint64]:
        """[rows, 5]: what each row is drawn with now."""
        keys = self._keys.reshape(-1, 5).copy()
        keys[:, POSITION] = [state.position for state in self._states]
        return keys

    def fits(self, states: Sequence[SamplingState], device: torch.device) -> bool:
        """Was this laid out for these very states?"""
        same = len(states) == len(self._states) and device == self._device
        return same and all(new is old for new, old in zip(states, self._states, strict=True))


def _wishes(state: SamplingState, vocab_size: int) -> tuple[float, ...]:
    """As `kernels.choose` takes them."""
    given = state.sampling
    if state.greedy:
        return 0.0, NEVER, 1.0, 0.0, 0.0
    floor = math.log(given.min_p) if given.min_p > 0 else NEVER
    return given.temperature, floor, given.top_p, float(given.top_k if given.top_k < vocab_size else 0), 0.0
