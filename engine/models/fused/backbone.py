"""The loop over all decoder layers, without the model's own forward around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from engine.models.context import ForwardContext, Taps
from engine.models.fused.attention import RopeForm
from engine.models.fused.layer import FusedLayer
from engine.models.fused.parts import NO_ROPE, Rope, add_norm

MAX_TABLE_BYTES = 64 * 2**20


class BackboneProgram(Protocol):
    """Does a backbone's work in one call; `models.program.Program` does."""

    def hidden(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        context: ForwardContext,
        taps: Taps | None,
    ) -> torch.Tensor:
        """ids, positions [T] -> the last hidden states of `rows`, [len(rows), width]."""
        ...


class RopeSource:
    """cos and sin of positions, as one way of laying them out needs them.

    `compute` is the model's own rotary embedding: positions [1, T] -> cos, sin [1, T, n]. Where it is a pure function
    of each position, as most are, its values are looked up in a table.
    """

    def __init__(self, compute: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], form: RopeForm) -> None:
        self.compute = compute
        self.form = form
        self.cos: torch.Tensor | None = None
        self.sin: torch.Tensor | None = None

    def tabulate(self, length: int, device: torch.device) -> bool:
        """Make the table for positions below `length`, if it would be right and not too large."""
        last = torch.tensor([[length - 1]], device=device)
        mixed = torch.tensor([[length - 1, 0, length // 2, 1]], device=device)
        row = self._spread(last)[0]
        if 2 * length * row.nbytes > MAX_TABLE_BYTES:
            return False
        cos, sin = self._spread(torch.arange(length, device=device)[None])
        for positions in (last, mixed, mixed[:, 1:], mixed[:, 3:]):
            alone = self._spread(positions)
            if not torch.equal(alone[0], cos[positions[0]]) or not torch.equal(alone[1], sin[positions[0]]):
                return False
        self.cos, self.sin = cos, sin
        return True

    def __call__(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids [1, T] -> cos, sin [T, r]."""
        if self.cos is None or self.sin is None:
            return self._spread(position_ids)
        return self.cos.index_select(0, position_ids[0]), self.sin.index_select(0, position_ids[0])

    def _spread(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.compute(position_ids)
        return self.form.spread(cos[0]), self.form.spread(sin[0])


class FusedBackbone(nn.Module):
    """Embedding, layers and final norm: the model inside a causal LM. It keeps its children, under their names.

    `rope_of[i]` is the index of layer i's RopeSource, -1 where it does not rotate. `positions` names the embedding of
    absolute positions, if there is one.
    """

    def __init__(
        self, original: nn.Module, layers: str, embedding: str, norm: str, positions: str, scale: float
    ) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.layer_list, self.embedding, self.norm_name, self.positions = layers, embedding, norm, positions
        self.embedding_scale = scale
        self.sources: list[RopeSource] = []
        self.rope_of: list[int] = []
        self.output_type: Callable[..., object] = type(None)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        slipstream: ForwardContext,
        rows: torch.Tensor | None = None,
        taps: Taps | None = None,
        program: BackboneProgram | None = None,
        **others: object,
    ) -> object:
        """input_ids, position_ids [1, T] -> last_hidden_state [1, T, width], or [1, len(rows), width].

        With a `program`, which needs rows, that computes it.
        """
        asked = [name for name, value in others.items() if value is not None and value is not False]
        if asked:
            raise TypeError(f"a fused model was asked for {', '.join(asked)}, which it can't give")
        if program is not None and rows is not None:
            hidden = program.hidden(input_ids[0], position_ids[0], rows, slipstream, taps)
            return self.output_type(last_hidden_state=hidden.unsqueeze(0))
        stream = self.embed(input_ids, position_ids)
        ropes: Sequence[Rope] = [source(position_ids) for source in self.sources] + [NO_ROPE]
        stream, update = self._layers(stream, ropes, slipstream, rows, taps)
        hidden, _ = add_norm(self._modules[self.norm_name], stream, update)
        return self.output_type(last_hidden_state=hidden.unsqueeze(0))

    def embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """input_ids, position_ids [1, T] -> what goes into the first layer, [T, width]."""
        parts = self._modules
        stream: torch.Tensor = parts[self.embedding](input_ids)[0]  # type: ignore[misc]  # never None
        if self.embedding_scale != 1.0:
            stream = stream * self.embedding_scale
        if self.positions:
            stream = stream + parts[self.positions](position_ids)[0]  # type: ignore[misc]
        return stream

    def _layers(
        self,
        stream: torch.Tensor,
        ropes: Sequence[Rope],
        context: ForwardContext,
        rows: torch.Tensor | None,
        taps: Taps | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layers: list[FusedLayer] = list(self._modules[self.layer_list]._modules.values())  # type: ignore[union-attr, arg-type]
        tapped = frozenset() if taps is None else taps.layers
        # Hooks and taps see whole hidden states: the update is added before, and all rows are there.
        whole = len(layers) - 1 in tapped
        update: torch.Tensor | None = None
        for index, layer in enumerate(layers):
            rope = ropes[self.rope_of[index]]
            if layer._forward_hooks or layer._forward_pre_hooks:
                before = stream if update is None else update.add_(stream)
                out = layer(before.unsqueeze(0), position_embeddings=rope, slipstream=context)
                stream, update = (out[0] if isinstance(out, tuple) else out)[0], None
                whole = whole or index == len(layers) - 1
            else:
                last = index == len(layers) - 1 and not whole
                stream, update = layer.run(stream, update, rope, context, rows if last else None)
            if index in tapped and taps is not None:
                stream, update = (stream if update is None else update.add_(stream)), None
                taps.states[index] = stream
        if whole and rows is not None:
            stream = stream.index_select(0, rows)
            update = None if update is None else update.index_select(0, rows)
        return stream, update
