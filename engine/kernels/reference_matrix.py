"""Packing, unpacking and products of packed matrices in plain torch: the truth that `gemm.c` is held to."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

SMALLEST = 1e-30  # a group of activations below it counts as zeros
ROUNDED_BEFORE = 0.02  # of a step: what fp16 leaves of numbers that were codes once
KEPT_RANGE = 0.9  # of a group's range, tried for int4: the error of all others shrinks with the step
CHUNK = 1024  # outputs that are packed at once, whole panels: what stays in a cache is several times faster


class Packed(Protocol):
    """What `matrix.PackedMatrix` is."""

    @property
    def format(self) -> str: ...
    @property
    def group(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def bias(self) -> torch.Tensor | None: ...

    def tensors(self) -> dict[str, torch.Tensor]: ...


def pack(weight: torch.Tensor, format: str, group: int, panel: int) -> dict[str, torch.Tensor]:
    """W [outputs, inputs] -> the tensors of `gemm.h`. Raises ValueError for what the format can't hold."""
    multiplier = _multiplier(weight, format)
    chunks = [_pack_rows(rows.float(), format, group, panel, multiplier) for rows in weight.split(CHUNK)]
    tensors = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return tensors if format == "fp16" else {**tensors, "multiplier": multiplier.reshape(1)}


def rounded(weight: torch.Tensor, format: str, group: int) -> torch.Tensor:
    """What `pack` and `unpack` leave of W [outputs, inputs], float32, without the way through their layout."""
    multiplier = _multiplier(weight, format)
    out = torch.empty(weight.shape)
    for rows, made in zip(weight.split(CHUNK), out.split(CHUNK), strict=True):
        if format == "fp16":
            made.copy_(rows.half())
            continue
        grouped = _grouped(rows.float(), group)
        codes, scales, minima = _int8(grouped, multiplier) if format == "int8" else _int4(grouped, multiplier)
        found = codes.float().sub_(128 if minima is None else 0).mul_((scales.float() * multiplier)[..., None])
        if minima is not None:
            found += (minima.float() * multiplier)[..., None]
        made.copy_(found.flatten(1)[:, : weight.shape[1]])
    return out


def _multiplier(weight: torch.Tensor, format: str) -> torch.Tensor:
    """Raises ValueError for weights that are too large for fp16, or not finite."""
    low, high = (float(bound) for bound in torch.aminmax(weight))
    largest = torch.finfo(torch.float16).max
    if not -largest <= low <= high <= largest:
        raise ValueError(f"a weight is larger than {format} can hold ({largest:g})")
    return _power(torch.tensor(max(-low, high)) / (127 if format == "int8" else 1))


def _grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    """[outputs, inputs] -> [outputs, groups, group]."""
    return F.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))


