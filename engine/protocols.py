"""The contracts between the parts: who calls, when, and what may change. Torch appears only as a type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    `submit` or `result` means the whole step failed; EngineDead, that every other one will too. After `close` nothing
    else is called.
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

    def check_block_size(self, block_size: int) -> None:
        """Raises ConfigError for blocks of a size, in tokens, that it can't read."""
        ...

    def prepare(self, batch: DeviceBatch) -> StepAttention:
        """Index work that all layers share; called once per step."""
        ...


# ---- drafting and verifying ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Delta:
    """Every drafted token was chosen, not drawn: its proposal law is 1 at that token."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """Drafted tokens were drawn from `probs` [n, k, vocabulary] float32."""

    probs: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """The draft's own probability of each drafted token, [n, k] float32."""

    probs: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The draft's own distribution at each drafted position, [n, k, vocabulary] float32."""

    probs: torch.Tensor


@dataclass(frozen=True, slots=True)
class DraftAsk:
    """Draft at most `limit` tokens, possibly none, to follow the committed ones of a request."""

    request_id: str
    limit: int


@dataclass(frozen=True, slots=True, eq=False)
class DraftProposal:
    """Drafts for the n requests asked about, in their order.

    `tokens` [n, k] int64: each row holds lengths[i] tokens, then -1. `parents` [n, k] gives a tree: the index of each
    token's parent in its row, -1 for the last committed token; None is a chain. `law` is what the tokens were really
    drawn from; `marginal` what the draft model thought of them, however they were chosen, where it says.
    """

    tokens: torch.Tensor
    lengths: tuple[int, ...]
    law: Delta | Dense = Delta()
    marginal: Scalar | Rows | None = None
    hidden: torch.Tensor | None = None  # [n, k, width]: the draft's last hidden states, for verifiers with a head
    parents: torch.Tensor | None = None


class Drafter(Protocol):
    """Proposes tokens. Holds state of its requests, keyed by id, from `admit` to `drop`.

    All requests are admitted, those that nothing is drafted for too, and hear of every committed token.
    """

    def admit(self, request_id: str, tokens: Sequence[int]) -> None:
        """A request starts, or starts again, with these committed tokens."""
        ...

    def drop(self, request_id: str) -> None: ...

    def commit(self, request_id: str, tokens: Sequence[int]) -> None:
        """These tokens follow the committed ones."""
        ...

    def propose(self, asks: Sequence[DraftAsk]) -> DraftProposal: ...


@dataclass(frozen=True, slots=True, eq=False)
class TargetRows:
    """What the target says of n drafts of at most k tokens: row j of a draft follows its first j tokens.

    `draws` [n, k + 1] int64 is the target's own token at each row, from the draw that plain decoding would make there;
    -1 where the row has no draft before it, or where nothing can be drawn (its logits are no numbers, or every token is
    banned). `log_probs` [n, k + 1, vocabulary] float32, the laws of these draws, is filled for verifiers that need it.
    """

    draws: torch.Tensor
    log_probs: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """`accepted` [n] int64: how many drafted tokens stand. `next_token` [n] int64 follows them; -1 if there is none.

    `path` [n, k] int64 holds the indices of the accepted tokens in their row, then -1; for a chain 0, 1, 2, ...
    """

    accepted: torch.Tensor
    path: torch.Tensor
    next_token: torch.Tensor
    bias: torch.Tensor | None = None  # [n] float32: estimated distance from the target's law; None: lossless


class Verifier(Protocol):
    """Says which drafted tokens stand. Pure: all randomness comes in with `target`."""

    @property
    def lossless(self) -> bool: ...

    @property
    def needs_laws(self) -> bool:
        """Does `verify` read `TargetRows.log_probs`?"""
        ...

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict: ...


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
