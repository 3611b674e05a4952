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
        return EventStreamResponse(stream, chunks(stream, job, choices, body.stream_options), quiet)
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


async def chunks(
    stream: EventStream, job: Job, choices: Choices, options: StreamOptions | None
) -> AsyncGenerator[bytes, None]:
    """The events of a stream, ready to be sent, one per engine event; never raises an error of the engine."""
    frame = Frame(job, choices, options)
    try:
        if opening := frame.opening():
            yield b"".join(opening)
        async for event in stream:
            index = job.index_of(event.request_id)
            frame.meter.note(index, event)
            choice = choices.piece(index, event)
            if choice is not None:
                yield frame.chunk([choice])
        if frame.include_usage:
            yield frame.chunk([])
    except Exception as error:
        if not isinstance(error, SlipstreamError):
            log.exception("a stream failed")
        yield sse(to_api_error(error).body())
    yield DONE


class Frame:
    """Puts choices into chunks."""

    def __init__(self, job: Job, choices: Choices, options: StreamOptions | None) -> None:
        self.meter = Meter(job)
        self.include_usage = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)
        self._head = head(job, choices.chunk_kind)
        self._job = job
        self._choices = choices

    def opening(self) -> list[bytes]:
        """One chunk per choice, the first of all with the fields that are sent once."""
        first = [self._choices.opening(index) for index in range(len(self._job.requests))]
        extras = self._choices.extras(None)
        return [
            self.chunk([choice], extras if index == 0 else None)
            for index, choice in enumerate(first)
            if choice is not None
        ]

    def chunk(self, choices: list[Fields], extras: Fields | None = None) -> bytes:
        """Without choices it is the last chunk, which has the usage of the whole answer.

        The last chunk of a stream also has what drafting and denoising did for all choices, where that is told.
        """
        fields: Fields = {**self._head, "choices": choices}
        if self._continuous or not choices:
            fields["usage"] = self.meter.usage()
        elif self.include_usage:
            fields["usage"] = None
        if self.meter.complete and self.include_usage is not bool(choices):
            fields |= self.meter.reports()
        return sse({**fields, **extras} if extras else fields)


class EventStreamResponse(Response):
    """Sends what `content` yields, one write each, and closes `stream` however this ends."""

    media_type = "text/event-stream"

    def __init__(self, stream: EventStream, content: AsyncGenerator[bytes, None], quiet: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._stream = stream
        self._content = content
        self._quiet = quiet
        self._last = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  ASGI
        async with aclosing(self._stream), aclosing(self._content):
            comments = asyncio.ensure_future(self._comment(send))
            try:
                await or_gone(receive, self._send(send))
            except (Gone, OSError):
                log.debug("the client left a stream")
            finally:
                comments.cancel()
                await asyncio.gather(comments, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        clock = asyncio.get_running_loop().time
        self._last = clock()
        async for data in self._content:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._last = clock()
        self._last = float("inf")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _comment(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            silence = clock() - self._last if self._last else 0.0
            if silence >= self._quiet:
                await send({"type": "http.response.body", "body": COMMENT, "more_body": True})
                self._last, silence = clock(), 0.0
            await asyncio.sleep(max(self._quiet - silence, 0.01))
