"""What a native step is made of: a model's constants, with the C structs of `step.h` that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

import torch

from engine.kernels import native
from engine.kernels.layout import MODES, HeadLayout, PoolShape
from engine.kernels.matrix import PackedMatrix
from engine.kernels.reference import ACTIVATIONS

# The structs of step.h, field for field.
NORM = Struct("@2P2fq")
LAYER = Struct(f"@7P{4 * NORM.size}s8q5f7i")
ROPE = Struct("@2P2q")
PROGRAM = Struct(f"@4P{NORM.size}s5q3fi")

MOST_PLANS = 8
_NORMS = {"": 0, "rms": 1, "layer": 2}
_TABLES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_PACKED = 4


@dataclass(frozen=True, slots=True, eq=False)
class StepNorm:
    """`kind` "rms": x / rms(x) * (offset + weight); "layer": (x - mean) / deviation * weight + bias; "": x itself."""

    kind: str = ""
    weight: torch.Tensor | None = None  # [width] float32
    bias: torch.Tensor | None = None
    eps: float = 0.0
    offset: float = 0.0

    def pack(self) -> bytes:
        return NORM.pack(_address(self.weight), _address(self.bias), self.eps, self.offset, _NORMS[self.kind])


NO_NORM = StepNorm()


@dataclass(frozen=True, slots=True, eq=False)
class StepLayer:
    """A decoder layer: h = x + scale * post_attention(attention(pre_attention(x))), then the same with the MLP on h.

    Parallel: x + scale * (attention(pre_attention(x)) + mlp(pre_mlp(x))).
    """

    qkv: PackedMatrix
    out: PackedMatrix
    up: PackedMatrix  # gate and up, one after the other, where `gated`
    down: PackedMatrix
    layout: HeadLayout
    shape: PoolShape
    activation: str
    attention_scale: float
    pre_attention: StepNorm = NO_NORM
    post_attention: StepNorm = NO_NORM
    pre_mlp: StepNorm = NO_NORM
    post_mlp: StepNorm = NO_NORM
    gated: bool = True
    parallel: bool = False
    scale: float = 1.0
    rope: int = -1  # index into the program's ropes
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # [heads] float32
    mode: str = ""  # of `layout.MODES`; "" is the batch's

    @property
    def plan(self) -> tuple[int | str, ...]:
        """Layers that agree in this share the plan of their attention."""
        shape = self.shape
        return (self.layout.heads, shape.kv_heads, shape.key_dim, shape.value_dim, self.window or 0, self.mode)

    def pack(self, plan: int) -> bytes:
        layout, shape = self.layout, self.shape
        query, key = layout.query_norm, layout.key_norm
        matrices = (self.qkv.address, self.out.address, self.up.address, self.down.address)
        norms = (self.pre_attention, self.post_attention, self.pre_mlp, self.post_mlp)
        sizes = (layout.heads, shape.kv_heads, shape.key_dim, shape.value_dim)
        widths = (0 if query is None else query.shape[0], 0 if key is None else key.shape[0])
        numbers = (layout.eps, layout.offset, self.attention_scale, self.softcap or 0.0, self.scale)
        mode = MODES.index(self.mode) if self.mode else -1
        kinds = (self.rope, layout.interleaved, ACTIVATIONS.index(self.activation), self.gated, self.parallel)
        return LAYER.pack(
            *matrices,
            *(_address(query), _address(key), _address(self.sinks)),
            b"".join(norm.pack() for norm in norms),
            *(*sizes, *widths, self.window or 0, self.down.inputs),
            *(*numbers, *kinds, plan, mode),
        )

    def check(self, width: int) -> None:
        layout, shape = self.layout, self.shape
        attended = layout.heads * shape.value_dim
        assert layout.heads % shape.kv_heads == 0
        assert (self.qkv.inputs, self.qkv.outputs) == (width, layout.heads * shape.key_dim + shape.width)
        assert (self.out.inputs, self.out.outputs) == (attended, width)
        assert (self.up.inputs, self.down.outputs) == (width, width)
        assert self.up.outputs == self.down.inputs * (2 if self.gated else 1)
        for norm, count in ((layout.query_norm, layout.heads), (layout.key_norm, shape.kv_heads)):
            assert norm is None or (native.plain(norm) and count * shape.key_dim % norm.shape[0] == 0)
        assert self.sinks is None or (native.plain(self.sinks) and self.sinks.shape == (layout.heads,))


@dataclass(frozen=True, slots=True, eq=False)
class StepRope:
    """cos and sin [length, width] float32 by position; without them each call brings its own, by token."""

    width: int
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StepProgram:
    """A model's constants. Without an embedding, calls bring embedded tokens; without a head, they ask for no logits.

    logits = softcap * tanh(scale * head(x) / softcap), or without the cap.
    """

    layers: Sequence[StepLayer]
    ropes: Sequence[StepRope]
    last: StepNorm
    width: int
    head: PackedMatrix | None = None
    embedding: torch.Tensor | PackedMatrix | None = None
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None


def table_fields(table: torch.Tensor | PackedMatrix | None) -> tuple[int, int, int]:
    """Address, rows and kind of an embedding table, as StepProgram has them."""
    if table is None:
        return 0, 0, 0
    if isinstance(table, PackedMatrix):
        return table.address, table.outputs, _PACKED
    return table.data_ptr(), table.shape[0], _TABLES[table.dtype]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pack_rope(rope: StepRope) -> bytes:
    """The C struct StepRope."""
    if rope.cos is None or rope.sin is None:
        return ROPE.pack(0, 0, 0, rope.width)
    for table in (rope.cos, rope.sin):
        assert table.shape == (rope.cos.shape[0], rope.width) and table.dtype is torch.float32 and table.is_contiguous()
    return ROPE.pack(rope.cos.data_ptr(), rope.sin.data_ptr(), rope.cos.shape[0], rope.width)


def check_program(program: StepProgram) -> None:
    """Sizes and types of everything: the C code believes what it is told."""
    width = program.width
    assert program.layers and (program.head is None or program.head.inputs == width)
    for layer in program.layers:
        layer.check(width)
        assert -1 <= layer.rope < len(program.ropes)
        if layer.rope >= 0:
            rotary = program.ropes[layer.rope].width
            assert rotary % 2 == 0 and rotary <= layer.shape.key_dim
        for norm in (layer.pre_attention, layer.post_attention, layer.pre_mlp, layer.post_mlp, program.last):
            for vector in (norm.weight, norm.bias):
                assert vector is None or (native.plain(vector) and vector.shape == (width,))
            assert norm.kind != "rms" or norm.weight is not None
    embedding = program.embedding
    if isinstance(embedding, PackedMatrix):
        assert embedding.inputs == width
    elif embedding is not None:
        assert embedding.shape[1] == width and embedding.dtype in _TABLES and embedding.is_contiguous()
