"""Host tensors onto a device: one copy out of pinned memory, queued and not waited for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: kernels read whole vectors, and Triton compiles anew for pointers that are aligned otherwise


def to_device(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Contiguous copies of host tensors on `device`, views of one buffer; on a CPU the tensors themselves.

    Nothing waits: kernels queued on the current stream find the copies in place, and the host may go on at once. The
    pinned buffer is a new one for each call; torch gives its memory to nobody else before the copy is done.
    """
    if device.type == "cpu":
        return list(parts)
    buffer, offsets = stage(parts, pin=True)
    return views(buffer.to(device, non_blocking=True), parts, offsets)


def stage(parts: Sequence[Tensor], *, pin: bool) -> tuple[Tensor, list[int]]:
    """One buffer of bytes that holds all parts, and where each begins."""
    offsets, size = [], 0
    for part in parts:
        offsets.append(size)
        size += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for part, view in zip(parts, views(buffer, parts, offsets), strict=True):
        view.copy_(part)
    return buffer, offsets


def views(buffer: Tensor, parts: Sequence[Tensor], offsets: Sequence[int]) -> list[Tensor]:
    """The parts of a staged buffer, shaped as `parts`."""
    return [
        buffer[offset : offset + part.nbytes].view(part.dtype).view(part.shape)
        for part, offset in zip(parts, offsets, strict=True)
    ]
