"""What the Triton kernels of this room can take. They are imported on first use: there may be no triton."""

from __future__ import annotations

from functools import lru_cache
from importlib import util
from typing import Protocol

import torch

from engine.kernels.layout import HeadLayout, PoolLayer

MAX_WIDTH = 32768  # of a norm's row, which one program holds


class Kernels(Protocol):
    """As in `ops`, without default arguments."""

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        offset: float,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def head_norm_rope_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        slots: torch.Tensor,
        cache: PoolLayer,
        layout: HeadLayout,
    ) -> torch.Tensor: ...

    def gated_activation(self, gate_up: torch.Tensor, kind: str, out: torch.Tensor | None) -> torch.Tensor: ...

    def round_fp8(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


@lru_cache(maxsize=1)
def installed() -> bool:
    return util.find_spec("triton") is not None


def kernels() -> Kernels:
    """Those of `triton_ops`."""
    from engine.kernels import triton_ops

    return triton_ops


def fits(x: torch.Tensor, width: int = MAX_WIDTH) -> bool:
    """Rows on a GPU, of at most `width` numbers, which nobody wants gradients of."""
    return (
        x.is_cuda
        and x.ndim == 2
        and x.stride(1) == 1
        and x.shape[1] <= width
        and not (x.requires_grad and torch.is_grad_enabled())
        and installed()
    )


def fits_heads(qkv: torch.Tensor, cos: torch.Tensor | None, cache: PoolLayer, layout: HeadLayout) -> bool:
    """Norms over all heads of a section together are left to the twin."""
    norms = (layout.query_norm, layout.key_norm)
    each = all(norm is None or norm.numel() == cache.shape.key_dim for norm in norms)
    rows = cos is None or cos.stride(1) == 1
    return fits(qkv, qkv.shape[-1]) and rows and each and cache.joint.stride(1) == 1