def _pack_rows(
    weight: torch.Tensor, format: str, group: int, panel: int, multiplier: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The part of some panels in each tensor."""
    weight = F.pad(weight, (0, 0, 0, -weight.shape[0] % panel))
    if format == "fp16":
        codes = weight.half().unflatten(0, (-1, panel)).transpose(1, 2)
        return {"codes": codes.contiguous().flatten()}
    grouped = _grouped(weight, group)
    codes, scales, minima = _int8(grouped, multiplier) if format == "int8" else _int4(grouped, multiplier)
    tensors = {"scales": _by_panel(scales, panel)}
    if minima is not None:
        tensors["minima"] = _by_panel(minima, panel)
        pairs = codes.unflatten(2, (-1, 2, 4))
        codes = (pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4).flatten(2)
    quads = codes.unflatten(2, (-1, 4)).unflatten(0, (-1, panel))  # [panels, 32, groups, quads, 4]
    return {"codes": quads.permute(0, 2, 3, 1, 4).contiguous().flatten(), **tensors}


def _by_panel(values: torch.Tensor, panel: int) -> torch.Tensor:
    """[outputs, groups] -> [panels, groups, 32], flat."""
    return values.unflatten(0, (-1, panel)).transpose(1, 2).contiguous().flatten()


def _power(largest: torch.Tensor) -> torch.Tensor:
    """The power of two to divide by so that `largest` is near 1, where fp16 is fine; never above 1: see `_int8`."""
    return torch.exp2(torch.log2(largest).floor()).clamp(2.0**-100, 1.0)


def _int8(w: torch.Tensor, multiplier: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Symmetric, to codes within 127. A matrix whose groups were so rounded before (Q8_0) keeps its values."""
    scales = (w.abs().amax(-1) / 127 / multiplier).half()
    step = scales.float() * multiplier
    codes = (w / step.masked_fill(step == 0, float("inf"))[..., None]).round_().clamp_(-127, 127)
    return codes.add_(128).to(torch.uint8), scales, None


def _int4(w: torch.Tensor, multiplier: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the smallest to the largest in 15 steps, or closer together where that lowers a group's squared error.

    A matrix whose groups were so rounded before (Q4_1) keeps its codes: what is left of them is a fraction of a step.
    """
    low, high = torch.aminmax(w, dim=-1)
    codes, scales, minima, error = _nibbles(w, low, (high - low) / 15, multiplier)
    rough = error > w.shape[-1] * (ROUNDED_BEFORE * scales.float() * multiplier).square()
    if rough.any():
        found = _closer(w[rough], (codes[rough], scales[rough], minima[rough], error[rough]), multiplier)
        codes[rough], scales[rough], minima[rough], _ = found
    return codes, scales, minima


_Nibbles = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _nibbles(w: torch.Tensor, base: torch.Tensor, step: torch.Tensor, multiplier: torch.Tensor) -> _Nibbles:
    """Codes of w [..., group], scales and minima as they are stored, and squared errors by group."""
    scales, minima = (step / multiplier).half(), (base / multiplier).half()
    step, base = (scales.float() * multiplier)[..., None], (minima.float() * multiplier)[..., None]
    codes = (w - base).div_(step.masked_fill(step == 0, float("inf"))).round_().clamp_(0, 15)
    return codes.to(torch.uint8), scales, minima, (codes * step + base - w).square_().sum(-1)


def _closer(w: torch.Tensor, best: _Nibbles, multiplier: torch.Tensor) -> _Nibbles:
    """The best of `best`, a range cut at both ends, and twice the line of least squares through the best codes."""
    low, high = torch.aminmax(w, dim=-1)
    middle, half = (low + high) / 2, (high - low) / 2 * KEPT_RANGE
    step, base = half / 7.5, middle - half
    for fit in (False, True, True):
        if fit:
            codes, mean = best[0].float(), w.mean(-1)
            centred = codes - codes.mean(-1, keepdim=True)
            step = (centred * w).sum(-1) / centred.square().sum(-1).clamp_min(1e-9)
            base = mean - step * codes.mean(-1)
        tried = _nibbles(w, base, step, multiplier)
        lower = (tried[3] < best[3]) & (tried[1] > 0)
        best = _where(lower, tried, best)
    return best


def _where(lower: torch.Tensor, tried: _Nibbles, best: _Nibbles) -> _Nibbles:
    codes = torch.where(lower[:, None], tried[0], best[0])
    scales, minima, errors = (torch.where(lower, one, other) for one, other in zip(tried[1:], best[1:], strict=True))
    return codes, scales, minima, errors


def unpack(matrix: Packed) -> torch.Tensor:
    """[outputs, inputs] float32."""
    tensors, panels = matrix.tensors(), -(-matrix.outputs // 32)
    codes = tensors["codes"]
    if matrix.format == "fp16":
        weight = codes.view(panels, matrix.inputs, 32).transpose(1, 2).flatten(0, 1).float()
        return weight[: matrix.outputs]
    codes, scales, minima = _integers(matrix)
    weight = codes * scales[..., None]
    if minima is not None:
        weight = weight + minima[..., None]
    return weight.flatten(1)[: matrix.outputs, : matrix.inputs]


def _integers(matrix: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes [outputs, groups, group], scales and minima [outputs, groups], outputs filled up to whole panels."""
    tensors, panels = matrix.tensors(), -(-matrix.outputs // 32)
    groups = -(-matrix.inputs // matrix.group)
    quads = tensors["codes"].view(panels, groups, -1, 32, 4).permute(0, 3, 1, 2, 4).flatten(0, 1)

    def rows(values: torch.Tensor) -> torch.Tensor:
        return values.view(panels, groups, 32).transpose(1, 2).flatten(0, 1).float() * tensors["multiplier"]

    if matrix.format == "int8":
        return quads.flatten(2).float() - 128, rows(tensors["scales"]), None
    codes = torch.stack((quads & 15, quads >> 4), dim=3).flatten(2).float()
    return codes, rows(tensors["scales"]), rows(tensors["minima"])


def round_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, inputs] -> codes [T, groups, group] within 127, as floats, and scales [T, groups].

    scale = max |x| / 127; codes round to nearest, ties to even. A group with a NaN or an infinity has scale NaN.
    """
    grouped = F.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    largest = grouped.abs().amax(-1)
    bad, empty = ~largest.isfinite(), ~(largest >= SMALLEST) | ~largest.isfinite()
    inverse = torch.where(empty, 0.0, torch.tensor(127.0) / largest)  # 127 / x is 127 * (1 / x): one rounding more
    codes = torch.where(empty[..., None], 0.0, (grouped * inverse[..., None]).round())
    scales = torch.where(empty, 0.0, largest / 127)
    return codes, torch.where(bad, torch.nan, scales)


def multiply(matrix: Packed, x: torch.Tensor) -> torch.Tensor:
    """See `PackedMatrix.multiply`; x of any float type, result float32."""
    if matrix.format == "fp16":
        return F.linear(x.float(), unpack(matrix), matrix.bias)
    rounded, row_scales = round_rows(x, matrix.group)
    codes, scales, minima = _integers(matrix)
    dots = torch.einsum("tgk,ngk->tng", rounded, codes)  # exact: below 2^24
    total = torch.einsum("tng,ng,tg->tn", dots, scales, row_scales)
    if minima is not None:
        total = total + (rounded.sum(-1) * row_scales) @ minima.T
    total = total[:, : matrix.outputs]
    return total if matrix.bias is None else total + matrix.bias
