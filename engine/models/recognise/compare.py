"""When two results are the same but for rounding."""

from __future__ import annotations

import torch

# Largest difference of a fused result, relative to the largest value of what it replaces. 16 bits differ by rounding.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Two [T, ...]: equal up to TOLERANCE of each token's largest value. For sums of products: they round like that."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    tolerance = TOLERANCE[want.dtype]
    got, want = got.flatten(1).float(), want.flatten(1).float()
    return _within(got, want, tolerance * want.abs().amax(1, keepdim=True))


def close_each(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal up to TOLERANCE of each value. For elementwise results: they round like that."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    tolerance = TOLERANCE[want.dtype]
    got, want = got.float(), want.float()
    return _within(got, want, tolerance * want.abs() + tolerance / 100 * want.abs().amax(-1, keepdim=True))


def close_update(got: torch.Tensor, want: torch.Tensor, before: torch.Tensor) -> bool:
    """Two [T, width]: equal up to TOLERANCE of each token's largest change from `before`.

    Hidden states may hold values that dwarf what a layer adds to them.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    change = (want.float() - before.float()).abs().amax(-1, keepdim=True)
    rounding = 4 * torch.finfo(want.dtype).eps * want.float().abs().amax(-1, keepdim=True)
    return _within(got.float(), want.float(), TOLERANCE[want.dtype] * change + rounding)


def equal(one: object, other: object) -> bool:
    """Two tensors of the same type and values."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _within(got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor) -> bool:
    return bool(((got - want).abs() <= allowed).all())  # a NaN is never within
