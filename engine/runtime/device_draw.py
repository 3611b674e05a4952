"""The sampler's plain draws, greedy or tempered, of rows whose parameters are on the device: no word from the host.

Tokens are those of `sampler.Sampler` for requests without rules and truncations: the same operations on the same
numbers, the noise from the same function (`rng`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels import draws
from engine.runtime.rng import LANES, Purpose, gumbel_of_bits, philox

_LOW = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, eq=False)
class RowDraws:
    """Of m rows: `keys` [2, m] int64 (seed, choice), `position` [m] int64 of the token, `temperature` [m] float32."""

    keys: Tensor
    position: Tensor
    temperature: Tensor


def draw(logits: Tensor, rows: RowDraws) -> Tensor:
    """Tokens [m] int64 of logits [m, V] float32; -1 where none can be drawn (see `Sampled`)."""
    if draws.usable(logits):
        return draws.draw(logits, rows.keys, rows.position, rows.temperature)
    return draw_reference(logits, rows)


def draw_reference(logits: Tensor, rows: RowDraws) -> Tensor:
    """The twin of the kernel."""
    largest = logits.amax(1)
    warm = (rows.temperature > 0).unsqueeze(1)
    heat = torch.where(warm, rows.temperature.unsqueeze(1), 1.0)
    noisy = (logits - largest.unsqueeze(1)).div_(heat) + gumbel_of_keys(rows, logits.shape[1])
    tokens = torch.where(warm, noisy, logits).argmax(1)
    return torch.where(largest.isfinite(), tokens, -1)


def gumbel_of_keys(rows: RowDraws, n: int) -> Tensor:
    """Standard Gumbel noise [m, n] float32: that of `rng.gumbel_rows` for the same numbers, purpose TARGET."""
    zero = torch.zeros_like(rows.position)
    fields = torch.stack((*rows.keys.unbind(0), rows.position, zero + Purpose.TARGET, zero)).unsqueeze(-1)
    blocks = torch.arange(-(-n // LANES), device=rows.position.device).expand(len(rows.position), -1)
    words = torch.stack(philox(blocks, fields), dim=-1)
    halves = torch.stack((words & _LOW, (words >> 32) & _LOW), dim=-1)
    return gumbel_of_bits(halves.flatten(1)[:, :n])
