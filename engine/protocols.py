"""The contracts between the parts: who calls, when, and what may change. Torch appears only as a type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from engine.diffusion import RuleCard
from engine.types import Capacity, DecodeTraits, EngineStats, Phase, Request, RequestSummary, StepOutput, StepPlan
from engine.verification import VerifierCard

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

    def prepare(self, request: Request) -> None:
        """Compile its grammar, if it has one. Any thread may call, beside all else. Raises InvalidRequest."""
        ...

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


@runtime_checkable
class LaunchingPipeline(Pipeline, Protocol):
    """One that may launch a step before the one before it has ended."""

    def submit(self, plan: StepPlan) -> StepHandle: ...


class PricedPipeline(Pipeline, Protocol):
    """One that weighs what its drafts cost."""

    def set_costs(
        self,
        step_costs: tuple[tuple[int, float], ...],
        draft_costs: tuple[tuple[int, float], ...] = (),
        tree_costs: tuple[tuple[int, float], ...] = (),
        /,
    ) -> None:
        """As in `Capacity`; `tree_costs`: (tokens fed, seconds) of passes over draft trees. Empty: nothing is cut."""
        ...


class Follower(Protocol):
    """Keeps an entry of its own for every slot of the target's KV pool: a draft's context, for example.

    It hears of every forward pass, so that no slot is ever without its entry: what a request finds in the prefix
    cache is whole, whoever computed it.
    """

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose outputs it reads; 0 is the first."""
        ...

    def write(self, states: tuple[torch.Tensor, ...], batch: DeviceBatch) -> None:
        """After a pass: the hidden states [T, width] of all its tokens after each of `taps`, in their order."""
        ...

    def compact(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """See `PagedKVCache.compact`: entries move with the target's."""
        ...


class ForwardRunner(Protocol):
    """One model over its KV pool, as pipelines see it. Holds no state of any request."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def block_size(self) -> int:
        """Of its pool, in slots."""
        ...

    def compact(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy slots `source` [k] to slots `target` [k] of the pool: the accepted path of a draft tree, in order."""
        ...

    def forward(
        self, inputs: Sequence[SeqInput], rows: Sequence[int], mode: AttentionMode = ..., block_length: int = 1
    ) -> torch.Tensor:
        """Feed all inputs in one pass; fp32 logits [len(rows), vocabulary] of the given rows of the packed tokens."""
        ...

    def forward_with_states(
        self,
        inputs: Sequence[SeqInput],
        rows: Sequence[int],
        mode: AttentionMode = ...,
        block_length: int = 1,
        *,
        read: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and what the output head made the logits of: [len(rows), width], after the final norm.

        With `read`, of these rows instead: [len(read), width].
        """
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
    """Drafted tokens were drawn from `probs` [n, k, vocabulary] float32.

    With `rows`, only the drafts of these indices were, and probs[i] is of draft rows[i]; all others were chosen. What
    verifiers get has none.
    """

    probs: torch.Tensor
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """The draft's own probability of each drafted token, [n, k] float32."""

    probs: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The draft's own distribution at each drafted position, [n, k, vocabulary] float32."""

    probs: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """The draft's best tokens at each of its positions, taken for themselves, best first (a tree is grown from them).

    `tokens` [n, k, width] int64, `log_probs` [n, k, width] float32.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor


@dataclass(frozen=True, slots=True)
class DraftAsk:
    """Draft at most `limit` tokens, possibly none, to follow the committed ones of a request.

    `position` is that of the last committed token, the anchor. `fed`: how many committed tokens the step feeds before
    the draft; where it is 1, the target has computed all before the anchor, in this request or in one that shares its
    blocks, so its hidden states were seen. `block_ids` covers the positions up to `position + limit`.
    `temperature` > 0 asks for the marginal of its tokens, at this temperature.
    """

    request_id: str
    limit: int
    position: int = 0
    fed: int = 1
    block_ids: tuple[int, ...] = ()
    temperature: float = 0.0


class DraftSampler(Protocol):
    """Draws drafted tokens with a request's own temperature and truncation; a function of request and position."""

    def draws(self, ask: int) -> bool:
        """Are the drafts of request asks[ask] drawn at all, and not just the likeliest tokens?"""
        ...

    def draw(
        self, logits: torch.Tensor, asks: Sequence[int], steps: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [rows] int64 and the laws they were drawn from, probabilities [rows, vocabulary] float32.

        Row i of `logits` [rows, vocabulary] float32 is drafted position steps[i] (0 is the first) of request asks[i].
        Requests that do not draw their drafts, greedy ones among them, get the most likely token and a one-hot law.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DraftProposal:
    """Drafts for the n requests asked about, in their order.

    `tokens` [n, k] int64: each row holds lengths[i] tokens, then -1. `parents` [n, k] gives a tree: the index of each
    token's parent in its row, parents first, -1 for the last committed token, and siblings differ; None is a chain, as
    all drafters give: pipelines grow trees from `options`.
    `law` is what the tokens were really drawn from; `marginal` what the draft model thought of them, however they were
    chosen: filled by drafters that can (`Drafter.scores`), for requests whose ask has a temperature.
    `margins` [n, k] float32 is anything that grows with the chance that a token stands, known before it is drawn: the
    distance of the two best logits, or a confidence head's logit.
    """

    tokens: torch.Tensor
    lengths: tuple[int, ...]
    law: Delta | Dense = Delta()
    marginal: Scalar | Rows | None = None
    hidden: torch.Tensor | None = None  # [n, k, width]: the draft's last hidden states, for verifiers with a head
    parents: torch.Tensor | None = None
    margins: torch.Tensor | None = None
    options: Options | None = None  # where they were asked for


class Drafter(Protocol):
    """Proposes tokens. Holds state of its requests, keyed by id, from `admit` to `drop`.

    All requests are admitted, those that nothing is drafted for too, and hear of every committed token.
    """

    @property
    def most(self) -> int:
        """Tokens of the longest draft that it offers, where nobody asks for another length."""
        ...

    @property
    def scores(self) -> bool:
        """Can it say what it thinks of its tokens (`marginal`)?"""
        ...

    def admit(self, request_id: str, tokens: Sequence[int]) -> None:
        """A request starts, or starts again, with these committed tokens."""
        ...

    def drop(self, request_id: str) -> None: ...

    def commit(self, request_id: str, tokens: Sequence[int]) -> None:
        """These tokens follow the committed ones."""
        ...

    def propose(self, asks: Sequence[DraftAsk], sampler: DraftSampler | None = None, width: int = 0) -> DraftProposal:
        """Tokens are the likeliest ones, unless there is a `sampler` that draws them (then `law` is Dense).

        `width` > 0 asks for that many `options`; drafters that have none to give leave them out.
        """
        ...


class BlockDraftModel(Protocol):
    """A block-diffusion draft network over a KV pool of its own, which shares the target's block ids.

    Also a `Follower` of the target: its context is written from the target's hidden states, for every slot.
    """

    @property
    def most(self) -> int:
        """Tokens that one pass drafts."""
        ...

    @property
    def sequential(self) -> bool:
        """Does a position's choice change the logits of the next (`refine`)?"""
        ...

    def blocks(self, anchors: Sequence[int], asks: Sequence[DraftAsk]) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass: logits [n, k, draft vocabulary] float32 and last hidden states [n, k, width].

        `anchors` are the token ids of the last committed tokens. k is the largest limit that was asked for, `most` at
        most: every block is drafted whole, but only positions that somebody wants are scored.
        """
        ...

    @property
    def block_length(self) -> int:
        """Tokens that a pass feeds for each sequence: the anchor, and what stands for the draft."""
        ...

    @property
    def scratch(self) -> tuple[int, int]:
        """Blocks of its pool that no sequence owns: the first one, and how many of them a block may take."""
        ...

    def blocks_of(self, batch: DeviceBatch, scored: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`blocks` of a batch of whole blocks, whose first ids are the anchors; the first `scored` tokens of each."""
        ...

    def refine(self, logits: torch.Tensor, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Logits [n, draft vocabulary] of one position given the tokens [n] before it (ids of the target)."""
        ...

    def confidence(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor | None:
        """Logits [n] of a trained confidence head for one position, where there is one."""
        ...

    def target_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Draft vocabulary -> target vocabulary, any shape int64."""
        ...

    def widen(self, logits: torch.Tensor) -> torch.Tensor:
        """[..., draft vocabulary] -> [..., target vocabulary], -inf where the draft has no such token."""
        ...


class DraftChain(Protocol):
    """Drafts under way, one token a pass; made by `ChainDraftModel.start`."""

    def advance(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Feed the next token [m] of the first m chains (m never grows; the anchors come first; ids of the target).

        Logits [m, draft vocabulary] float32 of what follows them, and last hidden states [m, width].
        """
        ...


class ChainDraftModel(Protocol):
    """An autoregressive draft network over a KV pool of its own, which shares the target's block ids. A `Follower`."""

    @property
    def most(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def start(self, asks: Sequence[DraftAsk]) -> DraftChain:
        """Begin chains at the anchors of requests whose limits fall, all at positions > 0, none with fed > 1."""
        ...

    def target_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """As `BlockDraftModel.target_ids`, and so is `widen`."""
        ...

    def widen(self, logits: torch.Tensor) -> torch.Tensor: ...


class Chance(Protocol):
    """The coins of one verification: functions of request and position, in streams that share no number."""

    def uniforms(self) -> torch.Tensor:
        """[n, k] float64 in (0, 1): one coin for each drafted position."""
        ...

    def draw(self, log_weights: torch.Tensor, drafts: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """A token [m] int64 from each of m laws, to replace token steps[i] of draft drafts[i].

        `log_weights` [m, vocabulary] float64 need not be normalised; `drafts` and `steps` [m] int64.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TargetRows:
    """What the target says of n drafts of at most k tokens: row 0 of a draft follows the last committed token.

    Row j + 1 follows drafted token j and all that it follows: for a chain, the first j + 1 tokens.
    `draws` [n, k + 1] int64 is the target's own token at each row, from the draw that plain decoding would make there;
    -1 where the row has no draft before it, or where nothing can be drawn (its logits are no numbers, or every token is
    banned). `log_probs` [n, k + 1, vocabulary] float32, the laws of these draws, and `chance` are filled for verifiers
    that need laws; NaN in rows where nothing can be drawn, -inf for tokens that the request may not get.

    For verifiers that are not lossless: `knobs` are their settings, [n] float64 each. `greedy` [n] bool are requests
    that draw nothing: their `log_probs` are those of temperature 1, without truncation, and a verifier commits the
    likeliest token of its own law in place of a drawn one. `free` [n, k] bool says at which drafted tokens the
    verifier may leave the target's law at all; None is everywhere. `states` [n, k + 1, width]: what the target's
    output head read, for verifiers that need it.
    """

    draws: torch.Tensor
    log_probs: torch.Tensor | None = None
    chance: Chance | None = None
    knobs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    greedy: torch.Tensor | None = None
    free: torch.Tensor | None = None
    states: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """`accepted` [n] int64: how many drafted tokens stand. `next_token` [n] int64 follows them; -1 if there is none.

    `path` [n, k] int64 holds the indices of the accepted tokens in their row, in order, then -1; of a chain 0, 1, ...
    """

    accepted: torch.Tensor
    path: torch.Tensor
    next_token: torch.Tensor
    # [n, k] float32: how far the law of the token at each drafted position is from the target's law there, in total
    # variation; counts where the token is reached. None: lossless.
    bias: torch.Tensor | None = None


class VerifierHead(Protocol):
    """Says at each drafted position how much of the target its law keeps. Trained for one target and one draft."""

    def weights(self, hidden: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """[n, k] float32 in (0, 1) from `DraftProposal.hidden` and, of the same positions, `TargetRows.states`."""
        ...


class Verifier(Protocol):
    """Says which drafted tokens stand. Pure: all randomness comes in with `target`."""

    @property
    def card(self) -> VerifierCard: ...

    @property
    def needs_laws(self) -> bool:
        """Does `verify` read `TargetRows.log_probs` and `chance`?"""
        ...

    @property
    def needs_marginal(self) -> bool:
        """Does it read `DraftProposal.marginal` of tokens that were chosen?"""
        ...

    @property
    def needs_states(self) -> bool:
        """Does it read `DraftProposal.hidden` and `TargetRows.states`?"""
        ...

    @property
    def trees(self) -> bool:
        """Can it verify trees?"""
        ...

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        """All drafts of one call have one law: Dense where they were drawn, Delta where they were chosen."""
        ...


class PathVerifier(Verifier, Protocol):
    """One that needs only the target's own tokens: it can say on the host, draft by draft, what `verify` says."""

    def path(self, drafts: Sequence[int], parents: Sequence[int] | None, draws: Sequence[int]) -> list[int]:
        """Which tokens of a draft stand, in order; `parents` as in `DraftProposal`, of this draft alone.

        draws[0] is the target's token after the last committed one, draws[j + 1] that after drafted token j; -1: none.
        """
        ...


# ---- denoising -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """The open blocks of n requests, m positions each (padded): what a rule chooses from.

    `confidence` [n, m] float64 is the rule's `measure` of each position's token, higher is surer; -inf where there is
    no candidate. `candidates` [n, m] bool: still masked, and open to this step. `quota` [n] int64: how many the
    request's schedule asks for, at least 1. `knobs`: the rule's, [n] float64 each.
    """

    confidence: torch.Tensor
    candidates: torch.Tensor
    quota: torch.Tensor
    knobs: Mapping[str, torch.Tensor] = field(default_factory=dict)


class UnmaskRule(Protocol):
    """Says which masked positions are committed. Pure; a row depends on nothing but itself."""

    @property
    def card(self) -> RuleCard: ...

    def choose(self, profile: Profile) -> torch.Tensor:
        """[n, m] bool, candidates only; at least one in each row that has any. Ties go to the lowest position."""
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
