"""The network of a block-diffusion draft (DFlash, arXiv 2602.06036, section 4): context entries in, hidden states out.

The prompt reaches it as keys and values alone, made from the target's hidden states: one fused vector per position,
which every layer's own key and value matrices turn into a context entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from engine.kernels import ops
from engine.models.dflash.decoder import DecoderLayer, Tensors, merged, parameter
from engine.models.dflash.heads import ConfidenceHead, MarkovHead, PathSelector
from engine.models.dflash.spec import DFlashSpec
from engine.models.fused.attention import RopeForm
from engine.models.fused.backbone import RopeSource
from engine.models.rotary import rotary_of
from engine.protocols import StepAttention
from engine.runtime.kv_cache import LayerShape, PagedKVCache


class DFlashNetwork(nn.Module):
    """Built from canonical tensors (see `formats.load`), all on one device and in one dtype.

    Its linear layers may be packed, in place, before the first pass. `length` bounds the positions it will see.
    """

    def __init__(self, spec: DFlashSpec, tensors: Tensors, length: int) -> None:
        super().__init__()
        self.spec = spec
        self.fc = merged(tensors, ["fc"])
        self.hidden_norm = parameter(tensors["hidden_norm.weight"])
        self.norm = parameter(tensors["norm.weight"])
        self.layers = nn.ModuleList(DecoderLayer(spec, tensors, index) for index in range(len(spec.layers)))
        attentions = [f"layers.{index}.self_attn" for index in range(len(spec.layers))]
        self.context = merged(tensors, [f"{name}.{part}_proj" for name in attentions for part in "kv"])
        self.embedding = parameter(tensors["embed_tokens.weight"]) if spec.own_embedding else None
        self.head = merged(tensors, ["lm_head"]) if "lm_head.weight" in tensors else None
        refiner: nn.Module | None = None
        if spec.markov_rank:
            refiner = MarkovHead(tensors)
        elif spec.selector_rank:
            refiner = PathSelector(spec, tensors)
        self.refiner = refiner
        self.confidence = ConfidenceHead(spec, tensors) if spec.confidence_head else None
        self.rope = rope_source(spec, length, self.norm.device)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        spec = self.spec
        return (LayerShape(spec.num_kv_heads, spec.head_dim, spec.head_dim),) * len(spec.layers)

    def write_context(
        self, states: Sequence[torch.Tensor], positions: torch.Tensor, slots: torch.Tensor, cache: PagedKVCache
    ) -> None:
        """From the target's hidden states [T, width] after each tap to the context entries of all layers."""
        fused = self.fc(torch.cat(tuple(states), dim=1) if len(states) > 1 else states[0])
        normed, _ = ops.add_rms_norm(fused, None, self.hidden_norm, self.spec.rms_norm_eps)
        entries: torch.Tensor = self.context(normed)
        rope = self.rope(positions.unsqueeze(0))
        width = cache.layers[0].shape.width
        for layer, pool, first in zip(self.layers, cache.layers, range(0, entries.shape[1], width), strict=True):
            part = entries[:, first : first + width]
            ops.head_norm_rope_write(part, *rope, slots, pool, layer.context_layout)  # type: ignore[arg-type]

    def forward(
        self,
        embedded: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        cache: PagedKVCache,
        attention: Mapping[bool, StepAttention],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks [T, D] at `positions` [T]: residual stream and last update [T, D], to go through `final`.

        `attention` is the step's, by whether a layer is causal.
        """
        rope = self.rope(positions.unsqueeze(0))
        stream, update = embedded, None
        for layer, pool in zip(self.layers, cache.layers, strict=True):
            stream, update = layer.run(stream, update, rope, slots, pool, attention[layer.causal])  # type: ignore[operator, index]
        assert update is not None
        return stream, update

    def final(self, stream: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """Rows of what `forward` gave -> the last hidden states, which the head takes."""
        return ops.add_rms_norm(stream, update, self.norm, self.spec.rms_norm_eps)[0]


def rope_source(spec: DFlashSpec, length: int, device: torch.device) -> RopeSource:
    """The draft's own rotary embedding, float32, looked up in a table for positions below `length` where it can be."""
    compute = rotary_of(dict(spec.rope), spec.head_dim, spec.max_position_embeddings or length)
    source = RopeSource(compute, RopeForm.FULL)
    source.tabulate(length, device)
    return source
