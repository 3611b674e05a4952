"""Workers without a model: what the scheduler, the messages and the front cost is measured around them. No torch.

`InstantWorker` answers at once, in the process that asks (`benchmarks.growth`). `PacedWorker` runs in the engine
process of a real server (`benchmarks.front`): its steps end at whole multiples of `step_seconds` on the machine's
monotonic clock, so that a client in another process knows when a token was made.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from engine.types import (
    Capacity,
    DecodeTraits,
    Passes,
    Phase,
    Request,
    ScheduledSeq,
    SeqResult,
    StepOutput,
    StepPlan,
    TokenLogprob,
)
from engine.verification import VerifierCard

SCRIPT, GAPS = "null_worker.json", "null_gaps.json"  # in the checkpoint's folder
ROUNDS = 4  # denoise steps of a block
STIR = bytes(1 << 20)
STRICT = VerifierCard("strict", True, "what the model itself would say", exact=True)


class Script(msgspec.Struct, frozen=True):
    """What a worker pretends to be. A round of drafts commits half of them, and one token more."""

    traits: DecodeTraits = DecodeTraits()
    num_blocks: int = 4096
    block_size: int = 16
    max_model_len: int = 8192
    vocab_size: int = 50_000
    tokens: tuple[int, ...] = tuple(range(100, 356))  # what answers are made of, in turn
    step_costs: tuple[tuple[int, float], ...] = ()
    draft_costs: tuple[tuple[int, float], ...] = ()
    step_seconds: float = 0.0
    busy_threads: int = 0  # that compute while a step lasts


@dataclass(slots=True)
class _State:
    """A request's committed tokens, and what it wants of log-probabilities."""

    tokens: int
    logprobs: int | None
    steps: int = 0


@dataclass(frozen=True, slots=True)
class _Done:
    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


class InstantWorker:
    """Gives every request its next tokens; `seconds` is what that took of this thread, to be left out of figures."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._states: dict[str, _State] = {}
        self.seconds = 0.0

    def capacity(self) -> Capacity:
        script = self._script
        sizes = (script.num_blocks, script.block_size, script.max_model_len, script.vocab_size)
        verifiers = (STRICT,) if script.traits.drafts else ()
        return Capacity(*sizes, script.traits, script.step_costs, "none", script.draft_costs, verifiers)

    def prepare(self, _: Request) -> None:
        """Nothing here has a grammar."""

    def submit(self, plan: StepPlan) -> _Done:
        began = time.thread_time()
        for request_id in plan.dropped:
            self._states.pop(request_id, None)
        for admission in plan.admitted:
            request = admission.request
            tokens = len(request.prompt_ids) + len(admission.output_ids)
            self._states[request.id] = _State(tokens, request.sampling.logprobs)
        answer = self._denoise if self._script.traits.denoises else self._decode
        output = StepOutput(plan.step, tuple([answer(item, self._states[item.request_id]) for item in plan.items]))
        self.seconds += time.thread_time() - began
        return _Done(output)

    def _decode(self, item: ScheduledSeq, state: _State) -> SeqResult:
        end = state.tokens if item.pending else item.start + len(item.tokens)
        if end < state.tokens:
            return SeqResult(item.request_id, (), end)
        drafted = item.lookahead if self._script.traits.drafts else 0
        accepted = drafted // 2
        new = self._next(state, accepted + 1)
        state.tokens += len(new)
        scores = None if state.logprobs is None else tuple([_score(token, state.logprobs) for token in new])
        return SeqResult(item.request_id, new, end + accepted, scores, None, drafted, accepted)

    def _denoise(self, item: ScheduledSeq, state: _State) -> SeqResult:
        end, state.steps = item.start + len(item.tokens), state.steps + 1
        closes = item.lookahead > 0 and state.steps % ROUNDS == 0
        new = self._next(state, item.lookahead) if closes else ()
        state.tokens += len(new)
        return SeqResult(item.request_id, new, end, passes=Passes(forwards=1, positions=end - item.start))

    def _next(self, state: _State, count: int) -> tuple[int, ...]:
        tokens = self._script.tokens
        return tuple([tokens[(state.tokens + i) % len(tokens)] for i in range(count)])

    def num_states(self) -> int:
        return len(self._states)

    def close(self) -> None:
        self._states.clear()


def _score(token: int, count: int) -> TokenLogprob:
    top = tuple([(token + i, -0.125 * (i + 1)) for i in range(count)])
    return TokenLogprob(token, -0.125, 1, top)


@dataclass(slots=True)
class _Paced:
    """A step that ends at `until`, with threads that compute till then."""

    output: StepOutput
    until: float
    busy_threads: int
    ended: float = 0.0

    def result(self) -> StepOutput:
        threads = [threading.Thread(target=_compute, args=(self.until,)) for _ in range(self.busy_threads)]
        for thread in threads:
            thread.start()
        time.sleep(max(0.0, self.until - time.monotonic()))
        for thread in threads:
            thread.join()
        self.ended = time.monotonic()
        return self.output


def _compute(until: float) -> None:
    """Keep one core busy, without Python's lock."""
    while time.monotonic() < until:
        hashlib.blake2b(STIR).digest()


class PacedWorker:
    """An InstantWorker whose steps take their time; what it pretends to be stands in the checkpoint's folder.

    When it ends, it leaves a file there with the time between one step's end and the next one's beginning, which is all
    that the engine process does besides: [when, seconds] of each, both of `time.monotonic()`.
    """

    def __init__(self, _config: EngineConfig, folder: Path, _on_phase: Callable[[Phase], None]) -> None:
        self._script = msgspec.json.decode((folder / SCRIPT).read_bytes(), type=Script)
        self._inner = InstantWorker(self._script)
        self._folder = folder
        self._last = _Paced(StepOutput(0, ()), 0.0, 0)
        self._gaps: list[tuple[float, float]] = []

    def capacity(self) -> Capacity:
        return self._inner.capacity()

    def prepare(self, _: Request) -> None:
        """Nothing here has a grammar."""

    def submit(self, plan: StepPlan) -> _Done | _Paced:
        now = time.monotonic()
        self._gaps.append((now, now - self._last.ended))
        done, period = self._inner.submit(plan), self._script.step_seconds
        if not period or not plan.items:
            return done
        until = (time.monotonic() // period + 1) * period
        self._last = _Paced(done.output, until, self._script.busy_threads)
        return self._last

    def num_states(self) -> int:
        return self._inner.num_states()

    def close(self) -> None:
        (self._folder / GAPS).write_bytes(msgspec.json.encode(self._gaps))
        self._inner.close()
