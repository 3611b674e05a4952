"""A decoder layer that carries the residual stream and the update still to be added to it as two tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engine.models.context import ForwardContext
from engine.models.fused.attention import FusedAttention
from engine.models.fused.mlp import FusedMLP
from engine.models.fused.parts import Reduce, Rope, add_norm


@dataclass(frozen=True, slots=True)
class Wiring:
    """Which child of a decoder layer stands where; "" where there is none.

    One after the other: h = x + scale * post_attention(attention(pre_attention(x))), then the same with the MLP on h.
    Parallel: x + scale * (attention(pre_attention(x)) + mlp(pre_mlp(x))); without `pre_mlp`, both read one norm.
    """

    attention: str
    mlp: str
    pre_attention: str = ""
    post_attention: str = ""
    pre_mlp: str = ""
    post_mlp: str = ""
    parallel: bool = False
    scale: float = 1.0


class FusedLayer(nn.Module):
    """Same call and result as the layer it replaces, whose children it keeps, under their names.

    `reduce` is applied to what attention and MLP return, before anything is added: where weights are one rank's slices,
    it sums the ranks' parts.
    """

    def __init__(self, original: nn.Module, wiring: Wiring, returns_tuple: bool) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        attention = self.get_submodule(wiring.attention)
        assert isinstance(attention, FusedAttention)
        self.wiring = wiring
        self.returns_tuple = returns_tuple
        self.reduce: Reduce | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        *_: object,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        slipstream: ForwardContext | None = None,
        **__: object,
    ) -> torch.Tensor | tuple[torch.Tensor]:
        """hidden_states [1, T, width] -> the same shape."""
        attention = self._modules[self.wiring.attention]
        assert isinstance(attention, FusedAttention)
        slipstream = attention.context(slipstream)
        stream, update = self.run(hidden_states[0], None, attention.rope(position_embeddings), slipstream)
        out = update.add_(stream).unsqueeze(0)
        return (out,) if self.returns_tuple else out

    def run(
        self,
        stream: torch.Tensor,
        update: torch.Tensor | None,
        rope: Rope,
        context: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer on stream + update [T, width]: its own stream and update; only of `rows`, if any are given.

        `stream` is left as it is, `update` is used up.
        """
        wiring, parts = self.wiring, self._modules
        normed, stream = add_norm(parts.get(wiring.pre_attention), stream, update)
        attention = parts[wiring.attention]
        attended: torch.Tensor = attention.run(normed, rope, context, rows)  # type: ignore[union-attr, operator]
        if wiring.parallel:
            if wiring.pre_mlp:
                normed, _ = add_norm(parts[wiring.pre_mlp], stream, None)
            if rows is not None:
                normed, stream = normed.index_select(0, rows), stream.index_select(0, rows)
            return stream, self._finished(attended.add_(_run_mlp(parts[wiring.mlp], normed)), "")
        if rows is not None:
            stream = stream.index_select(0, rows)
        attended = self._finished(attended, wiring.post_attention)
        normed, stream = add_norm(parts.get(wiring.pre_mlp), stream, attended)
        return stream, self._finished(_run_mlp(parts[wiring.mlp], normed), wiring.post_mlp)

    def _finished(self, update: torch.Tensor, norm: str) -> torch.Tensor:
        """A block's output, ready to be added."""
        if self.reduce is not None:
            update = self.reduce(update)
        if norm:
            update, _ = add_norm(self._modules[norm], update, None)
        return update if self.wiring.scale == 1.0 else update * self.wiring.scale


def _run_mlp(mlp: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    """x [T, width] -> [T, width] through a fused MLP, or through any module that takes [1, T, width]."""
    if type(mlp) is FusedMLP:
        return mlp.run(x)
    assert mlp is not None
    out = mlp(x.unsqueeze(0))
    return (out[0] if isinstance(out, tuple) else out).view(x.shape)
