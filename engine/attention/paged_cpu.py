"""Attention on the CPU that reads the pool's pages in place, in native code: nothing is gathered or padded.

Where there is no native library, and for what it can't do (another dtype or device), the sdpa backend takes the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention.sdpa import SdpaAttention
from engine.kernels import native
from engine.kernels.layout import MODES, PagedBatch
from engine.kernels.library import library
from engine.kernels.native import Library
from engine.protocols import StepAttention
from engine.runtime.batch import DeviceBatch
from engine.runtime.kv_cache import LayerCache


@dataclass(slots=True, eq=False)
class PagedCpuStep:
    """See `protocols.StepAttention`."""

    library: Library
    paged: PagedBatch
    batch: DeviceBatch
    other: StepAttention | None = None  # for layers that the native code can't do; made when one comes

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if native.fits_attention(query, cache, sinks):
            return native.paged_attention(
                self.library, query, cache, self.paged, scale=scale, window=window, softcap=softcap, sinks=sinks
            )
        if self.other is None:
            self.other = SdpaAttention().prepare(self.batch)
        return self.other.attend(query, cache, scale=scale, window=window, softcap=softcap, sinks=sinks)


class PagedCpuAttention:
    """See `protocols.AttentionBackend`. Stateless: what `prepare` returns serves one step."""

    def check_block_size(self, block_size: int) -> None:
        """Any will do."""

    def prepare(self, batch: DeviceBatch) -> StepAttention:
        found = library()
        if found is None or batch.mode.value not in MODES or not batch.block_tables.is_cpu:
            return SdpaAttention().prepare(batch)
        paged = PagedBatch(
            batch.block_tables.contiguous(),
            batch.query_starts.contiguous(),
            batch.kv_lens.contiguous(),
            batch.positions.contiguous(),
            batch.block_size,
            MODES.index(batch.mode.value),
            batch.block_length,
            None if batch.tree_starts is None else batch.tree_starts.contiguous(),
            None if batch.tree_masks is None else batch.tree_masks.contiguous(),
        )
        return PagedCpuStep(found, paged, batch)


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this backend runs native code for a pool of that kind; what `attention: auto` asks."""
    return device.type == "cpu" and dtype is torch.float32 and library() is not None
