"""Where the kernel of `triton_draw` can take a step's draws."""

from __future__ import annotations

import torch

from engine.kernels import gpu


def usable(logits: torch.Tensor) -> bool:
    return logits.is_cuda and gpu.installed()


def draw(logits: torch.Tensor, keys: torch.Tensor, position: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """See `runtime.device_draw.draw`."""
    from engine.kernels import triton_draw

    return triton_draw.draw(logits, keys, position, temperature)
