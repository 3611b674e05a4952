"""The data every part of Slipstream passes through. Standard library only.

Lengths and positions are in tokens, times in seconds of `time.monotonic()` (one clock for all processes of a
machine), token ids are plain ints. Frozen types cross process borders as msgpack (see `cluster/channel.py`),
so they hold only ints, floats, strings, booleans, None, tuples and other such types. Those that every step makes anew
are frozen as records are (`engine/records.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from engine.diffusion import (
    CanvasNews,
    CanvasStep,
    DiffusionInfo,
    DiffusionParams,
    DiffusionReport,
    DiffusionSpec,
    RuleCard,
)
from engine.grammar import Grammar
from engine.reading import Reading, Readout
from engine.records import record
from engine.thinking import ThinkingBudget
from engine.verification import VerifierCard


class FinishReason(StrEnum):
    """Why a sequence ended. STOP: end-of-sequence, stop id or stop string. LENGTH: max_tokens or context."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


# ---- what a client asks for ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens and when to stop. Written by `server/convert.py` or the offline `LLM`.

    Order of operations on a row of logits: allowed ids, grammar and bans, logit_bias, repetition / presence / frequency
    penalties, temperature, then min_p, top_k and top_p on the tempered distribution. `temperature` 0 is greedy
    (lowest id on ties).
    Log-probabilities that are reported are those of the raw logits, before any of this.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # int64; a client's missing seed is drawn once by the front process
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not appear
    logprobs: int | None = None  # alternatives to report beside the chosen token; 0 is "the chosen one only"
    logprob_token_ids: tuple[int, ...] = ()  # the alternatives to report in place of the best ones, with `logprobs`
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    shown_token_ids: tuple[int, ...] = ()  # special tokens that are text all the same, as those around a tool call
    thinking: ThinkingBudget | None = None
    stop_regex: tuple[str, ...] = ()  # patterns that end an answer as stop strings do, see `tokenizer.stop_regex`
    # An answer that ends in the same min to max tokens, count times in a row, is over: (min, max, count).
    repetition: tuple[int, int, int] | None = None

    @property
    def alternatives(self) -> int | tuple[int, ...] | None:
        """What to report beside each token: so many of the likeliest, or these ids; None: no log-probability at all."""
        return self.logprob_token_ids or self.logprobs if self.logprobs is not None else None


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """How a request wants to be drafted for. Under a lossless verifier none of it changes the law of the answer."""

    enabled: bool = True  # where the model is served with a drafter
    max_draft: int | None = None  # most drafted tokens of one round; None: the server's
    report: bool = False  # put a SpeculationReport into the answer
    trace: bool = False  # tell of each token where it came from (TokenEvent.origins)
    verifier: str = ""  # empty: the server's; `validate` puts its name here, and all of its knobs below
    knobs: tuple[tuple[str, float], ...] = ()  # of the verifier, by their names
    sample: bool | None = None  # draw the drafts, where the verifier weighs laws; None: the server's
    thinking_only: bool = False  # be lossless outside the thinking span
    thinking: tuple[int, int] | None = None  # the tokens around that span; filled by `validate` from the model's
    bias_bound: float = 0.0  # most that a token's law may move, in total variation; filled by `validate`

    def bound(self, most: int) -> int:
        """Most tokens to draft for this request where the pipeline drafts at most `most`."""
        if not self.enabled:
            return 0
        return most if self.max_draft is None else min(most, self.max_draft)


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. A client's `n` choices are n requests of one `group` that differ in `choice`."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_ids: tuple[int, ...] = ()  # filled by async_engine from the model; empty under ignore_eos
    choice: int = 0
    group: str = ""  # followers (choice > 0) wait until the leader's prompt is computed, then share its blocks
    priority: int = 0  # lower runs first, as in vLLM
    cache_salt: str = ""  # requests share cached prefixes only under the same salt
    arrival: float = 0.0
    speculation: SpeculationParams = SpeculationParams()
    diffusion: DiffusionParams = field(default_factory=DiffusionParams)
    reading: Reading | None = None  # it reads the model and writes nothing; `sampling` says nothing then


# ---- what the scheduler keeps and plans ------------------------------------------------------------------


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Survival:
    """How a sequence's drafts fared lately: fading counts of drafted tokens that stood, and of rounds cut short."""

    stood: float = 0.0
    fell: float = 0.0
    belief: float = 1.0  # weight that is left of what was believed before its first round
    resting: int = 0  # steps since it was last drafted for
    patience: int = 32  # so many steps without a draft end in a short one, to see whether times have changed


