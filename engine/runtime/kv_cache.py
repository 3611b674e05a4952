"""The paged KV pool: for every layer one tensor of slots; a sequence's block table says which slots are its own."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch

from engine.kernels.reference import as_bytes, put_rows


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Width of one layer's cache entry. Value heads may be narrower than key heads."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """One layer's pool. Keys and values of a slot lie side by side, so that one copy writes or gathers both.

    `joint` is [slots, kv_heads * (key_dim + value_dim)]; `key` [slots, kv_heads, key_dim] and
    `value` [slots, kv_heads, value_dim] are views of it.
    """

    joint: torch.Tensor
    shape: LayerShape

    @property
    def key(self) -> torch.Tensor:
        return self.split(self.joint)[0]

    @property
    def value(self) -> torch.Tensor:
        return self.split(self.joint)[1]

    def split(self, joint: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of keys and values in rows of the pool: [..., width] -> [..., kv_heads, key_dim], [..., value_dim]."""
        cut = self.shape.kv_heads * self.shape.key_dim
        key = joint[..., :cut].unflatten(-1, (self.shape.kv_heads, self.shape.key_dim))
        value = joint[..., cut:].unflatten(-1, (self.shape.kv_heads, self.shape.value_dim))
        return key, value

    def write(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store key [T, kv_heads, key_dim] and value [T, kv_heads, value_dim] at `slots` [T], as the pool's dtype."""
        joint = torch.cat((key.flatten(1), value.flatten(1)), dim=1)
        put_rows(self.joint, slots, joint)


class PagedKVCache:
    """The pools of all layers of one model; block b of size s owns slots b * s to b * s + s - 1."""

    def __init__(
        self, shapes: tuple[LayerShape, ...], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.layers = tuple(
            LayerCache(_zeros(num_blocks * block_size, shape.width, dtype, device), shape) for shape in shapes
        )

    def compact(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy slots `source` [k] to slots `target` [k], in all layers: the accepted path of a draft tree, in order.

        All of a layer is read before any of it is written, so the two may overlap. A slot copied onto itself does
        nothing: padding for a fixed k. No two pairs may write different things to one target.
        """
        for layer in self.layers:
            pool = as_bytes(layer.joint)
            pool.index_copy_(0, target, pool.index_select(0, source))


def _zeros(slots: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A layer's pool. Zeroed, not empty: masked attention multiplies unread slots by 0, and 0 * NaN is NaN.

    On a CPU fresh pages of the system, which are 0 without being touched: a pool takes no memory that is not used yet,
    and no time at the start.
    """
    size = slots * width * dtype.itemsize
    if device.type != "cpu" or size < mmap.PAGESIZE:
        return torch.zeros(slots, width, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes of a KV pool can't be had: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(slots, width)


def block_bytes(shapes: tuple[LayerShape, ...], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return sum(shape.width for shape in shapes) * block_size * dtype.itemsize
