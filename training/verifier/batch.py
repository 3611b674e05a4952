"""What roll-outs leave behind: every verified position, and what each answer was worth."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """N drafted positions that were verified: all of a draft up to its first rejected one.

    `hidden` [N, draft width] and `states` [N, target width] float32 are what the head sees, `place` [N] int64 the place
    in the draft. `p` and `q` [N] float64: the drafted token's probability under the target's law and as the draft
    thinks of it. `stood` [N] bool. `sequence` [N] int64: the index of its answer.
    """

    hidden: Tensor
    states: Tensor
    place: Tensor
    p: Tensor
    q: Tensor
    stood: Tensor
    sequence: Tensor

    def __len__(self) -> int:
        return len(self.place)

    def take(self, which: Tensor) -> Positions:
        """Those that a mask [N] or indices name."""
        return Positions(*(getattr(self, part.name)[which] for part in fields(self)))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Answers and their verified positions. `rewards` [S] float64 in [0, 1]; `prompts` [S] int64: who asked the same.

    `tokens` counts those of all answers, `rounds` the drafts that were verified for them.
    """

    positions: Positions
    rewards: Tensor
    prompts: Tensor
    tokens: int = 0
    rounds: int = 0


def join(parts: list[Positions]) -> Positions:
    """One after another."""
    return Positions(*(torch.cat([getattr(part, name.name) for part in parts]) for name in fields(Positions)))
