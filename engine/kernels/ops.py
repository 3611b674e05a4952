"""The kernels of this room, for any device and dtype: C code where it stands and fits, Triton's on GPUs, else torch.

Rows may lie apart. Where gradients are wanted the twins serve, so these may stand in models that are trained.
"""

from __future__ import annotations

import torch

from engine.kernels import gpu, native, reference
from engine.kernels.layout import HeadLayout, PoolLayer
from engine.kernels.library import library


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual sum and its RMS norm: (normed [T, n], sum [T, n]).

    x, residual [T, n], weight [n]. The sum is written into `residual` and returned; without a residual it is x itself.
    normed = sum / sqrt(mean(sum^2) + eps) * (offset + weight), a fresh tensor unless `out` is given.
    """
    if (
        native.fits(x)
        and (residual is None or native.fits(residual))
        and (out is None or native.fits(out))
        and native.plain(weight)
        and (found := library()) is not None
    ):
        return native.add_rms_norm(found, x, residual, weight, eps, offset, out)
    if gpu.fits(x):
        return gpu.kernels().add_rms_norm(x, residual, weight, eps, offset, out)
    return reference.add_rms_norm(x, residual, weight, eps, offset, out)


def head_norm_rope_write(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slots: torch.Tensor,
    cache: PoolLayer,
    layout: HeadLayout,
) -> torch.Tensor:
    """From the merged query/key/value product to what attention needs: a fresh query [T, heads, key_dim].

    qkv [T, heads * key_dim + kv_heads * (key_dim + value_dim)]; head sizes are `cache.shape`'s. Queries and keys are
    normed as `layout` says, then their first r dimensions are rotated by cos and sin [T, r] (both None: no rotation):
    x * cos + partner(x) * sin, elementwise, so each cos stands at the place of the dimension that it multiplies.
    Keys and values go into the pool's rows `slots` [T] (int64).
    """
    if native.fits_rope(qkv, cos, sin, cache, layout) and (found := library()) is not None:
        rope = None if cos is None or sin is None else (cos, sin)
        return native.head_norm_rope_write(found, qkv, rope, slots, cache, layout)
    if gpu.fits_heads(qkv, cos, cache, layout):
        return gpu.kernels().head_norm_rope_write(qkv, cos, sin, slots, cache, layout)
    return reference.head_norm_rope_write(qkv, cos, sin, slots, cache, layout)


def gated_activation(gate_up: torch.Tensor, kind: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """act(gate) * up: gate_up [T, 2 * m], gate first -> [T, m]. `kind` is one of `reference.ACTIVATIONS`."""
    if native.fits(gate_up) and (out is None or native.fits(out)) and (found := library()) is not None:
        return native.gated_activation(found, gate_up, kind, out)
    if gpu.fits(gate_up, gate_up.shape[-1]):
        return gpu.kernels().gated_activation(gate_up, kind, out)
    return reference.gated_activation(gate_up, kind, out)
