"""What is asked of a draft that is to be trained, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Shape:
    """What was asked of a draft; see the options of `train-draft`."""

    taps: tuple[int, ...]
    layers: int = 1
    block_size: int = 8
    draft_vocab: int = 0
    mask_token_id: int = -1
    markov_rank: int = 0
    anchor_predicts: bool = False
    random_start: bool = False
    hard: float = 0.5
    decay: float = 4.0


def vocabulary(counts: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` most frequent ids, rising; all of them for 0."""
    if size <= 0 or size >= len(counts):
        return torch.arange(len(counts))
    return counts.argsort(descending=True, stable=True)[:size].sort().values
