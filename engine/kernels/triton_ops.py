"""What stands between a layer's matrix products, on a GPU: one kernel each, where torch would run a dozen.

They compute in fp32 and round where the twins in `reference` round, save for products of 16-bit cosines, which stay
in fp32 here. Only features of Triton 3.6 are used.
"""

import torch
import triton
import triton.language as tl

from engine.kernels.layout import HeadLayout, PoolLayer
from engine.kernels.reference import ACTIVATIONS

_LARGEST = {torch.float16: 65504.0, torch.float8_e4m3fn: 448.0}  # of pool types that numbers may exceed
_COLUMNS = 1024  # of one program of an activation


# fmt: off
@triton.jit
def add_norm_rows(
    x, residual, weight, out, x_row, residual_row, out_row, eps, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):
    """One row: the sum into `residual`, its norm into `out`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        place = residual + row * residual_row + column
        total = (total + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, total, mask=inside)
        total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / WIDTH + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(out + row * out_row + column, (total * scale * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _normed(x, scale, weight, dim, inside, offset, NORM: tl.constexpr):
    """x [BLOCK] in fp32 after its head's norm, rounded to the type it came in."""
    wide = x.to(tl.float32)
    if NORM:
        wide = wide * scale * (tl.load(weight + dim, mask=inside, other=0.0).to(tl.float32) + offset)
    return wide.to(x.dtype).to(tl.float32)


