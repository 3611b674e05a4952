"""What kernels are told about a layer, its pool and a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

MODES = ("causal", "block_causal", "bidirectional", "tree")  # as the C code numbers them; the values of `AttentionMode`


class PoolShape(Protocol):
    """Head sizes of one layer's cache entry; `runtime.kv_cache.LayerShape` is one."""

    @property
    def kv_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def width(self) -> int: ...


class PoolLayer(Protocol):
    """One layer's pool; `runtime.kv_cache.LayerCache` is one."""

    @property
    def joint(self) -> torch.Tensor:
        """[slots, kv_heads * (key_dim + value_dim)]: all keys of a slot, then all its values."""
        ...

    @property
    def shape(self) -> PoolShape: ...


@dataclass(frozen=True, slots=True, eq=False)
class HeadLayout:
    """How one layer's query/key/value product is normed and rotated. Head sizes come from the layer's cache.

    A norm's weight says what it is taken over: [key_dim] is one norm per head with a shared weight (Qwen 3, Gemma 3),
    [heads * key_dim] one norm over all heads of the section together (OLMo 2). Norms come before the rotation.
    """

    heads: int  # query heads
    interleaved: bool = False  # rotary pairs are (0, 1), (2, 3) ...; otherwise (0, r/2), (1, r/2 + 1) ...
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    eps: float = 1e-6  # of both norms
    offset: float = 0.0  # added to both weights (1.0 for Gemma)


@dataclass(slots=True, eq=False)
class PagedBatch:
    """The part of a `DeviceBatch` that attention reads; n sequences of T tokens together. All tensors contiguous."""

    tables: torch.Tensor  # [n, max_blocks] int32
    starts: torch.Tensor  # [n + 1] int32
    kv_lens: torch.Tensor  # [n] int32
    positions: torch.Tensor  # [T] int64
    block_size: int
    mode: int  # index into MODES
    block_length: int
    tree_starts: torch.Tensor | None = None  # of mode tree, [T] int32
    tree_masks: torch.Tensor | None = None  # of mode tree, [T, words] int64
    num_tokens: int = field(init=False)
    fields: tuple[int, ...] = field(init=False)  # addresses and sizes as the C code takes them, for all layers

    def __post_init__(self) -> None:
        tensors = (self.tables, self.starts, self.kv_lens, self.positions)
        assert all(tensor.is_contiguous() for tensor in tensors)
        assert [tensor.dtype for tensor in tensors] == [torch.int32, torch.int32, torch.int32, torch.int64]
        (num_seqs, table_row), (self.num_tokens,) = self.tables.shape, self.positions.shape
        assert self.kv_lens.shape[0] == num_seqs == self.starts.shape[0] - 1
        trees, words = self._trees()
        sizes = (table_row, num_seqs, self.num_tokens, self.block_size, self.mode, self.block_length, words)
        self.fields = (*(tensor.data_ptr() for tensor in tensors), *trees, *sizes)

    def _trees(self) -> tuple[tuple[int, int], int]:
        """Addresses of tree_starts and tree_masks, and a mask's words."""
        starts, masks = self.tree_starts, self.tree_masks
        if MODES[self.mode] != "tree":
            return (0, 0), 0
        assert starts is not None and masks is not None and starts.is_contiguous() and masks.is_contiguous()
        assert starts.dtype is torch.int32 and masks.dtype is torch.int64
        assert starts.shape == (self.num_tokens,) == masks.shape[:1]
        return (starts.data_ptr(), masks.data_ptr()), masks.shape[1]
