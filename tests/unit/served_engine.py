"""What the tests of AsyncEngine share: a started engine whose steps they can hold, and an observer that remembers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from engine.async_engine import AsyncEngine
from engine.types import EngineStats, Request, RequestSummary, SamplingParams, TokenEvent
from tests.unit.fake_worker import Gate

WORKER = "tests.unit.fake_worker:FakeWorker"
ids = (f"r{n}" for n in itertools.count())


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.steps = 0
        self.tokens: list[tuple[int, bool]] = []
        self.summaries: list[RequestSummary] = []
        self.rejected: list[str] = []

    def on_step(self, stats: EngineStats) -> None:
        self.steps = stats.steps

    def on_tokens(self, count: int, first: bool, interval: float) -> None:
        assert interval >= 0
        self.tokens.append((count, first))

    def on_finish(self, summary: RequestSummary) -> None:
        self.summaries.append(summary)

    def on_rejected(self, reason: str) -> None:
        self.rejected.append(reason)


class Engine:
    """A started engine, its gate and its observer."""

    def __init__(self, engine: AsyncEngine, gate: Gate) -> None:
        self.engine, self.gate, self.seen = engine, gate, Recorder()
        engine.add_observer(self.seen)

    async def settle(self) -> None:
        """Open the gate and wait until the process says that nothing is left of any request."""
        self.gate.open()
        while True:
            reply = await self.engine.check()
            assert reply.error == ""
            if not (reply.running or reply.waiting or reply.blocks_used or reply.device_states):
                break
        await until(lambda: (self.engine.stats.running, self.engine.stats.kv_blocks_used) == (0, 0))
        self.gate.shut()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def ask(prompt: int | tuple[int, ...] = 26, max_tokens: int = 5, **sampling: Any) -> Request:
    """A request; its prompt may be given as a number of tokens."""
    prompt_ids = (65,) * prompt if isinstance(prompt, int) else prompt
    return Request(next(ids), prompt_ids, SamplingParams(max_tokens, **sampling))


async def read(engine: AsyncEngine, *requests: Request) -> dict[str, list[TokenEvent]]:
    """Every event of the requests, by id."""
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    async with await engine.submit(requests) as stream:
        async for event in stream:
            events[event.request_id].append(event)
    return events


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)
