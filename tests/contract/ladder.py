"""Run requests through a real core and worker under chosen conditions, and compare what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.config import DraftConfig, EngineConfig, KVConfig, ModelConfig, ParallelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.protocols import StepHandle, Worker
from engine.reading import Readout
from engine.runtime.costs import Costs
from engine.runtime.worker import LocalWorker
from engine.types import (
    Capacity,
    EngineStats,
    FinishReason,
    Request,
    SamplingParams,
    SpeculationParams,
    StepPlan,
    TokenLogprob,
)

FREE = Costs()
GAP = 1e-4  # logits closer than this may swap places under another order of summation


@dataclass(frozen=True, slots=True)
class TestedWorker:
    """The same worker with fewer blocks, so that one loaded model serves every rung; and with costs as they are told.

    What is drafted must not hang on the clock: without a word, drafts are free.
    """

    worker: Worker
    num_blocks: int | None
    costs: Costs

    def capacity(self) -> Capacity:
        capacity = replace(self.worker.capacity(), step_costs=self.costs.steps, draft_costs=self.costs.drafts)
        return capacity if self.num_blocks is None else replace(capacity, num_blocks=self.num_blocks)

    def prepare(self, request: Request) -> None:
        self.worker.prepare(request)

    def submit(self, plan: StepPlan) -> StepHandle:
        return self.worker.submit(plan)

    def num_states(self) -> int:
        return self.worker.num_states()

    def close(self) -> None:
        self.worker.close()


@dataclass(slots=True)
class Outcome:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    reading: Readout | None = None


def load_worker(
    folder: Path,
    quant: str = "none",
    memory: str = "64MiB",
    threads: int | None = None,
    draft: DraftConfig | None = None,
    device: str = "cpu",
    adaptive: bool = False,
    **options: str,
) -> LocalWorker:
    """A worker over a checkpoint folder. Tiny models want one thread: waking a second costs more than it does.

    `options` are further keys of `models`, such as dtype and attention.
    """
    pipeline = "autoregressive" if draft is None else "speculative"
    draft = None if draft is None else replace(draft, adaptive=adaptive)  # what is verified must not hang on the clock
    model = ModelConfig(str(folder), quant=quant, pipeline=pipeline, draft=draft, device=device, **options)  # type: ignore[arg-type]
    parallel = ParallelConfig(threads=threads)
    config = EngineConfig(model=model, kv=KVConfig(memory=memory), parallel=parallel)
    return LocalWorker(config, folder, lambda _: None)


class Ladder:
    """One core over a loaded worker. Every run ends with all blocks and all device state given back."""

    def __init__(
        self,
        worker: Worker,
        *,
        num_blocks: int | None = None,
        chunk: int = 512,
        seqs: int = 64,
        lag: int = 0,
        prefix_cache: bool = True,
        costs: Costs = FREE,
    ) -> None:
        scheduler = SchedulerConfig(max_num_seqs=seqs, max_batched_tokens=chunk, lag=lag)
        config = EngineConfig(scheduler=scheduler, kv=KVConfig(prefix_cache=prefix_cache))
        self._worker = TestedWorker(worker, num_blocks, costs)
        self.core = EngineCore(self._worker, config, hash_seed=b"the same ladder.")
        self.stats = EngineStats()

    def run(self, requests: Sequence[Request], on_step: Callable[[int], None] = lambda _: None) -> dict[str, Outcome]:
        outcomes = {request.id: Outcome() for request in requests}
        for request in requests:
            self.core.add(request)
        step = 0
        while self.core.has_work():
            report = self.core.step()
            self.core.check_integrity()
            for update in report.updates:
                outcome = outcomes[update.request_id]
                assert outcome.finish is None, "an update after the terminal one"
                assert update.error is None, update.error
                outcome.tokens.extend(update.token_ids)
                outcome.logprobs.extend(update.logprobs or ())
                outcome.prompt_logprobs.extend(update.prompt_logprobs or ())
                outcome.finish = update.finish
                outcome.cached_tokens = update.cached_tokens
                outcome.preemptions = update.preemptions
                outcome.reading = update.reading or outcome.reading
            step += 1
            on_step(step)
        self.core.settle()
        self.stats = self.core.stats()
        assert self.stats.running == self.stats.waiting == self.stats.kv_blocks_used == 0
        assert self._worker.num_states() == 0
        return outcomes


def request(
    name: str,
    prompt: Sequence[int],
    max_tokens: int = 24,
    choice: int = 0,
    speculation: SpeculationParams | None = None,
    **sampling: object,
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    wish = speculation or SpeculationParams()
    return Request(id=name, prompt_ids=tuple(prompt), sampling=params, choice=choice, speculation=wish)


def assert_same(expected: dict[str, Outcome], got: dict[str, Outcome]) -> int:
    """Equal tokens up to the first near-tie of the reference; the number of such ties met.

    The reference must have been run greedily with logprobs=2 for ties to be recognised; without, tokens must be equal.
    """
    ties = 0
    for name, want in expected.items():
        have = got[name]
        if want.tokens == have.tokens:
            assert want.finish == have.finish, name
            continue
        first = next(i for i, (a, b) in enumerate(zip(want.tokens, have.tokens, strict=False)) if a != b)
        assert want.logprobs, f"{name}: token {first} is {have.tokens[first]}, not {want.tokens[first]}"
        best, second = want.logprobs[first].top[:2]
        assert best[1] - second[1] < GAP, f"{name}: token {first} differs at a gap of {best[1] - second[1]:.3g}"
        ties += 1
    return ties
