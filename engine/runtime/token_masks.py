"""Bitmasks over the vocabulary: the tokens of a row of logits that its request's grammar allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.runtime.transfer import to_device

NEVER = float("-inf")


def keep_(logits: Tensor, masks: Sequence[tuple[int, npt.NDArray[np.uint32]]]) -> None:
    """Set all but the allowed tokens of these rows of `logits` [n, V] to -inf, in place.

    Each mask is [words]: bit i % 32 of word i // 32 says whether token i may come. Columns behind it never may.
    """
    if logits.device.type == "cpu":
        for row, mask in masks:
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=logits.shape[1])
            logits[row].masked_fill_(torch.from_numpy(bits == 0), NEVER)
        return
    rows = torch.tensor([row for row, _ in masks], dtype=torch.int64)
    packed = torch.from_numpy(np.stack([mask for _, mask in masks]).view(np.uint8))
    device_rows, device_masks = to_device((rows, packed), logits.device)
    keep_on_device_(logits, device_rows, device_masks)


def keep_on_device_(logits: Tensor, rows: Tensor, packed: Tensor) -> None:
    """`keep_` on the device of the logits: `rows` [m] int64, `packed` [m, bytes] uint8, lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = packed.unsqueeze(2).bitwise_right_shift(shifts).bitwise_and_(1).flatten(1)
    known = min(bits.shape[1], logits.shape[1])
    some = logits.index_select(0, rows)
    some[:, :known].masked_fill_(bits[:, :known] == 0, NEVER)
    some[:, known:] = NEVER
    logits.index_copy_(0, rows, some)
