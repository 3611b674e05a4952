"""Sends the requests of one measured point, by so many clients or by a timetable, and keeps what became of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.client import Server
from benchmarks.serve_prompts import Job
from benchmarks.stream import AnswerReader, RequestFailed, Timing

OK, INTERRUPTED = "ok", "interrupted"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Times are `time.monotonic()`; `planned` is when a timetable wanted it sent.

    `kind` is "ok", "interrupted", or what failed: connect, timeout, cut, malformed, error_event, http_503 and so on.
    `timing` is there for "ok" alone; `counted` says that it has no usage of the server's, so tokens are chunks.
    """

    number: int
    sent: float
    ended: float
    kind: str
    message: str = ""
    planned: float | None = None
    chunks: int = 0
    counted: bool = False
    timing: Timing | None = None


class Sender:
    """Sends jobs to one endpoint; `outcomes` are all that have ended, in the order of their ends."""

    def __init__(self, server: Server, path: str, timeout: float) -> None:
        self.outcomes: list[Outcome] = []
        self._server = server
        self._path = path
        self._timeout = timeout
        self._readers: set[AnswerReader] = set()

    @property
    def in_flight(self) -> int:
        return len(self._readers)

    @property
    def chunks(self) -> int:
        """Chunks received so far, of answers that have ended and of those that run."""
        return sum(outcome.chunks for outcome in self.outcomes) + sum(len(reader.chunks) for reader in self._readers)

    async def send(self, job: Job, planned: float | None = None) -> None:
        """Send one, whatever becomes of it. When it is cancelled, that is its outcome, and the cancelling goes on."""
        reader = AnswerReader()
        self._readers.add(reader)
        kind, message, sent = OK, "", time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                await self._server.stream(self._path, job.body, reader)
        except RequestFailed as error:
            kind, message = error.kind, str(error)
        except TimeoutError:
            kind, message = "timeout", f"no whole answer within {self._timeout:g} s"
        except asyncio.CancelledError:
            kind = INTERRUPTED
            raise
        finally:
            ended = time.monotonic()
            self._readers.discard(reader)
            timing = _timing(job, sent, ended, reader) if kind == OK else None
            counted = timing is not None and reader.usage is None
            self.outcomes.append(
                Outcome(job.number, sent, ended, kind, message, planned, len(reader.chunks), counted, timing)
            )


def _timing(job: Job, sent: float, ended: float, reader: AnswerReader) -> Timing:
    """With the server's own counts, or with chunks for tokens and our count of the prompt."""
    usage = reader.usage
    texts = sum(bool(chunk.text) for chunk in reader.chunks)
    prompt, completion = (usage.prompt_tokens, usage.completion_tokens) if usage else (job.prompt_tokens, texts)
    return Timing(sent, ended, tuple(reader.chunks), prompt, completion)


async def closed_loop(sender: Sender, jobs: Iterable[Job], clients: int, seconds: float | None) -> None:
    """`clients` clients take the next job as soon as they have their answer, until `seconds` have passed."""
    waiting: Iterator[Job] = iter(jobs)
    until = None if seconds is None else time.monotonic() + seconds

    async def client() -> None:
        while (until is None or time.monotonic() < until) and (job := next(waiting, None)) is not None:
            await sender.send(job)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())


async def open_loop(sender: Sender, jobs: Sequence[Job], times: Sequence[float]) -> None:
    """Each job is sent at its time, in seconds from now, however many are still running."""
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for job, at in zip(jobs, times, strict=True):
            planned = began + at
            if (wait := planned - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            group.create_task(sender.send(job, planned))


async def until_stopped(work: Coroutine[None, None, None], stop: asyncio.Event) -> bool:
    """Run `work` to its end, or until `stop` is set, which cancels it; True if it came to its end."""
    task, stopper = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopper}, return_when=asyncio.FIRST_COMPLETED)
        ended = task.done()
        if ended:
            task.result()
        return ended
    finally:
        task.cancel()
        stopper.cancel()
        await asyncio.gather(task, stopper, return_exceptions=True)
