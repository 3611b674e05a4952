"""Answers on the wire: server-sent events, and a client that leaves in the middle.

Each event of an endpoint with choices is one line `data: <json>` and a blank line, the last one `data: [DONE]`. An
error after the 200 is an event with an `error`, then `[DONE]`: a silent end would look like a short success. Other
endpoints write on a `Sheet` of their own. While a stream is silent, comments keep proxies from cutting it. A client
that has gone is noticed while anything is awaited, streamed or not, and its requests are cancelled at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import SlipstreamError
from engine.types import TokenEvent
from server.answers import Choices, Fields, Meter, head, join, whole_answer
from server.contract import EventStream
from server.convert import Job
from server.direct import ChunkWriter, writer_of
from server.errors import ApiError, to_api_error
from server.schemas import GenerationBody, StreamOptions
from server.service import service_of

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
CLIENT_GONE = 499  # never sent; for metrics and the log

T = TypeVar("T")


class Gone(Exception):
    """The client has closed its connection."""


class Sheet(Protocol):
    """How an endpoint writes the answer to one job: as a stream, in pieces of bytes, or whole."""

    def opening(self) -> bytes:
        """Before the first event; may be empty, as all of these may."""
        ...

    def event(self, event: TokenEvent) -> bytes:
        """Raises for an end that is no answer, as `answers.finish_word` does."""
        ...

    def closing(self) -> bytes:
        """Behind the last event; an event is missing only where somebody else has cancelled the request."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """The end of a stream that went wrong, in place of `closing` or in the middle of it."""
        ...

    def whole(self, events: Sequence[Sequence[TokenEvent]]) -> Fields:
        """The body of an answer that is not streamed; `events` holds those of each choice, in order."""
        ...


async def respond(
    request: Request, body: GenerationBody, job: Job, choices: Choices, param: str, quiet: float
) -> Response:
    """Run a job of an endpoint with choices and answer it, as a stream if the body asks for one; see `answer`."""
    stream = await submit(request, job, param)
    sheet = Frame(job, choices, body.stream_options, body.stream_interval or 1)
    return EventStreamResponse(stream, sheet, quiet) if body.stream else await answer(request, job, stream, sheet)


async def submit(request: Request, job: Job, param: str) -> EventStream:
    """Queue a job; `param` is the client's name of its prompt. What is known to be wrong is raised now."""
    return await service_of(request).flights.submit(request.scope, job.engine, job.requests, param)


async def answer(request: Request, job: Job, stream: EventStream, sheet: Sheet) -> Response:
    """The answer to a job that is not streamed. Raises what ends it, so that it becomes an HTTP error."""
    try:
        async with aclosing(stream):
            events = await or_gone(request.receive, _collect(stream, job))
    except Gone:
        return Response(status_code=CLIENT_GONE)
    return Response(msgspec.json.encode(sheet.whole(events)), media_type="application/json")


async def or_gone(receive: Receive, work: Coroutine[None, None, T]) -> T:
    """The result of `work`, or Gone as soon as the client has left; `work` is cancelled then."""
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _collect(stream: EventStream, job: Job) -> list[list[TokenEvent]]:
    events: list[list[TokenEvent]] = [[] for _ in job.requests]
    async for event in stream:
        events[job.index_of(event.request_id)].append(event)
    return events


def sse(fields: Fields, kind: str = "") -> bytes:
    """One event; with a `kind`, that is its name."""
    name = f"event: {kind}\n".encode() if kind else b""
    return b"".join((name, b"data: ", msgspec.json.encode(fields), b"\n\n"))


