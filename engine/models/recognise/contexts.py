"""Forward contexts that watch a model: one over the real pool, one without any."""

from __future__ import annotations

import torch

from engine.models.context import ForwardContext
from engine.models.recognise.trace import Attend, AttendOptions, Trace
from engine.runtime.kv_cache import LayerCache


class RecordingContext:
    """Passes calls on to another context and notes them in a trace."""

    def __init__(self, inner: ForwardContext, trace: Trace) -> None:
        self._inner = inner
        self._trace = trace

    @property
    def slots(self) -> torch.Tensor:
        return self._inner.slots

    def layer_cache(self, layer: int) -> LayerCache | None:
        return self._inner.layer_cache(layer)

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
        return self._inner.attend_written(layer, query, scale=scale, window=window, softcap=softcap, sinks=sinks)

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
        out = self._inner.attend(layer, query, key, value, scale=scale, window=window, softcap=softcap, sinks=sinks)
        if self._trace.running:
            options = AttendOptions(scale, window, softcap, sinks)
            call = Attend(layer, query, key, value, options, out)
            self._trace.attends.setdefault(self._trace.running[-1], []).append(call)
        return out


class ProbingContext:
    """Has no pool and attends to nothing: gives fixed numbers and keeps what it was asked.

    So a module's way to its queries, keys and values, and its way from the attended values, are compared without the
    attention between them, which would blur a difference or blow up rounding.
    """

    def __init__(self) -> None:
        self.seen: list[Attend] = []

    @property
    def slots(self) -> torch.Tensor:
        raise AssertionError("a context without a pool has no slots")

    def layer_cache(self, layer: int) -> LayerCache | None:  # noqa: ARG002
        return None

    def attend_written(self, *_: object, **__: object) -> torch.Tensor:
        raise AssertionError("a context without a pool was never written to")

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
        shape = (*query.shape[:2], value.shape[2])
        steps = torch.arange(shape[0] * shape[1] * shape[2], device=query.device, dtype=torch.float32)
        out = torch.sin(1.7 * steps).view(shape).to(query.dtype)
        options = AttendOptions(scale, window, softcap, sinks)
        self.seen.append(Attend(layer, query, key, value, options, out))
        return out
