"""The scheduler: the face of this folder, and what a step's results mean. Nothing else changes a Sequence."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.config import SchedulerConfig
from engine.errors import ConfigError, IntegrityError, InvalidRequest
from engine.scheduling import stops
from engine.scheduling.budget import reserved, samples
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.planner import Planner
from engine.scheduling.roster import Roster, ending
from engine.scheduling.spans import Denoised, least_budget
from engine.types import (
    Capacity,
    EngineStats,
    FinishReason,
    Request,
    ScheduledSeq,
    SeqResult,
    Sequence,
    SequenceStatus,
    SeqUpdate,
    StepOutput,
    StepPlan,
    TokenLogprob,
)

RUNNING, FINISHED = SequenceStatus.RUNNING, SequenceStatus.FINISHED  # an enumeration looks its members up every time


class Scheduler:
    """Continuous batching over a paged KV pool, for any pipeline: it knows the pipeline's traits and nothing else.

    Call `schedule`, run the plan, and hand its output to `update` (or its failure to `fail_step`), in the order
    of the plans; a plan may be made before the results of earlier ones are in. A plan that holds nothing at all
    needs no answer and keeps its step number for the next one.

    Every request gets exactly one update with `finish`. Those that end outside a step (aborts, requests that can
    never run) are told by the next `update` or `fail_step`; until a plan has named them in `dropped`, known to
    the device or not, `has_work` is true, so there always is a step that carries the news.
    """

    def __init__(
        self,
        capacity: Capacity,
        config: SchedulerConfig,
        *,
        prefix_cache: bool,
        hash_seed: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`prefix_cache` counts only where the pipeline's traits allow it; `hash_seed`: 16 to 64 secret bytes.

        Raises ConfigError for a step that has no room for what a sequence of this pipeline feeds at once.
        """
        traits, self._budget = capacity.traits, config.max_batched_tokens
        if self._budget < least_budget(traits):
            raise ConfigError(
                f"scheduler.max_batched_tokens: {self._budget} has no room for two blocks of {traits.unit} tokens,"
                " which this model feeds at once"
            )
        shares = prefix_cache and traits.prefix_cacheable
        self._capacity = capacity
        self._drafts = traits.drafts
        self._drafted = 0  # tokens, when `take_fed` was last asked
        self._kv = KVManager(capacity.num_blocks, capacity.block_size, hash_seed, prefix_cache=shares, unit=traits.unit)
        self._roster = Roster(self._kv)
        self._planner = Planner(capacity, config, self._kv, self._roster, clock)
        self._denoised = Denoised()
        self._in_flight: dict[int, tuple[ScheduledSeq, ...]] = {}  # by step, oldest first
        self._added = 0
        self._steps = 0

    def add(self, request: Request) -> None:
        """Take in a request. One that can never run gets an ERROR update; an id in use raises InvalidRequest."""
        if request.id in self._roster.sequences:
            raise InvalidRequest(f"the request id {request.id!r} is in use")
        problem = stops.never_fits(request, self._capacity, self._budget)
        if problem is not None:
            self._roster.refuse(request.id, problem)
            return
        self._added += 1
        seq = Sequence(
            request,
            limit=stops.limit(request, self._capacity),
            stop_ids=frozenset(request.eos_ids + request.sampling.stop_token_ids),
            rank=(request.priority, request.arrival, self._added),
        )
        self._roster.add(seq)

    def abort(self, request_id: str) -> bool:
        """End a request now, whatever its state; its results in flight are discarded. False if it isn't alive."""
        seq = self._roster.sequences.get(request_id)
        if seq is None or seq.status is FINISHED:
            return False
        self._roster.abort(seq)
        return True

    def has_work(self) -> bool:
        """Is anything alive, in flight, or still to be dropped or told?"""
        return bool(self._in_flight) or not self._roster.is_empty()

    def schedule(self) -> StepPlan:
        """The next step. `items` may be empty: nothing can run until a step in flight ends, or only news is due."""
        items, admitted = self._planner.plan()
        plan = StepPlan(self._steps, items, admitted, self._roster.take_dropped())
        if items or plan.dropped:
            self._in_flight[plan.step] = items
            self._steps += 1
        return plan

    def update(self, output: StepOutput) -> tuple[SeqUpdate, ...]:
        """Take in what the oldest step in flight did. Raises IntegrityError for any other step."""
        items = self._take_step(output.step)
        self._planner.drafting.settle(items, output)
        news = self._roster.take_news()
        sequences = self._roster.sequences
        for item, result in zip(items, _results_of(items, output), strict=True):
            seq = sequences[item.request_id]
            seq.in_flight.pop(0)
            if result is not None and result.passes is not None:
                seq.passes = self._denoised.note(seq, item, result.passes)
            if seq.status is not FINISHED:  # else it is a surplus step, to be discarded
                update = self._commit(seq, item, result)
                if update is not None:
                    news.append(update)
            if seq.status is not RUNNING:
                self._roster.settle(seq)
        return tuple(news)

    def fail_step(self, step: int, error: str) -> tuple[SeqUpdate, ...]:
        """The oldest step in flight failed as a whole: everyone in it ends with `error`, nothing is published."""
        items = self._take_step(step)
        news = self._roster.take_news()
        for item in items:
            seq = self._roster.sequences[item.request_id]
            seq.in_flight.pop(0)
            if seq.status is not FINISHED:
                news.append(self._fail(seq, error))
            self._roster.settle(seq)
        return tuple(news)

    def take_fed(self) -> int:
        """Tokens of the last plan, and drafts of the steps that ended since this was asked before."""
        before, self._drafted = self._drafted, self._planner.drafting.drafted
        return self._planner.fed + self._drafted - before

    def stats(self, step_tokens: int = 0, step_seconds: float = 0.0) -> EngineStats:
        """Counters and levels as they are now; what a step took is the engine core's to say."""
        pool, drafting = self._kv.pool, self._planner.drafting
        return EngineStats(
            steps=self._steps,
            running=len(self._roster.running),
            waiting=self._roster.num_waiting(),
            kv_blocks_used=pool.num_used,
            kv_blocks_total=pool.num_blocks,
            kv_blocks_cached=pool.num_cached,
            preemptions=self._roster.preemptions,
            prefix_queries=self._planner.prefix_queries,
            prefix_hits=self._planner.prefix_hits,
            step_tokens=step_tokens,
            step_seconds=step_seconds,
            spec_rounds=drafting.rounds,
            spec_drafted=drafting.drafted,
            spec_accepted=drafting.accepted,
            spec_accepted_at=tuple(drafting.accepted_at),
            verifiers=drafting.by_verifier(),
            denoised=self._denoised.passes,
            denoise_steps=self._denoised.steps,
            denoise_committed=self._denoised.tokens,
        )

    def check_integrity(self) -> None:
        """Recount every block and every sequence, at any time between calls. Raises IntegrityError with details."""
        self._roster.check(self._in_flight.values())

    def reset_prefix_cache(self) -> int:
        """Let no block be found that is published now; those who hold one keep it. Returns how many could be found."""
        return self._kv.pool.unpublish_all()

    def _take_step(self, step: int) -> tuple[ScheduledSeq, ...]:
        oldest = next(iter(self._in_flight), None)
        if step != oldest:
            raise IntegrityError(f"news came of step {step}, but the oldest step in flight is {oldest}")
        return self._in_flight.pop(step)

    def _commit(self, seq: Sequence, item: ScheduledSeq, result: SeqResult | None) -> SeqUpdate | None:
        """Take in one result. None if there is nothing to tell: a chunk of a prompt, a denoise step."""
        if result is None:
            return self._fail(seq, "the worker gave no result for this request")
        if result.error is not None:
            return self._fail(seq, result.error)
        tokens: tuple[int, ...] = ()
        end: stops.Cut | None = None
        if samples(seq, item):
            if self._drafts:
                self._planner.drafting.observe(seq, item, result)
            tokens, end = result.new_tokens, stops.cut(seq, result.new_tokens)
            if end is not None:
                tokens = tokens[: end.kept]
            seq.output_ids.extend(tokens)
        self._advance(seq, result, len(tokens))
        scored = _unsent_scores(seq, item, result)
        if end is not None:
            self._roster.finish(seq)
        elif not tokens and not scored and result.canvas is None:
            return None
        return _update(seq, result, tokens, end, scored)

    def _advance(self, seq: Sequence, result: SeqResult, new: int) -> None:
        """The positions whose KV is final from now on, `new` tokens having been committed: others may find them."""
        if result.passes is not None:
            self._denoised.tokens += new
        request = seq.request
        prompt = len(request.prompt_ids)
        seq.num_computed = computed = min(result.num_computed, prompt + len(seq.output_ids))
        seq.num_reserved = reserved(seq) if seq.in_flight else computed
        self._kv.publish(seq)
        if request.group:
            unit = self._capacity.traits.unit
            if computed >= prompt - prompt % unit:  # the tail of a prompt is final with the rest of its block
                self._roster.waiting.leader_ready(seq)

    def _fail(self, seq: Sequence, error: str) -> SeqUpdate:
        """End one sequence alone. Its KV is in doubt, so nothing of it may be found in the prefix cache again."""
        self._kv.withdraw(seq)
        self._roster.finish(seq)
        return ending(seq, FinishReason.ERROR, error)


