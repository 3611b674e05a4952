"""Answers on the wire: server-sent events, and a client that leaves in the middle.

Each event is one line `data: <json>` and a blank line, the last one `data: [DONE]`. An error after the 200 is an event
with an `error`, then `[DONE]`: a silent end would look like a short success. While a stream is silent, comments
keep proxies from cutting it. A client that has gone is noticed while anything is awaited, streamed or not, and its
requests are cancelled at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from functools import partial
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import SlipstreamError
from engine.types import TokenEvent
from server.answers import Choices, Fields, Meter, head, whole_answer
from server.contract import EventStream
from server.convert import Job
from server.direct import ChunkWriter, writer_of
from server.errors import to_api_error
from server.schemas import GenerationBody, StreamOptions

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
CLIENT_GONE = 499  # never sent; for metrics and the log

T = TypeVar("T")


class Gone(Exception):
    """The client has closed its connection."""


async def respond(
    request: Request, body: GenerationBody, job: Job, choices: Choices, param: str, quiet: float
) -> Response:
    """Run a job and answer it, as a stream if the body asks for one.

    `param` is the client's name of the prompt, `quiet` the seconds of silence before a comment. Errors that are
    known before the first token are raised, so that they become HTTP errors.
    """
    stream = await job.engine.submit(job.requests, param=param)
    if body.stream:
        return EventStreamResponse(stream, Frame(job, choices, body.stream_options), quiet)
    try:
        async with aclosing(stream):
            events = await or_gone(request.receive, _collect(stream, job))
    except Gone:
        return Response(status_code=CLIENT_GONE)
    return Response(msgspec.json.encode(whole_answer(job, choices, events)), media_type="application/json")


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


def sse(fields: Fields) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


class Frame:
    """Puts choices into chunks."""

    def __init__(self, job: Job, choices: Choices, options: StreamOptions | None) -> None:
        self._meter = Meter(job)
        self._include_usage = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)
        self._head = b"data: " + msgspec.json.encode(head(job, choices.chunk_kind))[:-1] + b',"choices":'
        self._job = job
        self._choices = choices

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
        """The chunk of an event; empty where it has nothing to tell. Raises what `answers.finish_word` raises."""
        index = self._job.index_of(event.request_id)
        self._meter.note(index, event)
        choice = self._choices.piece(index, event)
        return b"" if choice is None else self._chunk([choice])

    def closing(self) -> bytes:
        """The chunk without choices, with the usage of the whole answer; empty where nobody asked for it."""
        return self._chunk([]) if self._include_usage else b""

    def _chunk(self, choices: list[Fields], extras: Fields | None = None) -> bytes:
        """The last chunk of a stream also has what drafting and denoising did for all choices, where that is told."""
        rest: Fields = {}
        if self._continuous or not choices:
            rest["usage"] = self._meter.usage()
        elif self._include_usage:
            rest["usage"] = None
        if self._meter.complete and self._include_usage is not bool(choices):
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

    def __init__(self, stream: EventStream, frame: Frame, quiet: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._stream = stream
        self._frame = frame
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
            yield self._frame.opening()
            if writer is not None:
                self._stream.divert(partial(self._write, writer))
            async for event in self._stream:
                yield self._frame.event(event)
            yield self._frame.closing()
        except Exception as error:
            if not isinstance(error, SlipstreamError):
                log.exception("a stream failed")
            yield sse(to_api_error(error).body())
        yield DONE

    def _write(self, writer: ChunkWriter, event: TokenEvent) -> bool:
        """The short way of an event; False where it is closed."""
        if not writer.ready():
            return False
        data = self._frame.event(event)
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
