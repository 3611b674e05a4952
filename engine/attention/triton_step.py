"""Plans and launches the kernels of `triton_paged` for one step.

What the kernels need of a step stays on the device (positions, kv lengths, block tables, tree masks), so a step that
was captured in a CUDA graph runs again over other contents of the same tensors. The host adds a plan (`work.py`), made
from its upper bounds of the lengths; of a bounded batch the plan is made on the device, too (`device_plan.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from triton.runtime import JITFunction, driver

from engine.attention.device_plan import uniform
from engine.attention.triton_kernels import merge_splits, paged_attention
from engine.attention.triton_plan import plan as device_plan
from engine.attention.work import MAX_SPLITS, Layout, Lengths, Machine, Tile, by_height, padded, plan
from engine.runtime.batch import AttentionMode, DeviceBatch
from engine.runtime.kv_cache import LayerCache
from engine.runtime.transfer import to_device

COMPILED = isinstance(paged_attention, JITFunction)  # or run by Triton's interpreter, on a CPU
LOG2_E = 1.4426950408889634
# As numbered in triton_kernels.
MODES = {
    AttentionMode.CAUSAL: 0,
    AttentionMode.TREE: 1,
    AttentionMode.BLOCK_CAUSAL: 2,
    AttentionMode.BIDIRECTIONAL: 3,
}


def machine(index: int) -> Machine:
    """The numbers of a CUDA device that a plan is made for."""
    properties = driver.active.utils.get_device_properties(index)
    wgmma = driver.active.get_current_target().arch == 90
    return Machine(properties["multiprocessor_count"], properties["max_shared_mem"], wgmma)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What one layer asks for; query [T, heads, key_dim], out [T, heads, value_dim]. A head's row is contiguous."""

    query: torch.Tensor
    key: torch.Tensor  # [slots, kv_heads, key_dim]
    value: torch.Tensor  # [slots, kv_heads, value_dim]
    out: torch.Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """One plan on the device, with the buffers of its split items; layers run one after another and share them."""

    tile: Tile
    items: torch.Tensor  # [w, 8] int32
    merges: torch.Tensor  # [s, 8] int32
    partial_out: torch.Tensor  # [partials, kv_heads, block_m, padded value_dim] float32
    partial_sum: torch.Tensor  # [partials, kv_heads, block_m] float32

    def run(self, batch: DeviceBatch, call: Call) -> None:
        """Queue the kernels, which write this launch's rows of `out`."""
        kv_heads, value_dim = call.value.shape[1:]
        constants = {
            "KV_HEADS": kv_heads,
            "FOLD": call.query.shape[1] // kv_heads,
            "VALUE_DIM": value_dim,
            "BLOCK_M": self.tile.block_m,
            "BLOCK_V": padded(value_dim),
        }
        out_strides = call.out.stride()[:2]
        paged_attention[(self.items.shape[0] * kv_heads,)](
            *(call.query, call.key, call.value, call.out, self.partial_out, self.partial_sum, self.items),
            *_step_arguments(batch),
            call.sinks if call.sinks is not None else batch.kv_lens,
            *_score_arguments(call),
            *(call.window or 0, batch.block_length, *call.query.stride()[:2], *out_strides),
            batch.block_tables.stride(0),
            **constants,
            **_constants(batch, call, self.tile),
            SPLIT=self.merges.shape[0] > 0,
            num_warps=self.tile.warps,
            num_stages=self.tile.stages,
        )
        if self.merges.shape[0]:
            merge_splits[(self.merges.shape[0] * kv_heads * self.tile.block_m,)](
                *(self.partial_out, self.partial_sum, call.out, self.merges, *out_strides),
                **constants,
                MAX_SPLITS=MAX_SPLITS,
            )