@triton.jit
def _turned_head(
    source, cos, sin, weight, eps, offset,
    DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):
    """One head of a query or key [BLOCK], normed and rotated, in fp32."""
    dim = tl.arange(0, BLOCK)
    inside = dim < DIM
    x = tl.load(source + dim, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
    out = _normed(x, scale, weight, dim, inside, offset, NORM)
    if ROTARY > 0:
        turned = dim < ROTARY
        if INTERLEAVED:
            partner = dim ^ 1
            sign = tl.where(dim % 2 == 0, -1.0, 1.0)
        else:
            partner = tl.where(dim < ROTARY // 2, dim + ROTARY // 2, dim - ROTARY // 2)
            sign = tl.where(dim < ROTARY // 2, -1.0, 1.0)
        partner = tl.where(turned, partner, dim)
        other = tl.load(source + partner, mask=inside, other=0.0)
        other = _normed(other, scale, weight, partner, inside, offset, NORM)
        c = tl.load(cos + dim, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + dim, mask=turned, other=0.0).to(tl.float32)
        out = out * c + other * sign * s
    return out


@triton.jit
def _stored(place, values, inside, LARGEST: tl.constexpr):
    """Into the pool; finite numbers that its type can't hold become its largest."""
    if LARGEST > 0:
        capped = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
        values = tl.where((values == values) & (tl.abs(values) < float("inf")), capped, values)
    tl.store(place, values.to(place.dtype.element_ty), mask=inside)


@triton.jit
def head_rows(
    qkv, cos, sin, slots, pool, query, query_weight, key_weight, qkv_row, cos_row, sin_row, pool_row, eps, offset,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, LARGEST: tl.constexpr,
):
    """One head of one token: a query into `query`, a key or a value into its slot of the pool."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = qkv + token * qkv_row
    dim = tl.arange(0, BLOCK_K)
    if head < HEADS:
        turned = _turned_head(
            row + head * KEY_DIM, cos + token * cos_row, sin + token * sin_row, query_weight, eps, offset,
            KEY_DIM, ROTARY, INTERLEAVED, QUERY_NORM, BLOCK_K,
        )
        place = query + (token * HEADS + head) * KEY_DIM + dim
        tl.store(place, turned.to(query.dtype.element_ty), mask=dim < KEY_DIM)
    else:
        slot = pool + tl.load(slots + token) * pool_row
        if head < HEADS + KV_HEADS:
            turned = _turned_head(
                row + head * KEY_DIM, cos + token * cos_row, sin + token * sin_row, key_weight, eps, offset,
                KEY_DIM, ROTARY, INTERLEAVED, KEY_NORM, BLOCK_K,
            )
            turned = turned.to(qkv.dtype.element_ty).to(tl.float32)
            _stored(slot + (head - HEADS) * KEY_DIM + dim, turned, dim < KEY_DIM, LARGEST)
        else:
            lane = tl.arange(0, BLOCK_V)
            first = (HEADS + KV_HEADS) * KEY_DIM + (head - HEADS - KV_HEADS) * VALUE_DIM
            value = tl.load(row + first + lane, mask=lane < VALUE_DIM, other=0.0).to(tl.float32)
            place = slot + KV_HEADS * KEY_DIM + (head - HEADS - KV_HEADS) * VALUE_DIM + lane
            _stored(place, value, lane < VALUE_DIM, LARGEST)


@triton.jit
def gated_rows(gate_up, out, in_row, out_row, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A piece of one row: act(gate) * up. KIND counts `reference.ACTIVATIONS`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * in_row + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * in_row + width + column, mask=inside, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    if KIND == 0:
        active = x / (1.0 + tl.exp(-x))
    elif KIND == 1:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        active = x * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))
    elif KIND == 2:
        active = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    else:
        active = tl.maximum(x, 0.0)
    active = active.to(gate.dtype).to(tl.float32)
    tl.store(out + row * out_row + column, (active * up).to(out.dtype.element_ty), mask=inside)
@triton.jit
def round_rows(x, codes, scales, x_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """One row in e4m3, with its scale; see `fp8.round_rows`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    wide = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    strange = tl.sum(((wide != wide) | (tl.abs(wide) == float("inf"))).to(tl.int32), 0) > 0
    largest = tl.max(tl.where(wide == wide, tl.abs(wide), 0.0), 0)
    empty = strange | (largest < 7.888609052210118e-31)
    scale = tl.where(empty, 1.0, tl.div_rn(largest, LARGEST + largest * 0.0))
    scaled = tl.where(empty, 0.0, tl.div_rn(wide, scale + wide * 0.0))
    scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    tl.store(codes + row * WIDTH + column, scaled.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + row, tl.where(strange, float("nan"), scale))
# fmt: on


def round_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8.round_rows`."""
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    if rows:
        round_rows[(rows,)](
            *(x, codes, scales, x.stride(0)),
            WIDTH=width,
            BLOCK=block,
            LARGEST=448.0,
            num_warps=min(max(block // 512, 1), 16),
        )
    return codes, scales


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.add_rms_norm`."""
    rows, width = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    total = x if residual is None else residual
    block = triton.next_power_of_2(width)
    if rows:
        add_norm_rows[(rows,)](
            *(x, total, weight, out, x.stride(0), total.stride(0), out.stride(0), eps, offset),
            WIDTH=width,
            BLOCK=block,
            ADD=residual is not None,
            num_warps=min(max(block // 512, 1), 16),
        )
    return out, total


def head_norm_rope_write(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slots: torch.Tensor,
    cache: PoolLayer,
    layout: HeadLayout,
) -> torch.Tensor:
    """See `ops.head_norm_rope_write`; norms are per head (`fits_heads`)."""
    shape, tokens = cache.shape, qkv.shape[0]
    query = qkv.new_empty(tokens, layout.heads, shape.key_dim)
    rotary = 0 if cos is None else cos.shape[1]
    cos, sin = (qkv, qkv) if cos is None or sin is None else (cos, sin)
    weights = layout.query_norm, layout.key_norm
    if tokens:
        head_rows[(tokens, layout.heads + 2 * shape.kv_heads)](
            *(qkv, cos, sin, slots, cache.joint, query, *(qkv if weight is None else weight for weight in weights)),
            *(qkv.stride(0), cos.stride(0), sin.stride(0), cache.joint.stride(0), layout.eps, layout.offset),
            HEADS=layout.heads,
            KV_HEADS=shape.kv_heads,
            KEY_DIM=shape.key_dim,
            VALUE_DIM=shape.value_dim,
            ROTARY=rotary,
            INTERLEAVED=layout.interleaved,
            QUERY_NORM=weights[0] is not None,
            KEY_NORM=weights[1] is not None,
            BLOCK_K=triton.next_power_of_2(shape.key_dim),
            BLOCK_V=triton.next_power_of_2(shape.value_dim),
            LARGEST=_LARGEST.get(cache.joint.dtype, 0.0) if cache.joint.dtype is not qkv.dtype else 0.0,
            num_warps=1,
        )
    return query


def gated_activation(gate_up: torch.Tensor, kind: str, out: torch.Tensor | None) -> torch.Tensor:
    """See `ops.gated_activation`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width) if out is None else out
    if rows:
        gated_rows[(rows, triton.cdiv(width, _COLUMNS))](
            *(gate_up, out, gate_up.stride(0), out.stride(0), width),
            KIND=ACTIVATIONS.index(kind),
            BLOCK=_COLUMNS,
        )
    return out
