"""One checkpoint served in this process with one drafter, or with none, and requests run through it.

Engines of several drafters stand side by side in one process and take turns: idle ones cost nothing, all use the same
threads, and two figures of one round are seconds apart, which no two servers with processes of their own can offer.
HTTP is left out for all alike.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from benchmarks.drafts_figures import Round
from benchmarks.stream import BenchmarkError
from engine.config import (
    DraftConfig,
    EngineConfig,
    KVConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VerifierConfig,
)
from engine.core import EngineCore, model_info
from engine.errors import SlipstreamError
from engine.hub.drafts import settle_draft
from engine.llm import CACHE_DIR
from engine.protocols import StepHandle, Worker, WorkerFactory
from engine.registry import WORKERS
from engine.registry import resolve as look_up
from engine.types import (
    Capacity,
    EngineStats,
    FinishReason,
    ModelInfo,
    Passes,
    Phase,
    Request,
    SeqUpdate,
    StepPlan,
    TokenLogprob,
)


@dataclass(frozen=True, slots=True)
class Variant:
    """A way of drafting and what it is called in tables; "none" drafts nothing."""

    name: str
    draft: DraftConfig | None

    def whole(self) -> Variant:
        """The same with drafts that are made and verified whole, whether that pays or not."""
        return self if self.draft is None else replace(self, draft=replace(self.draft, adaptive=False))


@dataclass(frozen=True, slots=True)
class Load:
    """How a model is loaded: see `engine.config`."""

    quant: str = "auto"
    memory: str = "384MiB"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Conditions:
    """How requests meet the engine."""

    num_blocks: int | None = None
    chunk: int = 512
    seqs: int = 64
    lag: int = 0
    prefix_cache: bool = False


@dataclass(slots=True)
class Answer:
    """What one request got. Times are of `time.perf_counter()`."""

    request: Request
    asked: float
    tokens: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)  # decode steps: the step that ends the prompt is none
    gaps: list[float] = field(default_factory=list)  # of the two best log-probabilities, where they were asked for
    scored: list[TokenLogprob] = field(default_factory=list)  # of the tokens, where it was asked for
    bias: list[float] = field(default_factory=list)  # of each token, as it was reported
    first: float = 0.0
    last: float = 0.0
    cached_tokens: int = 0
    preemptions: int = 0
    passes: Passes = field(default_factory=Passes)  # where it is denoised

    @property
    def to_first(self) -> float:
        """Seconds to the first token."""
        return self.first - self.asked

    def take(self, update: SeqUpdate, now: float) -> bool:
        """Add the news of a step; True with the last one. Raises BenchmarkError where the request failed."""
        if update.finish is FinishReason.ERROR:
            raise BenchmarkError(f"{self.request.id} failed inside the engine: {update.error}")
        self.cached_tokens, self.preemptions = update.cached_tokens, update.preemptions
        self.passes = update.passes or self.passes
        if update.token_ids:
            if self.tokens:
                self.rounds.append(Round(update.drafted, update.accepted, len(update.token_ids)))
            else:
                self.first = now
            self.last = now
        self.tokens += update.token_ids
        self.bias += update.bias or (0.0,) * len(update.token_ids)
        self.scored += update.logprobs or ()
        self.gaps += [one.top[0][1] - one.top[1][1] for one in update.logprobs or () if len(one.top) > 1]
        return update.finish is not None


@dataclass(frozen=True, slots=True)
class Run:
    """Some requests, answered: in their order, with the wall time of all together and the engine's counters."""

    answers: tuple[Answer, ...]
    seconds: float
    stats: EngineStats

    @property
    def speed(self) -> float:
        """Tokens of all answers per second, prompts included."""
        return sum(len(answer.tokens) for answer in self.answers) / self.seconds

    @property
    def decode_speed(self) -> float:
        """Tokens per second of one stream, from its first token to its last: the mean over all streams' time."""
        seconds = sum(answer.last - answer.first for answer in self.answers)
        return sum(len(answer.tokens) - 1 for answer in self.answers) / seconds if seconds else 0.0

    @property
    def tokens(self) -> list[list[int]]:
        return [answer.tokens for answer in self.answers]


@dataclass(frozen=True, slots=True)
class Restrained:
    """A worker with fewer blocks."""

    worker: Worker
    num_blocks: int | None

    def capacity(self) -> Capacity:
        capacity = self.worker.capacity()
        return capacity if self.num_blocks is None else replace(capacity, num_blocks=self.num_blocks)

    def prepare(self, request: Request) -> None:
        self.worker.prepare(request)

    def submit(self, plan: StepPlan) -> StepHandle:
        return self.worker.submit(plan)

    def num_states(self) -> int:
        return self.worker.num_states()

    def close(self) -> None:
        self.worker.close()


class Served:
    """A loaded model with a drafter. `phases` tells what was loaded, and how large it is."""

    def __init__(self, folder: Path, variant: Variant, load: Load, verifier: VerifierConfig | None = None) -> None:
        """Raises BenchmarkError where the model or its draft can't be loaded."""
        self.variant = variant
        self.phases: list[Phase] = []
        pipeline = "autoregressive" if variant.draft is None else "speculative"
        verified = verifier or VerifierConfig()
        model = ModelConfig(
            path=str(folder), pipeline=pipeline, draft=variant.draft, verifier=verified, quant=load.quant
        )
        parallel = ParallelConfig(threads=load.threads)
        config = EngineConfig(model=model, kv=KVConfig(memory=load.memory), parallel=parallel)
        factory = cast(WorkerFactory, look_up(WORKERS, "local", "worker"))
        try:
            self._config = settle_draft(config, CACHE_DIR.expanduser())
            self.worker = factory(self._config, folder, self.phases.append)
        except SlipstreamError as error:
            raise BenchmarkError(f"{variant.name}: {error}") from error

    def info(self) -> ModelInfo:
        """What requests are checked against."""
        return model_info(self._config, self.worker.capacity(), (), 0)

    def core(self, conditions: Conditions) -> EngineCore:
        """A new engine over the loaded model, with nothing cached."""
        scheduler = SchedulerConfig(
            max_num_seqs=conditions.seqs, max_batched_tokens=conditions.chunk, lag=conditions.lag
        )
        cache = replace(self._config.kv, prefix_cache=conditions.prefix_cache)
        config = replace(self._config, scheduler=scheduler, kv=cache)
        return EngineCore(Restrained(self.worker, conditions.num_blocks), config)


def run(
    core: EngineCore,
    requests: Sequence[Request],
    clients: int | None = None,
    ended: Callable[[Sequence[int]], bool] = lambda _: False,
) -> Run:
    """Answer requests as so many clients ask for them, each one after the other; None: all at once.

    An answer whose tokens have `ended` is not gone on with.
    Raises BenchmarkError for one that fails, and IntegrityError where anything of them is left in the engine.
    """
    waiting, answers = deque(requests), {request.id: Answer(request, 0.0) for request in requests}
    begin = time.perf_counter()

    def ask(count: int) -> None:
        for _ in range(min(count, len(waiting))):
            request = waiting.popleft()
            answers[request.id].asked = time.perf_counter()
            core.add(request)

    ask(clients or len(requests))
    while core.has_work():
        report, now = core.step(), time.perf_counter()
        ask(sum(answers[update.request_id].take(update, now) for update in report.updates))
        core.abort(one.request_id for one in report.updates if one.token_ids and ended(answers[one.request_id].tokens))
    seconds = time.perf_counter() - begin
    core.settle()
    return Run(tuple(answers[request.id] for request in requests), seconds, core.stats())