@record
class Passes:
    """What denoising took. `forwards` are of the served model; `verifies` are among them."""

    forwards: int = 0
    draft_forwards: int = 0  # of a drafter that is a model of its own
    verifies: int = 0
    remasked: int = 0  # tokens that verifying took back
    positions: int = 0  # fed, of all passes
    draft_positions: int = 0  # of them, by `draft_forwards`

    def plus(self, other: Passes) -> Passes:
        return Passes(
            self.forwards + other.forwards,
            self.draft_forwards + other.draft_forwards,
            self.verifies + other.verifies,
            self.remasked + other.remasked,
            self.positions + other.positions,
            self.draft_positions + other.draft_positions,
        )


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way. Only the Scheduler changes it.

    `num_tokens` counts committed tokens (prompt and output); `num_computed` counts the leading positions
    whose KV is final; `num_reserved` is the upper bound of positions that steps in flight may have written
    (`num_computed` when none is). A preempted sequence is WAITING from then on, and keeps its blocks until
    its last step in flight has ended.
    """

    request: Request
    output_ids: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0
    num_reserved: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_table: tuple[int, ...] = ()  # block_ids as plans carry them; made anew only when they change
    digests: list[bytes] = field(default_factory=list)  # of the leading full blocks, as far as they were needed
    num_published: int = 0  # leading blocks that are done with for the prefix cache
    in_flight: list[ScheduledSeq] = field(default_factory=list)  # its shares of the steps in flight, oldest first
    limit: int = 0  # most tokens it may ever have: max_tokens, the context and the pool together
    stop_ids: frozenset[int] = frozenset()  # end-of-sequence and the client's stop ids
    rank: tuple[int, float, int] = (0, 0.0, 0)  # priority, arrival, order of coming: lower runs first
    survival: Survival = field(default_factory=Survival)
    num_scored: int = 0  # prompt positions whose log-probabilities have been delivered
    cached_tokens: int = 0
    scheduled_at: float = 0.0
    preemptions: int = 0
    passes: Passes = field(default_factory=Passes)  # of all its steps so far, where it is denoised

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def remaining(self) -> int:
        return self.request.sampling.max_tokens - len(self.output_ids)

    def ids(self, start: int, end: int) -> tuple[int, ...]:
        """Committed tokens at positions start .. end - 1; costs their number, not the length of the prompt."""
        prompt = self.request.prompt_ids
        size = len(prompt)
        if start >= size:
            return tuple(self.output_ids[start - size : end - size])
        if end <= size:
            return prompt[start:end]
        return prompt[start:] + tuple(self.output_ids[: end - size])


@dataclass(frozen=True, slots=True)
class DecodeTraits:
    """What the scheduler must know of a loaded pipeline, and nothing else."""

    lookahead: int = 0  # positions past the last committed token that one step may write
    chunkable: bool = True  # may a prompt be computed over several steps
    prefix_cacheable: bool = True  # is a full block's KV a pure function of the tokens up to its end
    drafts: bool = False  # lookahead positions hold drafts: fewer of them, or none, are allowed
    depth: int = 0  # of drafts: most of them that one round may commit, fewer than `lookahead` where they are trees
    # Tokens come from denoising: a step that reaches the end of the committed tokens covers positions up to
    # `scheduling.spans.reach`, all of them or none, and what a sequence feeds next depends on its result.
    denoises: bool = False
    unit: int = (
        1  # positions whose KV becomes final together, counted from 0: chunks and shared prefixes end at multiples
    )
    canvas: bool = False  # a sequence whose `num_computed` is 0 runs its whole canvas, prompt and all, in one step

    @property
    def max_draft(self) -> int:
        """Most drafted tokens that may stand in one round."""
        return (self.depth or self.lookahead) if self.drafts else 0


@record
class Admission:
    """Everything a pipeline needs to hold device state for a request; sent when it starts or starts again."""

    request: Request
    output_ids: tuple[int, ...]


@record
class ScheduledSeq:
    """One sequence's share of a step.

    Feed `tokens` at positions start, start+1, ...; then up to `lookahead` positions more may be written.
    `block_ids` covers all of them. When `pending` is true a step in flight is about to commit tokens that the
    scheduler has not seen: `tokens` is empty, `start` an upper bound, and the pipeline feeds the committed
    tokens that it knows and has not computed.
    """

    request_id: str
    start: int
    tokens: tuple[int, ...]
    lookahead: int
    block_ids: tuple[int, ...]
    pending: bool = False


@record
class StepPlan:
    """`dropped` ids lose their device state first, then `admitted` gain it, then `items` run."""

    step: int
    items: tuple[ScheduledSeq, ...]
    admitted: tuple[Admission, ...] = ()
    dropped: tuple[str, ...] = ()


# ---- what a step gives back ------------------------------------------------------------------------------


@record
class TokenLogprob:
    """Log-probability of one token under the raw distribution; `top` holds the best alternatives, best first."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top: tuple[tuple[int, float], ...] = ()


