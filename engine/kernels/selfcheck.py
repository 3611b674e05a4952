"""Each native kernel against its torch twin on small random numbers, before it is trusted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from engine.kernels import native, native_certainty, native_choose, native_matrix, reference, reference_matrix
from engine.kernels.layout import MODES, HeadLayout, PagedBatch
from engine.kernels.native import Library


@dataclass(frozen=True, slots=True)
class _Shape:
    kv_heads: int = 2
    key_dim: int = 20
    value_dim: int = 28

    @property
    def width(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    joint: torch.Tensor
    shape: _Shape


@torch.inference_mode()
def largest_errors(library: Library) -> dict[str, float]:
    """Kernel -> largest absolute difference from its twin, over a few shapes with odd sizes; NaN counts as infinite."""
    random = torch.Generator().manual_seed(0)
    checks = {
        "add_rms_norm": _norms,
        "gated_activation": _gates,
        "rope": _ropes,
        "attention": _attends,
        "matrix": _multiplies,
        "choice": _chooses,
        "certainty": _certainties,
    }
    errors = {}
    for name, check in checks.items():
        pairs = list(check(library, random))
        errors[name] = max(float((got - want).abs().nan_to_num(float("inf")).max()) for got, want in pairs)
    return errors


_Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]


def _norms(library: Library, random: torch.Generator) -> _Pairs:
    x, residual, weight = (torch.randn(size, generator=random) for size in ((3, 37), (3, 37), (37,)))
    ours, theirs = residual.clone(), residual.clone()
    yield from zip(
        native.add_rms_norm(library, x, ours, weight, 1e-5, 1.0),
        reference.add_rms_norm(x, theirs, weight, 1e-5, 1.0),
        strict=True,
    )


def _gates(library: Library, random: torch.Generator) -> _Pairs:
    gate_up = torch.randn(3, 74, generator=random) * 3
    for kind in reference.ACTIVATIONS:
        yield native.gated_activation(library, gate_up, kind), reference.gated_activation(gate_up, kind)


_POOLS = (torch.float32, torch.float16)


def _ropes(library: Library, random: torch.Generator) -> _Pairs:
    shape, slots = _Shape(), torch.tensor([4, 0, 6])
    qkv = torch.randn(3, 6 * shape.key_dim + shape.width, generator=random)
    norm = torch.randn(shape.key_dim, generator=random)
    cos, sin = torch.randn(3, 12, generator=random), torch.randn(3, 12, generator=random)
    for interleaved, dtype in itertools.product((False, True), _POOLS):
        layout = HeadLayout(6, interleaved, query_norm=norm, key_norm=norm.flip(0))
        ours, theirs = (_Layer(torch.zeros(8, shape.width, dtype=dtype), shape) for _ in range(2))
        yield (
            native.head_norm_rope_write(library, qkv, (cos, sin), slots, ours, layout),
            reference.head_norm_rope_write(qkv, cos, sin, slots, theirs, layout),
        )
        nearly = 1e-3 if dtype is torch.float16 else 1.0  # a last bit may differ
        yield ours.joint.float() * nearly, theirs.joint.float() * nearly


def _attends(library: Library, random: torch.Generator) -> _Pairs:
    """Decode, verification and prefill of three sequences in one batch, over scattered blocks."""
    shape, lengths, kv_lens, block = _Shape(), (1, 5, 70), (300, 45, 130), 8
    table = torch.randperm(64, generator=random, dtype=torch.int32)
    tables = torch.stack([table[:38], table[12:50], table[26:]])
    positions = torch.cat([torch.arange(kv - m, kv) for m, kv in zip(lengths, kv_lens, strict=True)])
    layer = _Layer(torch.randn(64 * block, shape.width, generator=random), shape)
    query, sinks = torch.randn(76, 6, shape.key_dim, generator=random), torch.randn(6, generator=random)
    starts = torch.tensor([0, 1, 6, 76], dtype=torch.int32)
    # Trees from each sequence's third query on, of nodes that see themselves and some of those before them.
    roots = torch.tensor([299, *[42] * 5, *[62] * 70], dtype=torch.int32)
    nodes = (positions - roots)[:, None]
    bits = (torch.rand(76, 128, generator=random) < 0.5) & (torch.arange(128) < nodes) | (torch.arange(128) == nodes)
    masks = torch.stack([_word(bits[:, :64]), _word(bits[:, 64:])], dim=1)
    for mode, dtype in itertools.product(range(len(MODES)), _POOLS):
        trees = (roots, masks) if MODES[mode] == "tree" else (None, None)
        batch = PagedBatch(tables, starts, torch.tensor(kv_lens, dtype=torch.int32), positions, block, mode, 8, *trees)
        pool = _Layer(layer.joint.to(dtype), shape)
        for window, softcap, sink in ((None, None, None), (40, None, sinks), (None, 3.0, None)):
            yield (
                native.paged_attention(
                    library, query, pool, batch, scale=0.3, window=window, softcap=softcap, sinks=sink
                ),
                reference.paged_attention(query, pool, batch, scale=0.3, window=window, softcap=softcap, sinks=sink),
            )


def _word(bits: torch.Tensor) -> torch.Tensor:
    """[n, 64] bool -> [n] int64."""
    return (bits.long() << torch.arange(64)).sum(-1)


# The first block of Philox4x64-10 with a key and a counter of 0 (Random123's known answers), in lanes of 32 bits.
_PHILOX = "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"


def _multiplies(library: Library, random: torch.Generator) -> _Pairs:
    """Every format, with outputs and inputs that fill neither panels nor groups, for one row and for several tiles."""
    from engine.kernels.matrix import pack  # it asks library.py, which asks this file

    for format in native_matrix.FORMATS:
        weight, bias = torch.randn(37, 70, generator=random) / 8, torch.randn(37, generator=random)
        matrix = pack(weight, format, bias)
        for rows in (1, 14):
            x = torch.randn(rows, 70, generator=random)
            yield native_matrix.multiply(library, matrix.address, x, 37), reference_matrix.multiply(matrix, x)


def _chooses(library: Library, random: torch.Generator) -> _Pairs:
    """The largest of each row, the noise's bits as known, and the noise as its formula says."""
    logits = torch.randn(3, 1037, generator=random)
    best = logits.topk(2)
    found = native_choose.choose(library, logits, None, None, second=True)
    yield torch.from_numpy(found.tokens), best.indices[:, 0]
    yield torch.from_numpy(found.largest), best.values[:, 0]
    assert found.second is not None
    yield torch.from_numpy(found.second), best.values[:, 1]
    bits, noise = native_choose.noise(library, np.zeros(5, dtype=np.uint64), 4096)
    yield (
        torch.from_numpy((bits[:8].view(np.uint64) != [int(word, 16) for word in _PHILOX.split()]).astype(float)),
        torch.zeros(4),
    )
    share = bits.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    exact = -np.log(-np.log1p(-share.astype(np.float64).clip(max=1 - 2.0**-24)))
    yield torch.from_numpy(noise.astype(np.float64)), torch.from_numpy(exact)


def _certainties(library: Library, random: torch.Generator) -> _Pairs:
    logits, tokens = 4 * torch.randn(3, 1037, generator=random), torch.tensor([5, 1036, 0])
    names = ("probability", "margin", "entropy")
    twin = reference.certainty(logits, tokens, names)
    yield native_certainty.certainty(library, logits, tokens), torch.stack([twin[name] for name in names])
