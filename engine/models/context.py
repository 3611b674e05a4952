"""What a forward pass reads besides its inputs, handed down as an argument: no globals."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.protocols import StepAttention
from engine.runtime.kv_cache import LayerShape, PagedKVCache


class ForwardContext(Protocol):
    """The attention side of one forward pass. Layers call `attend` once each, in any order."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, heads, key_dim], key and value [T, kv_heads, key_dim / value_dim] -> [T, heads, value_dim]."""
        ...


class PagedContext:
    """Writes a step's keys and values into the pool, then attends over it."""

    def __init__(self, cache: PagedKVCache, attention: StepAttention, slots: torch.Tensor) -> None:
        self._layers = cache.layers
        self._attention = attention
        self._slots = slots

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        cache = self._layers[layer]
        cache.write(self._slots, key, value)
        return self._attention.attend(query, cache, scale=scale, window=window, softcap=softcap, sinks=sinks)


class ProbeContext:
    """Attends to nothing and notes what each layer would cache; finds the pool's shapes before there is a pool."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.calls = 0

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,  # noqa: ARG002  the contract's arguments, unused by a probe
        window: int | None = None,  # noqa: ARG002
        softcap: float | None = None,  # noqa: ARG002
        sinks: torch.Tensor | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        self.calls += 1
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