@record
class SeqResult:
    """What a step did for one sequence. `num_computed`: positions whose KV is final and committed.

    `prompt_logprobs` covers the prompt positions whose successor this step scored (token i+1 at position i).
    `error` ends the request: the step's tokens for it are void and its blocks must not be published.
    """

    request_id: str
    new_tokens: tuple[int, ...]
    num_computed: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    drafted: int = 0
    accepted: int = 0
    # Of drafted tokens that were not verified: how many would have stood, on average, and the chance that one fell.
    foreseen: tuple[float, float] = (0.0, 0.0)
    # How far the law of each new token was from the target's (total variation, given what stands before it, averaged
    # over the draws of its round); empty: not at all.
    bias: tuple[float, ...] = ()
    nfe: int = 1  # forward passes of the target spent
    passes: Passes | None = None  # of this step, where it denoises
    error: str | None = None
    leaf: bool = False  # of a draft tree: nothing was drafted to follow the accepted tokens
    canvas: CanvasStep | None = None  # what the step changed, where the request asks for it
    reading: Readout | None = None  # of a request that reads, when its prompt is computed


@record
class StepOutput:
    step: int
    results: tuple[SeqResult, ...]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a loaded worker can hold; the scheduler is built from it."""

    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    traits: DecodeTraits
    # (tokens fed, seconds) of measured decode steps, rising; what drafts cost. Empty: not measured, drafts are free.
    step_costs: tuple[tuple[int, float], ...] = ()
    numerics: str = ""  # device, number types, packing, attention: what the last digits of a logit depend on
    # (requests drafted for, seconds) of measured draft passes, rising. Empty: drafting costs no time, or none is known.
    draft_costs: tuple[tuple[int, float], ...] = ()
    verifiers: tuple[VerifierCard, ...] = ()  # that requests may choose from; none where nothing is drafted
    diffusion: DiffusionSpec | None = None  # of models that denoise
    rules: tuple[RuleCard, ...] = ()  # that their requests may choose from
    max_canvas: int = 0  # tokens of prompt and canvas together that a step may feed; 0: no canvases


class CostTable:
    """Seconds by a count of tokens or requests: measured points, straight lines between and beyond them."""

    def __init__(self, points: tuple[tuple[int, float], ...]) -> None:
        self._counts = [count for count, _ in points]
        self._points = [seconds for _, seconds in points]
        self._seconds: list[float] = []

    def __bool__(self) -> bool:
        return len(self._counts) > 1

    def seconds(self, count: int) -> float:
        right = min(max(bisect_left(self._counts, count), 1), len(self._counts) - 1)
        (x0, x1), (y0, y1) = self._counts[right - 1 : right + 1], self._points[right - 1 : right + 1]
        return y0 + (y1 - y0) * (count - x0) / (x1 - x0)

    def upto(self, count: int) -> list[float]:
        """Seconds of 0, 1, 2, ... `count` or more, by index; made once."""
        while len(self._seconds) <= count:
            self._seconds.append(self.seconds(len(self._seconds)))
        return self._seconds


# ---- what leaves the engine process ----------------------------------------------------------------------


@record
class SeqUpdate:
    """News of one request after a step; the last one carries `finish`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish: FinishReason | None = None
    stop_token_id: int | None = None  # the client's stop id that matched; None for end-of-sequence
    error: str | None = None
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    scheduled_at: float = 0.0  # when it first left the queue
    preemptions: int = 0
    drafted: int = 0  # tokens that this step's round drafted, and how many of those stood
    accepted: int = 0
    leaf: bool = False  # see SeqResult
    bias: tuple[float, ...] = ()  # see SeqResult
    passes: Passes | None = None  # of the request so far, where it is denoised
    canvas: CanvasStep | None = None  # see SeqResult
    reading: Readout | None = None  # see SeqResult


@record
class VerifierStats:
    """What came of one verifier's rounds; counters are totals since start."""

    name: str
    rounds: int = 0
    drafted: int = 0  # tokens
    accepted: int = 0  # tokens
    tokens: int = 0  # committed in these rounds
    bias: float = 0.0  # of these tokens together, see SeqResult


