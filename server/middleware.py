"""What surrounds every HTTP exchange: request ids, numbers, a log line, and a last resort for errors.

Plain ASGI, so that streams flow and disconnects are seen by the route itself.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import MutableMapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.contract import Metrics
from server.direct import writer_of
from server.errors import REQUEST_ID, error_response
from server.limits import lease_of
from server.messages.errors import speaks

log = logging.getLogger(__name__)
access = logging.getLogger("server.access")

_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._:-]")
MAX_ID = 128
QUIET_PATHS = frozenset(
    ("/health", "/ready", "/metrics", "/load", "/ping", "/is_sleeping")
)  # probes and scrapes are no news


def request_id(scope: Scope) -> str:
    """The client's X-Request-Id without what does not belong into one, or a new id."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = _NOT_IN_IDS.sub("", value[: 2 * MAX_ID].decode("latin-1"))[:MAX_ID]
            if given:
                return given
    return uuid.uuid4().hex


class Exchange:
    """What is counted of one request and its response."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.id = request_id(scope)
        self.status = 0
        self.received = self.sent = 0
        self.began = time.monotonic()
        self._scope = scope
        self._send = send

    @property
    def handler(self) -> str:
        """The path template of the route, which is one of few; "none" where no route matched."""
        route = self._scope.get("route")
        return str(getattr(route, "path", "none"))

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            if speaks(self._scope):
                headers["request-id"] = self.id
            if (lease := lease_of(self._scope)) is not None:
                headers.update(lease.account.headers())
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        await self._send(message)

    def counting(self, receive: Receive) -> Receive:
        async def counted() -> Message:
            message = await receive()
            self.received += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            return message

        return counted


class Exchanges:
    """The outermost middleware.

    Also takes a slash off the end of paths, so that /v1/models/ is /v1/models, and says where the application lies:
    paths are understood with `root_path` in front and without it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, root_path: str, log_requests: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._root_path = root_path
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["root_path"] = self._root_path
        _strip_slash(scope)
        exchange = Exchange(scope, send)
        scope[REQUEST_ID] = exchange.id
        try:
            await self._app(scope, exchange.counting(receive), exchange.send)
        except Exception as error:
            log.exception("request %s failed", exchange.id)
            if exchange.status:  # too late for another answer; the server cuts the connection
                raise
            await error_response(error, scope)(scope, receive, exchange.send)
        finally:
            if (lease := lease_of(scope)) is not None:
                lease.release()
            self._note(scope, exchange)

    def _note(self, scope: Scope, exchange: Exchange) -> None:
        seconds = time.monotonic() - exchange.began
        method, status = scope["method"], exchange.status or 499
        writer = writer_of(scope)
        sent = exchange.sent + (0 if writer is None else writer.sent)
        self._metrics.observe_http(exchange.handler, method, status, seconds, exchange.received, sent)
        if self._log_requests and scope["path"] not in QUIET_PATHS:
            path = ascii(scope["path"][:200])
            access.info("%s %s %d %.1f ms %s", ascii(method[:16]), path, status, seconds * 1000, exchange.id)


def _strip_slash(scope: MutableMapping[str, object]) -> None:
    path = scope["path"]
    if isinstance(path, str) and len(path) > 1 and path.endswith("/"):
        scope["path"] = path.rstrip("/") or "/"
