"""Sends the requests of a batch, many at once, and asks again where a server says that it is busy."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import msgspec

from server.batch.lines import BadLine, Task
from server.batch.output import Output
from server.batch.progress import Progress

RETRIED = frozenset((408, 429, 502, 503, 504))
LONGEST_PAUSE = 30.0  # seconds
PATIENCE = 120.0  # seconds that a server may ask to wait


class Unreachable(Exception):
    """The server has gone for good; what is left can be asked for in another run."""


@dataclass(frozen=True, slots=True)
class Effort:
    """`retries`: further attempts; the first comes after about `pause` seconds, each next one after twice as many."""

    concurrency: int
    retries: int
    pause: float = 0.5


class Work:
    """One run. Every line read ends in exactly one line written, unless the server goes away."""

    def __init__(self, client: httpx.AsyncClient, output: Output, progress: Progress, effort: Effort) -> None:
        self._client = client
        self._output = output
        self._progress = progress
        self._effort = effort

    async def run(self, lines: Iterator[Task | BadLine]) -> None:
        """Raises Unreachable, and OSError where the files can't be read or written."""
        done = frozenset(self._output.done)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._effort.concurrency):
                    group.create_task(self._worker(lines, done))
        except ExceptionGroup as group_error:  # the first one has ended the others
            raise group_error.exceptions[0] from None

    async def _worker(self, lines: Iterator[Task | BadLine], done: frozenset[str]) -> None:
        for line in lines:  # which all workers share
            if isinstance(line, BadLine):
                self._output.failed(line)
                self._progress.failed(line.message)
            elif line.custom_id in done:
                self._progress.skipped()
            else:
                await self._do(line)

    async def _do(self, task: Task) -> None:
        response = await self._answer(task)
        body: object
        try:
            body = msgspec.json.decode(response.content)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            problem = f"the server answered {response.status_code} with something else than JSON"
            self._output.failed(BadLine(task.custom_id, "invalid_answer", problem))
            self._progress.failed(f"{task.custom_id}: {problem}")
            return
        self._output.answered(task.custom_id, response.status_code, response.headers.get("x-request-id", ""), body)
        if response.status_code == 200:
            self._progress.answered()
        else:
            self._progress.failed(f"{task.custom_id}: HTTP {response.status_code}")

    async def _answer(self, task: Task) -> httpx.Response:
        """The first answer that another attempt would not change, or the last one. Raises Unreachable."""
        for attempt in range(self._effort.retries + 1):
            last = attempt == self._effort.retries
            asked: float | None = None
            try:
                response = await self._client.post(task.url.removeprefix("/v1/"), json=task.body)
            except httpx.TransportError as error:
                if last:
                    reason = str(error) or type(error).__name__
                    raise Unreachable(f"the server does not answer any more: {reason}") from error
            else:
                if last or response.status_code not in RETRIED or response.headers.get("x-should-retry") == "false":
                    return response
                asked = _seconds(response.headers.get("retry-after"))
            if asked is None:
                asked = min(self._effort.pause * 2.0**attempt, LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            await asyncio.sleep(asked)
        raise AssertionError("the last attempt returns or raises")


def _seconds(retry_after: str | None) -> float | None:
    """What the header asks for, if it is a number of seconds that somebody may wait."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return min(seconds, PATIENCE) * random.uniform(1.0, 1.1) if seconds >= 0 else None