@record
class EngineStats:
    """Counters are totals since start."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0  # referenced by a live sequence
    kv_blocks_total: int = 0
    kv_blocks_cached: int = 0  # free, but still holding a reusable prefix
    preemptions: int = 0
    prefix_queries: int = 0  # tokens
    prefix_hits: int = 0  # tokens
    step_tokens: int = 0  # tokens fed in the last step
    step_seconds: float = 0.0  # wall time of the last step
    spec_rounds: int = 0  # drafts that were verified: one per sequence and step with a draft
    spec_drafted: int = 0  # tokens
    spec_accepted: int = 0  # tokens
    spec_accepted_at: tuple[int, ...] = ()  # tokens, by their position in the draft
    verifiers: tuple[VerifierStats, ...] = ()  # those that have verified anything
    denoised: Passes = Passes()  # of all requests
    denoise_steps: int = 0  # one per sequence and step that denoises
    denoise_committed: int = 0  # tokens


@record
class StepReport:
    updates: tuple[SeqUpdate, ...]
    stats: EngineStats


# ---- what the front process hands to its callers ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the front process knows of a served model."""

    id: str
    path: str
    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    block_size: int
    num_blocks: int
    created: int  # unix seconds
    quant: str  # as configured, or the worker's own `numerics`
    pipeline: str
    drafter: str = ""  # empty: requests are never drafted for
    draft: str = ""  # name of the drafter's checkpoint, without its folders; empty where it has none
    max_draft: int = 0
    verifier: str = ""
    verifier_knobs: tuple[tuple[str, float], ...] = ()  # the server's values for its verifier
    verifier_head: str = ""  # name of the trained head's folder; empty where there is none
    sample: bool = False  # are drafts drawn where a request does not say, and its verifier weighs laws
    verifiers: tuple[VerifierCard, ...] = ()  # that requests may choose from
    max_bias: float = 1.0  # most that a request's verifier may move a token's law, in total variation
    thinking: tuple[int, int] | None = None  # the tokens around a thinking span, where the tokenizer has them
    reasoning_parser: str = ""  # a name in thinking.FORMS; empty: answers are not looked through for thoughts
    tool_parser: str = ""  # the form in which it calls tools; empty: it has no tools
    tool_template: bool = False  # its chat template tells it of them; else the server's own prompt does
    diffusion: DiffusionInfo | None = None  # of models that denoise


@dataclass(frozen=True, slots=True)
class Phase:
    """One line of the start-up table. `memory` is the peak resident bytes of that process so far."""

    name: str
    seconds: float
    memory: int
    detail: str = ""


@record
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SpeculationReport:
    """What drafting did for one request, up to where its answer was cut. A round is a draft that was verified."""

    rounds: int = 0
    drafted: int = 0  # tokens
    accepted: int = 0  # tokens
    histogram: tuple[int, ...] = ()  # [a]: rounds in which a drafted tokens stood
    tokens: int = 0  # of the answer
    verifier: str = ""  # as settled, with all its knobs; empty where nothing is drafted
    knobs: tuple[tuple[str, float], ...] = ()
    decoder: str = "target"  # or "relaxed"; greedy and relaxed is "relaxed_greedy", which is not the target's greedy
    bias_bound: float | None = 0.0  # most that the law of a token may have moved; None of a greedy one, which has none
    bias: float = 0.0  # of these tokens together, see SeqResult: no less than the answer's total variation, on average


@record
class TokenEvent:
    """News of one request for its client. Over all events, texts concatenate to the answer.

    `text` may lag behind `token_ids` (incomplete characters, possible stop strings) and be empty.
    `logprobs`, if asked for, matches `token_ids` one to one. `offsets` holds, for each token, the index in
    the request's whole output text at which that token's text starts. `origins`, if asked for, has a letter for each
    token: d was drafted and stood, c is the target's own in place of a draft that did not, b the target's own behind a
    draft that stood whole, p came from a step in which nothing was drafted for the request.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    usage: Usage
    offsets: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # first event only; [0] is None
    finish: FinishReason | None = None
    stop_reason: int | str | None = None
    speculation: SpeculationReport | None = None  # with `finish`, where the request asks for it
    diffusion: DiffusionReport | None = None  # likewise
    origins: str | None = None
    rounds: tuple[tuple[int, int], ...] | None = None  # with `origins`: (drafted, stood) of each verified draft
    canvas: tuple[CanvasNews, ...] = ()  # where the request asks for it: what happened to its canvas, step by step
    reading: Readout | None = None  # of a request that reads: its only event


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """Timings of a finished request, for metrics. All times are durations in seconds."""

    usage: Usage
    finish: FinishReason
    max_tokens: int
    n: int
    e2e: float
    queue: float
    prefill: float
    decode: float
    first_token: float | None
    preemptions: int
    request_id: str = ""
    speculation: SpeculationReport = SpeculationReport()
    passes: Passes = field(default_factory=Passes)
    detokenize: float = 0.0  # of the time above, in the front process


@dataclass(frozen=True, slots=True)
class Health:
    """`ok` is false when the process is dead or holds work and makes no progress; `reason` says which."""

    ok: bool
    ready: bool
    reason: str = ""
