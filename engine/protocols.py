"""The contracts between the parts: who calls, when, and what may change. Torch appears only as a type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.types import Capacity, DecodeTraits, EngineStats, Phase, RequestSummary, StepOutput, StepPlan

if TYPE_CHECKING:
    import torch

    from engine.config import EngineConfig
    from engine.runtime.batch import AttentionMode, DeviceBatch, SeqInput
    from engine.runtime.kv_cache import LayerCache


class StepHandle(Protocol):
    """A step on its way. `result` blocks until it is done and may be called once."""

    def result(self) -> StepOutput: ...


class Worker(Protocol):
    """The device side of one engine. Called by EngineCore alone, from one thread.

    `submit` must take plans in order and may run behind; results come in the same order. An exception from
    `submit` or `result` means the whole step failed. After `close` nothing else is called.
    """

    def capacity(self) -> Capacity: ...

    def submit(self, plan: StepPlan) -> StepHandle: ...

    def num_states(self) -> int:
        """Requests that hold device state; 0 after a drain, or there is a leak."""
        ...

    def close(self) -> None: ...


class WorkerFactory(Protocol):
    """A worker class. `on_phase` is told of each phase of loading as it ends. Raises ModelLoadError."""

    def __call__(self, config: EngineConfig, folder: Path, on_phase: Callable[[Phase], None], /) -> Worker: ...


class Pipeline(Protocol):
    """One decoding style. Owns the device state of its requests, keyed by id, from `admitted` to `dropped`."""

    @property
    def traits(self) -> DecodeTraits: ...

    def execute(self, plan: StepPlan) -> StepOutput: ...

    def num_states(self) -> int: ...


class ForwardRunner(Protocol):
    """One model over its KV pool, as pipelines see it. Holds no state of any request."""

    @property
    def vocab_size(self) -> int: ...

    def forward(
        self, inputs: Sequence[SeqInput], rows: Sequence[int], mode: AttentionMode = ..., block_length: int = 1
    ) -> torch.Tensor:
        """Feed all inputs in one pass; fp32 logits [len(rows), vocabulary] of the given rows of the packed tokens."""
        ...


class StepAttention(Protocol):
    """Attention of one prepared step; `attend` is called once per layer, which may have windows of its own.

    Queries are packed: [tokens, heads, key_dim]; the layer's pool already holds the step's own keys and values.
    The result is [tokens, heads, value_dim] in the dtype of the query. `window`: keys at distance < window are
    visible; `softcap` c bounds scores by c * tanh(s / c); `sinks` [heads] adds one valueless key's logit per head.
    """

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class AttentionBackend(Protocol):
    """A way to attend over the paged pool: one file in `engine/attention` and one line in the registry."""

    def prepare(self, batch: DeviceBatch) -> StepAttention:
        """Index work that all layers share; called once per step."""
        ...


class EngineObserver(Protocol):
    """Told of what happens in the front process, on its event loop; must be quick and must not raise."""

    def on_step(self, stats: EngineStats) -> None:
        """After each engine step's report arrived."""
        ...

    def on_tokens(self, count: int, first: bool, interval: float) -> None:
        """`count` tokens of one request arrived `interval` seconds after its previous ones (or its arrival)."""
        ...

    def on_finish(self, summary: RequestSummary) -> None: ...

    def on_rejected(self, reason: str) -> None:
        """A request was refused because of load; reason is max_num_queued_reqs or max_num_queued_tokens."""
        ...
