"""uvicorn with our limits and our way to end: the port stays open while requests in flight finish."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import socket
from functools import partial
from types import FrameType

import h11
import msgspec
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from server import direct
from server.errors import ApiError, unavailable
from server.lifecycle import Lifecycle
from server.service import Service
from server.settings import Settings
from server.tls import Certificates, certificates

log = logging.getLogger(__name__)

CLOSING_SECONDS = 5  # for responses to reach their clients once the engines are closed
OPEN_FILES = 65_536
REFRESH_TICKS = 20  # of 0.1 s, between two looks at the files of the certificate


def run(app: FastAPI, settings: Settings, sockets: list[socket.socket] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, which drain (a second one: at once). Raises what made an engine fail to start.

    `sockets` listen already; without them, host and port are bound here. Raises ConfigError for a wrong certificate.
    """
    _raise_file_limit()
    server = make_server(app, settings)
    _calm_collector()
    server.run(sockets)
    if server.lifecycle.failure is not None:
        raise server.lifecycle.failure


def make_server(app: FastAPI, settings: Settings) -> Server:
    """The server of `run`, for a caller with an event loop of its own (`await server.serve()`)."""
    config = Config(
        app,
        host=settings.host,
        port=settings.port,
        http=_protocol(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.idle_timeout,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        h11_max_incomplete_event_size=settings.max_header_bytes,
    )
    service = app.state.service
    assert isinstance(service, Service)
    found = certificates(settings)
    if found is not None:
        config.load()
        config.ssl = found.context
    return Server(config, service.lifecycle, settings.drain_timeout, found)


class Server(uvicorn.Server):
    """The first signal refuses new requests with 503 and lets those in flight finish; the second one does not wait."""

    def __init__(
        self, config: Config, lifecycle: Lifecycle, drain_timeout: float, certificates: Certificates | None = None
    ) -> None:
        super().__init__(config)
        self.lifecycle = lifecycle
        self._drain_timeout = drain_timeout
        self._certificates = certificates

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  as in the base
        # The base class would also raise the signal again at the end, past all exit handlers.
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._certificates is not None and counter % REFRESH_TICKS == 0:
            self._certificates.refresh()
        return await super().on_tick(counter) or self.lifecycle.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain = asyncio.ensure_future(self.lifecycle.drain(self._drain_timeout))
        while not drain.done() and not self.force_exit:
            await asyncio.wait((drain,), timeout=0.1)
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=True)
        await self.lifecycle.close()
        await super().shutdown(sockets)
        if self.force_exit:  # then the base class has left this out
            await self.lifespan.shutdown()


class SocketWriter:
    """`direct.ChunkWriter` of the exchange that a connection is in."""

    def __init__(self, cycle: RequestResponseCycle, flow: FlowControl, transport: asyncio.Transport) -> None:
        self.sent = 0
        self._cycle = cycle
        self._flow = flow
        self._transport = transport
        # Without a length HTTP/1.1 cuts a body into chunks, HTTP/1.0 ends it by hanging up, and HEAD has none.
        self._chunked = cycle.scope["http_version"] == "1.1" and cycle.scope["method"] != "HEAD"

    def ready(self) -> bool:
        cycle = self._cycle
        begun = cycle.response_started and not (cycle.response_complete or cycle.disconnected)
        return self._chunked and begun and not self._flow.write_paused

    def write(self, data: bytes) -> None:
        self.sent += len(data)
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class BoundedProtocol(H11Protocol):
    """h11 with a limit on connections and on the time that a request's headers may take.

    h11 itself bounds the size of the headers. What can't be read as HTTP at all is answered in the shape
    that all our errors have.
    """

    max_connections = 0
    header_timeout = 0.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in the base
        super().connection_made(transport)
        self.app = partial(self._lend_writer, self.app)
        self._watch_headers()
        if len(self.connections) > self.max_connections:
            self._refuse(unavailable("The server has too many connections; please retry.", "overloaded"))

    async def _lend_writer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        scope[direct.KEY] = SocketWriter(self.cycle, self.flow, self.transport)
        await app(scope, receive, send)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watch()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_headers()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _watch_headers(self) -> None:
        """A clock runs while a request's headers are on their way, or the rest of a body that was refused unread."""
        headers = self.conn.their_state is h11.IDLE
        leftover = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        waiting = (headers or leftover) and self.timeout_keep_alive_task is None
        if waiting and self._deadline is None:
            self._deadline = self.loop.call_later(self.header_timeout, self._give_up)
        elif not waiting:
            self._stop_watch()

    def _stop_watch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._refuse(ApiError(408, "The request's headers did not arrive in time.", code="timeout"))

    def _refuse(self, error: ApiError) -> None:
        body = msgspec.json.encode(error.body())
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers |= error.headers or {}
        with contextlib.suppress(h11.LocalProtocolError):  # a response is under way already: just hang up
            for event in (
                h11.Response(status_code=error.status_code, headers=list(headers.items())),
                h11.Data(body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # what the application still has to say would not fit behind this
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def _protocol(settings: Settings) -> type[BoundedProtocol]:
    limits = {"max_connections": settings.max_connections, "header_timeout": settings.header_timeout}
    return type("Protocol", (BoundedProtocol,), limits)


def _calm_collector() -> None:
    """Every chunk makes objects, none of them in a cycle; what is imported stays. See `engine/cluster/memory.py`."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _raise_file_limit() -> None:
    """Each connection is an open file, and many systems start with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
