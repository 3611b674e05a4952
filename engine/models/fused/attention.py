"""Attention with one product for query, key and value, and one operation from there to the pool."""

from __future__ import annotations

from enum import Enum

import torch
from torch import nn

from engine.kernels import ops
from engine.kernels.layout import HeadLayout
from engine.models.context import ContextSlot, ForwardContext
from engine.models.fused.parts import NO_ROPE, FusedNorm, FusedPart, Rope
from engine.runtime.kv_cache import LayerCache, LayerShape


class RopeForm(Enum):
    """How a model's rotary embedding lays out cos and sin [..., n]."""

    NONE = "none"  # this layer does not rotate
    FULL = "full"  # each already at the dimension that it multiplies
    PAIRS_OF_HALF = "pairs of half"  # its first n / 2 values belong to the pairs (0, 1), (2, 3), ...
    PAIRS = "pairs"  # its n values belong to the pairs (0, 1), (2, 3), ...
    HALVES = "halves"  # its n values belong to the pairs (0, n), (1, n + 1), ...

    def spread(self, table: torch.Tensor) -> torch.Tensor:
        """cos or sin [T, n] as the model lays it out -> [T, r], each value at its dimension, contiguous."""
        match self:
            case RopeForm.PAIRS_OF_HALF:
                return table[..., : table.shape[-1] // 2].repeat_interleave(2, dim=-1)
            case RopeForm.PAIRS:
                return table.repeat_interleave(2, dim=-1)
            case RopeForm.HALVES:
                return torch.cat((table, table), dim=-1)
        return table.contiguous()


class FusedAttention(FusedPart):
    """Same call and result as the module it replaces.

    Head counts follow from the sizes of the products, which may be one rank's slice of the model's.
    """

    def __init__(self, qkv: nn.Module, out: nn.Module, shape: LayerShape, heads: int, layer: int) -> None:
        super().__init__()
        self.slot: ContextSlot | None = None
        self.qkv = qkv
        self.o_proj = out
        self.shape = shape
        self.layer_idx = layer
        self.rope_form = RopeForm.NONE
        self.layout = HeadLayout(heads)
        self.scale = 1.0
        self.window: int | None = None
        self.softcap: float | None = None
        self.sinks: torch.Tensor | None = None

    def set_layout(
        self, form: RopeForm, interleaved: bool, query_norm: FusedNorm | None, key_norm: FusedNorm | None
    ) -> None:
        """Norms before the rotation, each per head or over all heads, as their weights' sizes say."""
        self.rope_form, self.q_norm, self.k_norm = form, query_norm, key_norm
        norm = query_norm if query_norm is not None else key_norm
        self.layout = HeadLayout(
            heads=self.layout.heads,
            interleaved=interleaved,
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if key_norm is None else key_norm.weight,
            eps=1e-6 if norm is None else norm.eps,
            offset=0.0 if norm is None else norm.offset,
        )

    def set_options(self, scale: float, window: int | None, softcap: float | None, sinks: torch.Tensor | None) -> None:
        """The constants of `ForwardContext.attend`."""
        self.scale, self.window, self.softcap = scale, window, softcap
        self.sinks = sinks  # registers itself where it is a parameter

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        *_: object,
        slipstream: ForwardContext | None = None,
        **__: object,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [1, T, width] -> ([1, T, width], None)."""
        out = self.run(hidden_states[0], self.rope(position_embeddings), self.context(slipstream))
        return out.unsqueeze(0), None

    def context(self, given: ForwardContext | None) -> ForwardContext:
        """The context of this pass: the one given, or that in the adapter's slot where the model hands none on."""
        if given is None and self.slot is not None:
            given = self.slot.context
        assert given is not None
        return given

    def rope(self, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None) -> Rope:
        """cos and sin as this layer takes them, from the model's own [1, T, n]."""
        if self.rope_form is RopeForm.NONE or position_embeddings is None:
            return NO_ROPE
        cos, sin = position_embeddings
        if cos.dim() == 2:  # a fused backbone has spread them for all layers
            return cos, sin
        return self.rope_form.spread(cos[0]), self.rope_form.spread(sin[0])

    def run(
        self, x: torch.Tensor, rope: Rope, context: ForwardContext, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, width] -> [T, width], or [len(rows), width] where only these rows go on. Without the module call."""
        parts = self._modules
        qkv = parts["qkv"](x)  # type: ignore[misc]  # never None
        cache = context.layer_cache(self.layer_idx)
        if cache is None:
            out = self._attend_unpaged(qkv, rope, context)
        else:
            query = ops.head_norm_rope_write(qkv, *rope, context.slots, cache, self.layout)
            out = context.attend_written(
                self.layer_idx, query, scale=self.scale, window=self.window, softcap=self.softcap, sinks=self.sinks
            )
        out = out.flatten(1)
        return parts["o_proj"](out if rows is None else out.index_select(0, rows))  # type: ignore[misc]

    def _attend_unpaged(self, qkv: torch.Tensor, rope: Rope, context: ForwardContext) -> torch.Tensor:
        """For contexts that have no pool: the same operation over a scratch pool of these tokens."""
        tokens = qkv.shape[0]
        scratch = LayerCache(qkv.new_empty(tokens, self.shape.width), self.shape)
        slots = torch.arange(tokens, device=qkv.device)
        query = ops.head_norm_rope_write(qkv, *rope, slots, scratch, self.layout)
        return context.attend(
            self.layer_idx,
            query,
            scratch.key,
            scratch.value,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
        )
