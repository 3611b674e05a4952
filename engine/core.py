"""EngineCore: schedule, execute, update. No torch; the worker is handed in."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable

from engine import denoising, speculation
from engine.config import EngineConfig
from engine.errors import EngineDead, InvalidRequest
from engine.protocols import StepHandle, Worker
from engine.scheduling.scheduler import Scheduler
from engine.types import Capacity, EngineStats, FinishReason, ModelInfo, Request, SeqUpdate, StepPlan, StepReport

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # steps in a row that may fail before the device is taken for broken


class EngineCore:
    """One engine: a scheduler over a worker. Everything but `prepare` is called from one thread.

    With lag 1 a step is submitted before the result of the one before it is read, so the device never waits
    for the scheduler. A step that fails ends its own requests; after MAX_FAILURES in a row `step` raises
    EngineDead, because a process that can't compute should end and be replaced, not go round.
    """

    def __init__(
        self,
        worker: Worker,
        config: EngineConfig,
        *,
        hash_seed: bytes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._scheduler = Scheduler(
            worker.capacity(),
            config.scheduler,
            prefix_cache=config.kv.prefix_cache,
            hash_seed=hash_seed if hash_seed is not None else secrets.token_bytes(16),
            clock=clock,
        )
        # What a denoised sequence feeds next depends on its result: running ahead would only split the batch in two.
        self._lag = 0 if worker.capacity().traits.denoises else config.scheduler.lag
        self._clock = clock
        self._in_flight: deque[tuple[StepPlan, StepHandle]] = deque()
        self._refused: list[SeqUpdate] = []
        self._failures = 0
        self._tainted = -1  # the last step that was in flight when one failed
        self._idle_rounds = 0

    def prepare(self, request: Request) -> None:
        """Compile what it needs, if that takes time; any thread may call. Raises InvalidRequest, see `add`."""
        self._worker.prepare(request)

    def refuse(self, request_id: str, finish: FinishReason, error: str | None = None) -> None:
        """A request that was never added ends like this, with the next report."""
        self._refused.append(SeqUpdate(request_id, finish=finish, error=error))

    def add(self, request: Request) -> None:
        """Queue it. One that the scheduler refuses ends with an ERROR update in the next report."""
        try:
            self._scheduler.add(request)
        except InvalidRequest as error:
            self.refuse(request.id, FinishReason.ERROR, error.message)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Unknown and finished ids are ignored: the client and the engine may both end a request."""
        for request_id in request_ids:
            self._scheduler.abort(request_id)

    def has_work(self) -> bool:
        return self._scheduler.has_work() or bool(self._in_flight or self._refused)

    def step(self) -> StepReport:
        """Plan and submit a step, then take in the results that are due. Raises EngineDead (see the class)."""
        began = self._clock()
        plan = self._scheduler.schedule()
        updates, self._refused = self._refused, []
        submitted = self._submit(plan, updates)
        while len(self._in_flight) > (self._lag if submitted and plan.items else 0):
            self._collect(updates)
        self._watch_for_standstill(plan, updates)
        stats = self._scheduler.stats(self._scheduler.take_fed(), self._clock() - began)
        return StepReport(tuple(updates), stats)

    def _submit(self, plan: StepPlan, updates: list[SeqUpdate]) -> bool:
        if not (plan.items or plan.dropped or plan.admitted):
            return False
        try:
            handle = self._worker.submit(plan)
        except EngineDead:  # the worker knows that no step will work again
            raise
        except Exception as error:  # whatever it was, it ends this step and not the engine
            while self._in_flight:  # the scheduler hears of steps in their order
                self._collect(updates)
            self._fail(plan, error, updates)
            return False
        self._in_flight.append((plan, handle))
        return True

    def _collect(self, updates: list[SeqUpdate]) -> None:
        plan, handle = self._in_flight.popleft()
        try:
            output = handle.result()
        except EngineDead:
            raise
        except Exception as error:  # as in _submit
            self._fail(plan, error, updates)
            return
        updates.extend(self._scheduler.update(output))
        if plan.items:
            self._failures = 0

    def _fail(self, plan: StepPlan, error: Exception, updates: list[SeqUpdate]) -> None:
        logger.error("step %d failed with %d requests", plan.step, len(plan.items), exc_info=error)
        if plan.step > self._tainted:  # what was in flight behind a failed step is no failure of its own
            self._failures += 1
            self._tainted = max((other.step for other, _ in self._in_flight), default=plan.step)
        if self._failures >= MAX_FAILURES:
            raise EngineDead(
                f"{self._failures} steps in a row failed; the last error was: {_describe(error)}"
            ) from error
        updates.extend(self._scheduler.fail_step(plan.step, _describe(error)))

    def _watch_for_standstill(self, plan: StepPlan, updates: list[SeqUpdate]) -> None:
        """Work that can't be planned would turn the engine's loop into a spin: end it loudly instead."""
        stuck = not (plan.items or updates or self._in_flight) and self._scheduler.has_work()
        self._idle_rounds = self._idle_rounds + 1 if stuck else 0
        if self._idle_rounds >= MAX_FAILURES:
            raise EngineDead("the scheduler holds requests that it can't run")

    def settle(self) -> None:
        """Call when there is no work left: recounts every block and looks for device state left behind.

        Raises IntegrityError when the books are wrong: nothing that is served after that could be trusted.
        """
        assert not self.has_work()
        self._scheduler.check_integrity()
        states = self._worker.num_states()
        if states:
            logger.error("the worker holds state of %d requests, but none is running", states)

    def check_integrity(self) -> None:
        """Recount every block, at any time between steps. Raises IntegrityError on a mismatch."""
        self._scheduler.check_integrity()

    def reset_prefix_cache(self) -> int:
        """Let no request find what was computed for others until now. Returns the blocks that could be found.

        Blocks of running requests stay theirs. Raises IntegrityError if the books do not add up afterwards.
        """
        found = self._scheduler.reset_prefix_cache()
        self._scheduler.check_integrity()
        return found

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def num_states(self) -> int:
        return self._worker.num_states()

    def close(self) -> None:
        self._worker.close()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def model_info(
    config: EngineConfig,
    capacity: Capacity,
    eos_ids: Iterable[int],
    created: int,
    thinking_form: Callable[[str], tuple[str, tuple[int, int] | None]] = lambda _: ("", None),
    tool_form: Callable[[str], tuple[str, bool]] = lambda _: ("", False),
) -> ModelInfo:
    """What a front process knows of a model once its worker is ready; `created` is in unix seconds.

    `thinking_form`, `tool_form`: see `Tokenizer`.

    Raises ConfigError for a verifier of the server's own that its draft can't be verified by, or with wrong knobs, and
    for settings of `diffusion` that the checkpoint can't have.
    """
    draft, verifier, most = config.model.draft, config.model.verifier, capacity.traits.max_draft
    diffusion = denoising.settle_server(config.model, capacity)
    ends = dict.fromkeys((*eos_ids, *(diffusion.spec.stop_ids if diffusion is not None else ())))
    automatic = diffusion is not None and config.model.pipeline == "autoregressive"
    reasoning_parser, thinking = thinking_form(config.model.reasoning_parser)
    tool_parser, tool_template = tool_form(config.model.tool_parser)
    return ModelInfo(
        id=config.model.name,
        path=config.model.path,
        max_model_len=capacity.max_model_len,
        vocab_size=capacity.vocab_size,
        eos_ids=tuple(ends),
        block_size=capacity.block_size,
        num_blocks=capacity.num_blocks,
        created=created,
        quant=capacity.numerics or config.model.quant,
        pipeline="masked_diffusion" if automatic else config.model.pipeline,
        drafter="" if draft is None else draft.drafter,
        draft="" if draft is None else draft.name,
        max_draft=most,
        verifier="" if draft is None else verifier.name,
        verifier_knobs=speculation.settle_server(verifier, capacity.verifiers) if most else (),
        verifier_head=verifier.head.rstrip("/").rsplit("/", 1)[-1],
        sample=draft is not None and draft.sample,
        verifiers=capacity.verifiers if most else (),
        max_bias=verifier.max_bias,
        thinking=thinking,
        reasoning_parser=reasoning_parser,
        tool_parser=tool_parser,
        tool_template=tool_template,
        diffusion=diffusion,
    )
