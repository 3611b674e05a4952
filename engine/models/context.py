"""What a forward pass reads besides its inputs, handed down as an argument: no globals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.protocols import StepAttention
from engine.runtime.kv_cache import LayerCache, LayerShape, PagedKVCache


class Taps:
    """Asks a forward pass for the hidden states after some of its layers (0 is the first layer's output).

    After the pass, `states` holds [T, width] for each of `layers`, in the model's dtype, before the final norm.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = frozenset(layers)
        self.states: dict[int, torch.Tensor] = {}


class ForwardContext(Protocol):
    """The attention side of one forward pass. Every layer attends once, in any order.

    `attend` is all that most layers need. A layer that writes its own keys and values does so into the rows `slots` [T]
    (int64) of `layer_cache`, then calls `attend_written`; where there is no pool, `layer_cache` is None.
    """

    @property
    def slots(self) -> torch.Tensor: ...

    def layer_cache(self, layer: int) -> LayerCache | None: ...

    def attend_written(
        self,
        layer: int,
        query: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `attend`, over keys and values that are in the pool already."""
        ...

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


@dataclass(slots=True)
class ContextSlot:
    """The context of the pass under way, for layers that do not hand keyword arguments on to their attention."""

    context: ForwardContext | None = None


class PagedContext:
    """Writes a step's keys and values into the pool, then attends over it."""

    def __init__(self, cache: PagedKVCache, attention: StepAttention, slots: torch.Tensor) -> None:
        self.cache = cache
        self.attention = attention
        self.slots = slots
        self._layers = cache.layers

    def layer_cache(self, layer: int) -> LayerCache:
        return self._layers[layer]

    def attend_written(
        self,
        layer: int,
        query: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        cache = self._layers[layer]
        return self.attention.attend(query, cache, scale=scale, window=window, softcap=softcap, sinks=sinks)

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
        cache.write(self.slots, key, value)
        return self.attention.attend(query, cache, scale=scale, window=window, softcap=softcap, sinks=sinks)


class ProbeContext:
    """Attends to nothing and notes what each layer would cache; finds the pool's shapes before there is a pool."""

    def __init__(self) -> None:
        self.called: list[int] = []  # layers in the order of their calls
        self.shapes: dict[int, LayerShape] = {}
        self.windows: dict[int, int | None] = {}

    @property
    def slots(self) -> torch.Tensor:
        raise AssertionError("a probe has no pool, so no slots")

    def layer_cache(self, layer: int) -> None:  # noqa: ARG002
        return None

    def attend_written(self, *_: object, **__: object) -> torch.Tensor:
        raise AssertionError("a probe has no pool, so nothing was written")

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,  # noqa: ARG002  the contract's arguments, unused by a probe
        window: int | None = None,
        softcap: float | None = None,  # noqa: ARG002
        sinks: torch.Tensor | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        self.called.append(layer)
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        self.windows[layer] = window
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