class Frame:
    """Puts choices into chunks."""

    def __init__(self, job: Job, choices: Choices, options: StreamOptions | None, interval: int = 1) -> None:
        self._meter = Meter(job)
        self._include_usage = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)
        self._head = b"data: " + msgspec.json.encode(head(job, choices.chunk_kind))[:-1] + b',"choices":'
        self._job = job
        self._choices = choices
        self._interval = interval
        self._held: dict[int, list[TokenEvent]] = {}  # by choice, until they are so many tokens

    def opening(self) -> bytes:
        """One chunk per choice, the first of all with the fields that are sent once; may be empty."""
        first = [self._choices.opening(index) for index in range(len(self._job.requests))]
        extras = self._choices.extras(None)
        return b"".join(
            self._chunk([choice], extras if index == 0 else None)
            for index, choice in enumerate(first)
            if choice is not None
        )

    def event(self, event: TokenEvent) -> bytes:
        """The chunks of an event, mostly one; empty where it has nothing to tell. Raises as `answers.finish_word`."""
        index = self._job.index_of(event.request_id)
        self._meter.note(index, event)
        if self._interval > 1:
            held = self._held.setdefault(index, [])
            held.append(event)
            if event.finish is None and sum(len(one.token_ids) for one in held) < self._interval:
                return b""
            event, self._held[index] = join(held), []
        pieces = self._choices.pieces(index, event)
        if len(pieces) < 2:
            return self._chunk([pieces[0]]) if pieces else b""
        return b"".join([*(self._chunk([piece], last=False) for piece in pieces[:-1]), self._chunk([pieces[-1]])])

    def closing(self) -> bytes:
        """The chunk without choices, with the usage of the whole answer, where somebody asked for it; and the end."""
        return self._chunk([]) + DONE if self._include_usage else DONE

    def failed(self, error: ApiError) -> bytes:
        return sse(error.body()) + DONE

    def whole(self, events: Sequence[Sequence[TokenEvent]]) -> Fields:
        return whole_answer(self._job, self._choices, events)

    def _chunk(self, choices: list[Fields], extras: Fields | None = None, last: bool = True) -> bytes:
        """The last chunk of a stream also has what drafting and denoising did for all choices, where that is told."""
        rest: Fields = {}
        if self._continuous or not choices:
            rest["usage"] = self._meter.usage()
        elif self._include_usage:
            rest["usage"] = None
        if last and self._meter.complete and self._include_usage is not bool(choices):
            rest |= self._meter.reports()
        if extras:
            rest |= extras
        tail = b"," + msgspec.json.encode(rest)[1:] if rest else b"}"
        return b"".join((self._head, msgspec.json.encode(choices), tail, b"\n\n"))


class EventStreamResponse(Response):
    """Sends the events of `stream`, one chunk and one write each, and closes it however this ends.

    A chunk goes to the socket in the same turn of the event loop that brought the engine's news, where the connection
    can take it (`direct.py`); else it waits here, and what piles up behind it becomes one chunk.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: EventStream, sheet: Sheet, quiet: float) -> None:
        """`quiet`: seconds of silence before a comment."""
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._stream = stream
        self._sheet = sheet
        self._quiet = quiet
        self._clock = asyncio.get_running_loop().time
        self._last = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._stream):
            comments = asyncio.ensure_future(self._comment(send))
            try:
                await or_gone(receive, self._send(send, writer_of(scope)))
            except (Gone, OSError):
                log.debug("the client left a stream")
            finally:
                comments.cancel()
                await asyncio.gather(comments, return_exceptions=True)

    async def _send(self, send: Send, writer: ChunkWriter | None) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._last = self._clock()
        async with aclosing(self._chunks(writer)) as chunks:
            async for data in chunks:
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    self._last = self._clock()
        self._last = float("inf")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self, writer: ChunkWriter | None) -> AsyncGenerator[bytes, None]:
        """What does not go the short way; never raises an error of the engine."""
        try:
            yield self._sheet.opening()
            if writer is not None:
                self._stream.divert(partial(self._write, writer))
            async for event in self._stream:
                yield self._sheet.event(event)
            yield self._sheet.closing()
        except Exception as error:
            if not isinstance(error, SlipstreamError):
                log.exception("a stream failed")
            yield self._sheet.failed(to_api_error(error))

    def _write(self, writer: ChunkWriter, event: TokenEvent) -> bool:
        """The short way of an event; False where it is closed."""
        if not writer.ready():
            return False
        data = self._sheet.event(event)
        if data:
            writer.write(data)
            self._last = self._clock()
        return True

    async def _comment(self, send: Send) -> None:
        while True:
            silence = self._clock() - self._last if self._last else 0.0
            if silence >= self._quiet:
                await send({"type": "http.response.body", "body": COMMENT, "more_body": True})
                self._last, silence = self._clock(), 0.0
            await asyncio.sleep(max(self._quiet - silence, 0.01))
