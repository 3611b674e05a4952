"""From start to end: load the engines in the background, say when they are ready, drain, close."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from functools import partial

from engine.types import Phase
from server.contract import Engine, Metrics
from server.errors import unavailable

log = logging.getLogger(__name__)


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Lifecycle:
    """Owns the state of the server. Requests are served in READY only."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        metrics: Metrics,
        on_phase: Callable[[Phase], None],
        on_ready: Callable[[], None],
    ) -> None:
        self.state = State.STARTING
        self.paused = False  # an operator wants no new requests for now
        self.phase = "start"  # the last start-up phase that ended
        self.failure: Exception | None = None
        self._engines = engines
        self._metrics = metrics
        self._on_phase = on_phase
        self._on_ready = on_ready
        self._settled = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._closed = False

    def begin(self) -> None:
        """Start the engines in a task, so that /health answers while they load."""
        self._starting = asyncio.create_task(self._start())

    async def settled(self) -> None:
        """Wait until the engines are ready. Raises what made them fail."""
        await self._settled.wait()
        if self.failure is not None:
            raise self.failure

    def check_ready(self) -> None:
        """Raises ApiError 503 in any state but READY, and while it is paused."""
        match self.state:
            case State.STARTING:
                raise unavailable(f"The server is starting (after: {self.phase}); please retry.", "starting", 2)
            case State.DRAINING:
                raise unavailable("The server is shutting down; please retry elsewhere.", "draining", 5)
            case State.FAILED:
                raise unavailable("The server could not start.", "engine_unavailable", 30)
        if self.paused:
            raise unavailable("The server takes no requests for now; please retry elsewhere.", "draining", 5)

    def trouble(self, models: Sequence[str]) -> list[str]:
        """Which of these models are not well, and why. One that loads or drains is no trouble by itself."""
        if self.state in (State.STARTING, State.FAILED):
            return [str(self.state)] * len(models)
        healths = {name: self._engines[name].health() for name in models}
        return [f"{name}: {health.reason or 'not healthy'}" for name, health in healths.items() if not health.ok]

    def unready(self, models: Sequence[str]) -> list[str]:
        """Which of these models should get no traffic, and why."""
        if self.state is not State.READY or self.paused:
            return [str(State.DRAINING if self.paused else self.state)] * len(models)
        healths = {name: self._engines[name].health() for name in models}
        waiting = [f"{name}: not ready" for name, health in healths.items() if health.ok and not health.ready]
        return [*self.trouble(models), *waiting]

    async def drain(self, timeout: float) -> None:
        """Refuse new requests from now on and give those in flight `timeout` seconds."""
        was_ready = self.state is State.READY
        if self.state is not State.FAILED:
            self.state = State.DRAINING
        if was_ready:
            log.info("draining: requests in flight have %g seconds", timeout)
            await asyncio.gather(*(engine.drain(timeout) for engine in self._engines.values()))

    async def close(self) -> None:
        """Stop the engines; streams that are still open end with an error. May be called again."""
        if self._closed:
            return
        self._closed = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        results = await asyncio.gather(*(e.close() for e in self._engines.values()), return_exceptions=True)
        for problem in results:
            if isinstance(problem, Exception):
                log.error("closing an engine failed: %s", problem)

    async def _start(self) -> None:
        try:
            # One after the other: what steps cost is measured on a machine that does nothing else, and each one's
            # memory beside what those before it have taken.
            for name, engine in self._engines.items():
                await engine.start(partial(self._note_phase, f"{name}: " if len(self._engines) > 1 else ""))
                engine.add_observer(self._metrics.observer(name, engine.info))
                self._metrics.watch(name, partial(_is_healthy, engine))
        except Exception as error:
            log.debug("start-up failed: %s", error)  # `run` raises it, and the command says it
            self.failure, self.state = error, State.FAILED
        else:
            if self.state is State.STARTING:
                self.state = State.READY
                self._on_ready()
        finally:
            self._settled.set()

    def _note_phase(self, model: str, phase: Phase) -> None:
        self.phase = model + phase.name
        self._on_phase(replace(phase, name=self.phase))


def _is_healthy(engine: Engine) -> bool:
    return engine.health().ok
