"""The C code called from Python: one function per kernel, with the library as first argument.

Every call packs one C struct, which takes less time than a few converted ctypes arguments, and releases the GIL.
The C code believes what it is told: shapes are checked here, kinds of tensors by `fits...`, which callers ask first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import torch

from engine.kernels.layout import HeadLayout, PagedBatch, PoolLayer
from engine.kernels.reference import ACTIVATIONS

# The structs of the C files, field for field.
GATED = Struct("@2P4q2i")
ADD_NORM = Struct("@4P5q2fi")
ROPE_WRITE = Struct("@8P13q2f3i")
ATTENTION = Struct("@6P7q4P9q2f2i")

POOL_TYPES = {torch.float32: 0, torch.float16: 1}  # what a pool may hold, as the C code numbers it

_KINDS = {name: number for number, name in enumerate(ACTIVATIONS)}
_Call = Callable[[bytes], int]


@dataclass(frozen=True, slots=True, eq=False)
class Library:
    """A loaded library: each call takes one packed struct."""

    path: Path
    add_rms_norm: _Call
    gated_activation: _Call
    head_norm_rope_write: _Call
    paged_attention: _Call
    matrix_multiply: _Call
    choose_tokens: _Call
    choose_noise_of: _Call
    certainty_of: _Call
    step_open: Callable[[], int | None]  # the three of native_step: a new state, its end, and a pass
    step_close: Callable[[int], None]
    step_run: Callable[[int, bytes], int]


def open_library(path: Path) -> Library:
    """Load a file that `build` made. Raises OSError or AttributeError if it is not what it should be."""
    loaded = ctypes.CDLL(str(path))

    def function(name: str) -> _Call:
        call = getattr(loaded, name)
        call.argtypes, call.restype = [ctypes.c_char_p], ctypes.c_int
        return call

    opened, closed, run = loaded.step_open, loaded.step_close, loaded.step_run
    opened.argtypes, opened.restype = [], ctypes.c_void_p
    closed.argtypes, closed.restype = [ctypes.c_void_p], None
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_int
    return Library(
        path,
        function("add_rms_norm"),
        function("gated_activation"),
        function("head_norm_rope_write"),
        function("paged_attention"),
        function("matrix_multiply"),
        function("choose_tokens"),
        function("choose_noise_of"),
        function("certainty_of"),
        step_open=opened,
        step_close=closed,
        step_run=run,
    )


def fits(x: torch.Tensor) -> bool:
    """Rows of float32 in this machine's memory, which nobody wants gradients of."""
    return (
        x.dtype is torch.float32
        and x.is_cpu
        and x.ndim == 2
        and x.stride()[1] == 1
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def fits_pool(joint: torch.Tensor) -> bool:
    """A pool in this machine's memory, of a kind that the C code reads, which nobody wants gradients of."""
    return (
        joint.dtype in POOL_TYPES
        and joint.is_cpu
        and joint.ndim == 2
        and joint.stride()[1] == 1
        and not (joint.requires_grad and torch.is_grad_enabled())
    )


def plain(weight: torch.Tensor) -> bool:
    """A contiguous vector of float32 in this machine's memory, which nobody wants gradients of."""
    return (
        weight.dtype is torch.float32
        and weight.is_cpu
        and weight.ndim == 1
        and weight.is_contiguous()
        and not (weight.requires_grad and torch.is_grad_enabled())
    )


def fits_rope(
    qkv: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, cache: PoolLayer, layout: HeadLayout
) -> bool:
    """Whether the C code can take these."""
    return (
        fits(qkv)
        and fits_pool(cache.joint)
        and (cos is None or fits(cos))
        and (sin is None or fits(sin))
        and (layout.query_norm is None or plain(layout.query_norm))
        and (layout.key_norm is None or plain(layout.key_norm))
    )


def add_rms_norm(
    library: Library,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.add_rms_norm`; x, residual and out must fit."""
    rows, width = shape = x.shape
    if out is None:
        out = torch.empty(rows, width, dtype=torch.float32)
    total = x if residual is None else residual
    assert total.shape == shape and out.shape == shape and weight.shape[0] == width
    library.add_rms_norm(
        ADD_NORM.pack(
            x.data_ptr(),
            weight.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            x.stride()[0],
            total.stride()[0],
            out.stride()[0],
            rows,
            width,
            eps,
            offset,
            torch.get_num_threads(),
        )
    )
    return out, total


def gated_activation(
    library: Library, gate_up: torch.Tensor, kind: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See `ops.gated_activation`; gate_up and out must fit."""
    rows, both = gate_up.shape
    width = both // 2
    if out is None:
        out = torch.empty(rows, width, dtype=torch.float32)
    assert both % 2 == 0 and out.shape == (rows, width)
    library.gated_activation(
        GATED.pack(
            gate_up.data_ptr(),
            out.data_ptr(),
            gate_up.stride()[0],
            out.stride()[0],
            rows,
            width,
            _KINDS[kind],
            torch.get_num_threads(),
        )
    )
    return out


def head_norm_rope_write(
    library: Library,
    qkv: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    cache: PoolLayer,
    layout: HeadLayout,
) -> torch.Tensor:
    """See `ops.head_norm_rope_write`; all must fit (`fits_rope`). Raises IndexError for a stray slot."""
    shape, pool, heads = cache.shape, cache.joint, layout.heads
    kv_heads, key_dim = shape.kv_heads, shape.key_dim
    (rows, width), (num_slots, pool_width) = qkv.shape, pool.shape
    assert pool_width == shape.width and width == heads * key_dim + pool_width
    assert slots.shape == (rows,) and slots.dtype is torch.int64 and slots.is_contiguous()
    query = torch.empty(rows, heads, key_dim, dtype=torch.float32)
    cos, cos_row, sin, sin_row, rotary = (0, 0, 0, 0, 0) if rope is None else _rope(*rope, rows, key_dim)
    query_norm, query_norm_width = _norm(layout.query_norm, heads, key_dim)
    key_norm, key_norm_width = _norm(layout.key_norm, kv_heads, key_dim)
    if library.head_norm_rope_write(
        ROPE_WRITE.pack(
            qkv.data_ptr(),
            cos,
            sin,
            query_norm,
            key_norm,
            slots.data_ptr(),
            query.data_ptr(),
            pool.data_ptr(),
            qkv.stride()[0],
            cos_row,
            sin_row,
            pool.stride()[0],
            rows,
            num_slots,
            heads,
            kv_heads,
            key_dim,
            shape.value_dim,
            rotary,
            query_norm_width,
            key_norm_width,
            layout.eps,
            layout.offset,
            layout.interleaved,
            torch.get_num_threads(),
            POOL_TYPES[pool.dtype],
        )
    ):
        raise IndexError(f"a slot is not one of the pool's {num_slots}")
    return query


def _rope(cos: torch.Tensor, sin: torch.Tensor, rows: int, key_dim: int) -> tuple[int, int, int, int, int]:
    """Address and row of both tables, and how many dimensions they rotate."""
    count, rotary = shape = cos.shape
    assert sin.shape == shape and count == rows and rotary <= key_dim and rotary % 2 == 0
    return cos.data_ptr(), cos.stride()[0], sin.data_ptr(), sin.stride()[0], rotary


def _norm(weight: torch.Tensor | None, heads: int, key_dim: int) -> tuple[int, int]:
    """Address and width of a norm over a section of that many heads: over each of them, or over several together."""
    if weight is None:
        return 0, 0
    width = weight.shape[0]
    assert heads * key_dim % width == 0 and width % key_dim == 0
    return weight.data_ptr(), width


def fits_attention(query: torch.Tensor, cache: PoolLayer, sinks: torch.Tensor | None) -> bool:
    """Whether the C code can take these: float32 on the CPU, a pool that it reads, and nobody wants gradients."""
    return (
        query.dtype is torch.float32
        and query.is_cpu
        and query.stride()[2] == 1
        and fits_pool(cache.joint)
        and (sinks is None or plain(sinks))
        and not (torch.is_grad_enabled() and query.requires_grad)
    )


def paged_attention(
    library: Library,
    query: torch.Tensor,
    cache: PoolLayer,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `protocols.StepAttention`. All tensors are in this machine's memory; query and sinks are float32.

    Raises IndexError if a sequence reaches outside its tokens, its block table or the pool, and MemoryError.
    """
    shape, pool = cache.shape, cache.joint
    (tokens, heads, key_dim), (num_slots, pool_width) = query.shape, pool.shape
    kv_heads, value_dim = shape.kv_heads, shape.value_dim
    assert key_dim == shape.key_dim and heads % kv_heads == 0 and tokens == batch.num_tokens
    assert pool_width == shape.width and (sinks is None or sinks.shape[0] == heads)
    out = torch.empty(tokens, heads, value_dim, dtype=torch.float32)
    query_row, query_head, _ = query.stride()
    failed = library.paged_attention(
        ATTENTION.pack(
            *batch.fields,
            query.data_ptr(),
            pool.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
            query_row,
            query_head,
            pool.stride()[0],
            num_slots,
            heads,
            kv_heads,
            key_dim,
            value_dim,
            window or 0,
            scale,
            softcap or 0.0,
            POOL_TYPES[pool.dtype],
            torch.get_num_threads(),
        )
    )
    if failed:
        raise _failure(failed, num_slots)
    return out


def _failure(code: int, num_slots: int) -> Exception:
    if code == 1:
        return IndexError(
            f"a sequence reaches outside its tokens, its block table or the {num_slots} slots of the pool"
        )
    return MemoryError("no memory for the partial results of attention")