@dataclass(slots=True, eq=False)
class TritonStep:
    """See `protocols.StepAttention`. Queries are cast to the pool's type, fp8 pools to theirs; sums are fp32."""

    batch: DeviceBatch
    machine: Machine
    _launches: dict[tuple[Layout, int | None], list[Launch]] = field(default_factory=dict)

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
        if query.stride(-1) != 1:
            query = query.contiguous()
        out = query.new_empty(query.shape[0], query.shape[1], cache.shape.value_dim)
        call = Call(query, cache.key, cache.value, out, scale, window, softcap, sinks)
        # Bytes of an element as it is multiplied: numbers of 8 bits are widened.
        size = max(cache.joint.element_size(), 2)
        layout = Layout(query.shape[1] // cache.shape.kv_heads, cache.shape, size)
        for launch in self.launches(layout, window):
            launch.run(self.batch, call)
        return out

    def launches(self, layout: Layout, window: int | None) -> list[Launch]:
        """The launches for layers of this layout and window: planned for the first such layer, then kept."""
        key = (layout, window)
        if key not in self._launches:
            if self.batch.bounded:
                self._launches[key] = [self._launch_bounded(layout, window)]
                return self._launches[key]
            if self.batch.positions.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a step must attend once before it is captured: its plan comes from the host")
            groups = by_height(self.batch.query_lens, layout.fold)
            self._launches[key] = [self._launch(members, layout, window) for members in groups]
        return self._launches[key]

    def _launch(self, members: list[int], layout: Layout, window: int | None) -> Launch:
        batch, index = self.batch, torch.tensor(members)
        queries = torch.tensor(batch.query_lens)
        starts = (queries.cumsum(0) - queries)[index]
        lengths = Lengths(index, starts, queries[index], torch.tensor(batch.kv_lens_host)[index])
        causal = batch.mode in (AttentionMode.CAUSAL, AttentionMode.BLOCK_CAUSAL)
        made = plan(lengths, layout, self.machine, causal, window)
        items, merges = to_device((made.items, made.merges), batch.positions.device)
        return _with_partials(made.tile, items, merges, made.partials, layout)

    def _launch_bounded(self, layout: Layout, window: int | None) -> Launch:
        """One launch whose plan is made on the device, whenever this runs again."""
        batch = self.batch
        causal = batch.mode in (AttentionMode.CAUSAL, AttentionMode.BLOCK_CAUSAL)
        longest = batch.kv_lens_host[0]
        known = uniform(batch.num_seqs, batch.query_lens[0], longest, layout, self.machine, causal, window)
        items, merges = device_plan(batch.kv_lens, known)
        return _with_partials(known.tile, items, merges, known.capacity, layout)


def _with_partials(tile: Tile, items: torch.Tensor, merges: torch.Tensor, partials: int, layout: Layout) -> Launch:
    size = partials, layout.shape.kv_heads, tile.block_m
    partial_out = torch.empty(*size, padded(layout.shape.value_dim), device=items.device)
    return Launch(tile, items, merges, partial_out, torch.empty(size, device=items.device))


def _step_arguments(batch: DeviceBatch) -> tuple[torch.Tensor, ...]:
    """kv lengths, positions, block tables, and of a tree the starts and masks; others get a tensor nobody reads."""
    starts, masks = batch.tree_starts, batch.tree_masks
    if starts is None or masks is None:
        starts = masks = batch.kv_lens
    return batch.kv_lens, batch.positions, batch.block_tables, starts, masks.view(torch.int32)


def _score_arguments(call: Call) -> tuple[float, float]:
    """The factors that turn a dot product into an exponent of base 2; see `paged_attention`."""
    if call.softcap is None:
        return call.scale * LOG2_E, 0.0
    return call.softcap * LOG2_E, 2.0 * LOG2_E * call.scale / call.softcap


def _constants(batch: DeviceBatch, call: Call, tile: Tile) -> dict[str, int | bool | str]:
    """What a kernel is compiled for, besides the widths that both kernels know."""
    return {
        "SLOT": call.key.stride(0),
        "KEY_HEAD": call.key.stride(1),
        "VALUE_HEAD": call.value.stride(1),
        "KEY_DIM": call.key.shape[2],
        "PAGE": batch.block_size,
        "MODE": MODES[batch.mode],
        "WINDOW": call.window is not None,
        "SOFTCAP": call.softcap is not None,
        "SINKS": call.sinks is not None,
        "WORDS": 0 if batch.tree_masks is None else 2 * batch.tree_masks.shape[1],
        "FP8": call.key.dtype is torch.float8_e4m3fn,  # read as what it is, multiplied in the query's type
        "PRECISION": "ieee",  # of fp32 products; the others know one
        "BLOCK_N": tile.block_n,
        "BLOCK_K": padded(call.key.shape[2]),
    }
