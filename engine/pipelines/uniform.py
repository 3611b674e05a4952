"""Decoding whose uniform steps run ahead of the host: launched before anybody has read what the step before drew.

Around any pipeline whose requests hold a `StateTable`. A step in which every sequence feeds its last token alone, and
in which nobody wants more of its draws than the device does by itself, is launched from the device's own state; every
other step (prompts, penalties, truncations, logprobs, verifiers that weigh laws) waits for the results that are under
way and runs as ever. Tokens are the same either way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.pipelines.states import FAILED, SeqState, StateTable
from engine.protocols import Pipeline
from engine.runtime.device_state import Entry
from engine.runtime.outbox import Flight
from engine.runtime.truncation import truncates
from engine.runtime.uniform_steps import Seat
from engine.types import DecodeTraits, ScheduledSeq, SeqResult, StepOutput, StepPlan


class Decoder(Pipeline, Protocol):
    """A pipeline that can leave steps to others: they decode for it, and it hears what they committed."""

    @property
    def states(self) -> StateTable: ...

    def enter(self, plan: StepPlan) -> None:
        """Forget whom the plan drops, then take in whom it admits. `execute` does so by itself."""
        ...

    def heard(self, request_id: str, tokens: Sequence[int]) -> None:
        """These tokens were committed to a request's state in a step that it did not execute."""
        ...

    def leaves(self, state: SeqState) -> bool:
        """Would it verify this request's drafts as the device does: strictly, and chosen ones only?"""
        ...


class Steps(Protocol):
    """See `runtime.uniform_steps.UniformSteps`."""

    @property
    def most(self) -> int: ...

    def fits(self, count: int, drafts: bool) -> bool: ...

    def knows(self, request_id: str) -> bool: ...

    def forget(self, request_ids: Iterable[str]) -> None: ...

    def launch(self, seats: Sequence[Seat], *, drafts: bool = False) -> Flight: ...


@dataclass(slots=True, eq=False)
class Launched:
    """See `protocols.StepHandle`: a uniform step under way. Its results are committed once, in the order of steps."""

    pipeline: UniformPipeline
    plan: StepPlan
    flight: Flight
    drafted: tuple[int, ...]  # by item
    output: StepOutput | None = None

    def result(self) -> StepOutput:
        if self.output is None:
            self.pipeline.settle(self)
        assert self.output is not None
        return self.output


@dataclass(frozen=True, slots=True)
class Executed:
    """A step that ran to its end when it was submitted."""

    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


class UniformPipeline:
    """See `protocols.Pipeline`; `submit` is `execute` without the wait."""

    def __init__(self, inner: Decoder, steps: Steps) -> None:
        self._inner = inner
        self._steps = steps
        self._under_way: deque[Launched] = deque()

    @property
    def traits(self) -> DecodeTraits:
        return self._inner.traits

    def num_states(self) -> int:
        return self._inner.num_states()

    def execute(self, plan: StepPlan) -> StepOutput:
        return self.submit(plan).result()

    def submit(self, plan: StepPlan) -> Launched | Executed:
        self._steps.forget(plan.dropped)
        if self._is_uniform(plan):
            self._inner.enter(plan)
            return self._launch(plan)
        self.settle()
        self._steps.forget(item.request_id for item in plan.items)  # what these commit, the device won't know
        return Executed(self._inner.execute(plan))

    def settle(self, until: Launched | None = None) -> None:
        """Take in the results of steps under way, the oldest first: of all, or up to this one. Waits for them."""
        while self._under_way:
            step = self._under_way.popleft()
            step.output = self._commit(step)
            if step is until:
                return

    def _is_uniform(self, plan: StepPlan) -> bool:
        if not plan.items or plan.admitted:
            return False
        states = [self._inner.states[item.request_id] for item in plan.items]
        drafts = any(item.lookahead for item in plan.items)
        if not self._steps.fits(len(plan.items), drafts) or (drafts and not self._steps.most):
            return False
        return all(
            _decodes(item, state) and is_plain(state) and (not drafts or self._inner.leaves(state))
            for item, state in zip(plan.items, states, strict=True)
        )

    def _launch(self, plan: StepPlan) -> Launched:
        drafted = tuple(min(item.lookahead, self._steps.most) for item in plan.items)
        seats = [self._seat(item, limit) for item, limit in zip(plan.items, drafted, strict=True)]
        flight = self._steps.launch(seats, drafts=any(drafted))
        self._under_way.append(Launched(self, plan, flight, drafted))
        return self._under_way[-1]

    def _seat(self, item: ScheduledSeq, limit: int) -> Seat:
        if self._steps.knows(item.request_id):
            return Seat(item.request_id, item.block_ids, limit)
        # The device does not know it, so nothing of it is under way: what is committed is all there is.
        state = self._inner.states[item.request_id]
        draw = state.sampling.draw()
        heat = 0.0 if state.sampling.greedy else state.sampling.sampling.temperature
        entry = Entry(state.tokens[-1], len(state.tokens), draw.seed, draw.choice, heat)
        return Seat(item.request_id, item.block_ids, limit, entry)

    def _commit(self, step: Launched) -> StepOutput:
        results = []
        for item, row, drafted in zip(step.plan.items, step.flight.rows(), step.drafted, strict=True):
            state, count = self._inner.states[item.request_id], row[-1]
            end = len(state.tokens)
            if not count:
                state.commit((), end)
                results.append(SeqResult(item.request_id, (), end, error=FAILED))
                continue
            computed, tokens = end + count - 1, tuple(row[:count])
            state.commit(tokens, computed)
            self._inner.heard(item.request_id, tokens)
            results.append(SeqResult(item.request_id, tokens, computed, drafted=drafted, accepted=count - 1))
        return StepOutput(step.plan.step, tuple(results))


def _decodes(item: ScheduledSeq, state: SeqState) -> bool:
    """Is the last token all that it feeds? One that waits for its token, always does."""
    return item.pending or (len(item.tokens) == 1 and item.start == len(state.tokens) - 1)


def is_plain(state: SeqState) -> bool:
    """Does the device draw this request's tokens by itself: the most likely ones, or with a temperature alone?"""
    sampling = state.sampling.sampling
    if sampling.logprobs is not None or state.sampling.ruled or state.reader is not None:
        return False
    return state.sampling.greedy or not truncates(sampling)
