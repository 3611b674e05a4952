"""When the engine's steps end, and what each gave to whom: the server's side of `benchmarks.overhead`.

`TimedWorker` is the usual worker with a watch; it writes one line per step to the log of its process. It runs in the
engine process of a real server, and in this module's own `main`, which is an EngineCore in one process without any
front: prompts come as a line of JSON on stdin, and a line on stdout says that they are done.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

from engine.cluster.process import prepare_threads
from engine.config import EngineConfig, load
from engine.core import EngineCore
from engine.errors import ConfigError
from engine.hub.resolve import resolve
from engine.protocols import StepHandle, WorkerFactory
from engine.registry import WORKERS
from engine.registry import resolve as look_up
from engine.types import Capacity, Phase, Request, SamplingParams, StepOutput, StepPlan

logger = logging.getLogger(__name__)

TIMED_WORKER = "benchmarks.engine_steps:TimedWorker"
_MARK = "engine step "  # what a log line is found by


class Step(msgspec.Struct, frozen=True):
    """A step that ended `at` (`time.monotonic()`). `tokens` holds (prompt key, new tokens) pairs.

    `fed` is the number of sequences in it; where it equals the number of pairs, every one of them got a token.
    """

    at: float
    fed: int
    tokens: list[tuple[str, int]]


class Order(msgspec.Struct, frozen=True):
    """One line to `main`: complete these prompts together, each with exactly `max_tokens` tokens."""

    prompts: list[list[int]]
    max_tokens: int


def prompt_key(ids: Iterable[int]) -> str:
    """A short name of a prompt that is the same on both sides of the server."""
    return hashlib.blake2s(repr(tuple(ids)).encode(), digest_size=5).hexdigest()


class StepRecorder:
    """Turns plans and outputs into Steps; knows which prompt a request id stands for."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}

    def plan(self, plan: StepPlan) -> None:
        for request_id in plan.dropped:
            self._keys.pop(request_id, None)
        for admission in plan.admitted:
            self._keys[admission.request.id] = prompt_key(admission.request.prompt_ids)

    def ended(self, at: float, output: StepOutput) -> Step:
        pairs = [(self._keys[r.request_id], len(r.new_tokens)) for r in output.results if r.new_tokens]
        return Step(at, len(output.results), pairs)


@dataclass(frozen=True, slots=True)
class TimedHandle:
    inner: StepHandle
    recorder: StepRecorder

    def result(self) -> StepOutput:
        output = self.inner.result()
        step = self.recorder.ended(time.monotonic(), output)
        if step.fed:
            logger.info("%s", _MARK + msgspec.json.encode(step).decode())
        return output


class TimedWorker:
    """The local worker, with the end of each step written to the log. Needs `scheduler.lag` 0 to see it in time."""

    def __init__(self, config: EngineConfig, folder: Path, on_phase: Callable[[Phase], None]) -> None:
        if config.scheduler.lag:
            raise ConfigError("scheduler.lag: with 1, the end of a step can't be seen from outside; measure with 0")
        factory = cast(WorkerFactory, look_up(WORKERS, "local", "worker"))
        self._inner = factory(config, folder, on_phase)
        self._recorder = StepRecorder()

    def capacity(self) -> Capacity:
        return self._inner.capacity()

    def prepare(self, request: Request) -> None:
        self._inner.prepare(request)

    def submit(self, plan: StepPlan) -> TimedHandle:
        self._recorder.plan(plan)
        return TimedHandle(self._inner.submit(plan), self._recorder)

    def num_states(self) -> int:
        return self._inner.num_states()

    def close(self) -> None:
        self._inner.close()


def read_steps(log: Path, began: float) -> list[Step]:
    """The steps in a log that ended after `began`, among whatever else is in it."""
    steps = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        _, mark, data = line.partition(_MARK)
        if mark:
            steps.append(msgspec.json.decode(data, type=Step))
    return [step for step in steps if step.at >= began]


def full_steps(steps: Sequence[Step], streams: int) -> list[float]:
    """Seconds between the ends of neighbouring steps in which all `streams` sequences got one token each."""
    full = [step.fed == streams and [n for _, n in step.tokens] == [1] * streams for step in steps]
    pairs = zip(steps, steps[1:], full, full[1:], strict=False)
    return [later.at - step.at for step, later, a, b in pairs if a and b]


def main(arguments: Sequence[str]) -> int:
    """`CONFIG CACHE_DIR`: the first model of a configuration file, driven step by step as the lines on stdin say."""
    config_path, cache_dir = arguments
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    config = load(config_path).engines()[0]
    prepare_threads(config)  # as an engine process does, and as early: torch is imported with the worker
    folder = resolve(config.model.path, Path(cache_dir).expanduser())
    core = EngineCore(TimedWorker(config, folder, _ignore), config)
    _complete(core, Order([[0]], 1), "warm-up")
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        _complete(core, msgspec.json.decode(line, type=Order), str(number))
        print("done", flush=True)
    core.close()
    return 0


def _ignore(_phase: Phase) -> None:
    pass


def _complete(core: EngineCore, order: Order, name: str) -> None:
    sampling = SamplingParams(max_tokens=order.max_tokens, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(order.prompts):
        core.add(Request(f"{name}-{i}", tuple(prompt), sampling, arrival=time.monotonic()))
    while core.has_work():
        core.step()
    core.settle()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