def _update(
    seq: Sequence,
    result: SeqResult,
    tokens: tuple[int, ...],
    end: stops.Cut | None,
    scored: tuple[TokenLogprob, ...] | None,
) -> SeqUpdate:
    """News of the first `tokens` of a result, by position: names would cost as much as the rest."""
    kept = len(tokens)
    return SeqUpdate(
        result.request_id,
        tokens,
        None if result.logprobs is None else result.logprobs[:kept],
        scored,
        None if end is None else end.finish,
        None if end is None else end.stop_token_id,
        None,
        seq.cached_tokens,
        seq.scheduled_at,
        seq.preemptions,
        result.drafted,
        result.accepted,
        result.leaf,
        result.bias[:kept],
        None if result.passes is None else seq.passes,
        result.canvas,
        result.reading,
    )


def _results_of(items: tuple[ScheduledSeq, ...], output: StepOutput) -> list[SeqResult | None]:
    """The result of each item; workers answer in the order of the plan, but need not."""
    if [result.request_id for result in output.results] == [item.request_id for item in items]:
        return list(output.results)
    found = {result.request_id: result for result in output.results}
    return [found.get(item.request_id) for item in items]


def _unsent_scores(seq: Sequence, item: ScheduledSeq, result: SeqResult) -> tuple[TokenLogprob, ...] | None:
    """The result's prompt log-probabilities without those that were delivered before a preemption."""
    if result.prompt_logprobs is None:
        return None
    unsent = result.prompt_logprobs[max(0, seq.num_scored - item.start) :]
    seq.num_scored += len(unsent)
    return unsent or None
