"""Per-request edits of logits, for a whole batch at once: allowed ids, grammar, bans, bias, penalties; in order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.runtime.sampling_state import SamplingState
from engine.runtime.token_masks import keep_
from engine.runtime.transfer import to_device

NEVER = float("-inf")

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class LogitRules:
    """The rules of one batch composition; what does not change from step to step is laid out once.

    False when no row has any. Ids outside the vocabulary never match anything.
    """

    def __init__(self, states: Sequence[SamplingState], vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._ruled = [(row, state) for row, state in enumerate(states) if state.ruled]
        self._penalties = [Penalties(row, state) for row, state in self._ruled if state.counts is not None]
        biases = [(row, state.bias) for row, state in self._ruled if state.bias is not None]
        self._bias_at = self._cells([(row, bias.ids) for row, bias in biases])
        values = [bias.values[in_vocabulary(bias.ids, vocab_size)] for _, bias in biases]
        self._bias = _tensor(values, np.float32, device)
        limited = [(row, state.allowed) for row, state in self._ruled if state.allowed is not None]
        self._limited = torch.tensor([row for row, _ in limited], dtype=torch.int64, device=device)
        self._allowed_at = self._cells(limited)

    def __bool__(self) -> bool:
        return bool(self._ruled)

    def apply_(self, logits: Tensor) -> None:
        """Edit `logits` [n, vocab_size] float32, contiguous, in place."""
        flat = logits.view(-1)
        if self._limited.numel():
            allowed = flat[self._allowed_at]
            logits[self._limited] = NEVER
            flat[self._allowed_at] = allowed
        masks = [(row, mask) for row, state in self._ruled if (mask := state.mask) is not None]
        if masks:
            keep_(logits, masks)
        bans = [(row, np.fromiter(state.banned(), dtype=np.int64)) for row, state in self._ruled]
        banned = self._cells([(row, ids) for row, ids in bans if len(ids)])
        if banned.numel():
            flat.index_fill_(0, banned, NEVER)
        if self._bias.numel():
            flat.index_add_(0, self._bias_at, self._bias)
        if self._penalties:
            self._penalise(flat)
        for row, state in self._ruled:
            if (token := state.forced) is not None:
                logits[row] = NEVER
                logits[row, token] = 0.0

    def _penalise(self, flat: Tensor) -> None:
        cells, terms = zip(*(penalty.terms(self._vocab_size) for penalty in self._penalties), strict=True)
        host = (torch.from_numpy(np.concatenate(cells)), torch.from_numpy(np.concatenate(terms, axis=1)))
        at, (repetition, subtracted) = to_device(host, self._device)
        before = flat[at]
        flat[at] = torch.where(before > 0, before / repetition, before * repetition) - subtracted

    def _cells(self, rows: Sequence[tuple[int, Ids]]) -> Tensor:
        """Flat indices of (row, id) pairs."""
        size = self._vocab_size
        return _tensor([row * size + ids[in_vocabulary(ids, size)] for row, ids in rows], np.int64, self._device)


class Penalties:
    """One row's repetition penalty (prompt and output) and presence and frequency penalties (output only)."""

    def __init__(self, row: int, state: SamplingState) -> None:
        assert state.counts is not None
        self._row = row
        self._seen = state.counts
        self._repetition = state.sampling.repetition_penalty
        self._presence = np.float32(state.sampling.presence_penalty)
        self._frequency = np.float32(state.sampling.frequency_penalty)

    def terms(self, vocab_size: int) -> tuple[Ids, Floats]:
        """Flat indices [k] of the seen tokens, and [2, k]: what to divide by (or multiply with), what to subtract."""
        known = in_vocabulary(self._seen.ids, vocab_size)
        ids, counts = self._seen.ids[known], self._seen.counts[known]
        out = np.empty((2, len(ids)), dtype=np.float32)
        out[0] = self._repetition
        np.add(self._presence * (counts > 0), self._frequency * counts, out=out[1])
        return self._row * vocab_size + ids, out


def in_vocabulary(ids: Ids, vocab_size: int) -> npt.NDArray[np.bool_]:
    return (ids >= 0) & (ids < vocab_size)


def _tensor(parts: Sequence[npt.NDArray[np.generic]], dtype: npt.DTypeLike, device: torch.device) -> Tensor:
    """The parts, one after the other."""
    return to_device([torch.from_numpy(np.concatenate([np.empty(0, dtype=dtype), *parts]))], device)[0]
