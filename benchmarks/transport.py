"""HTTP connections of a load generator: each request in flight has one of its own, and nobody looks at the others.

The usual pool of httpx looks through all its connections whenever a request begins or ends. With 128 at once that
is two thirds of what a streamed chunk costs the client (about 145 microseconds against 50).
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from functools import cached_property

import httpx


class _Body(httpx.AsyncByteStream):
    """The body of a response, which gives its connection back once it is closed."""

    def __init__(self, inner: httpx.AsyncByteStream, give_back: Callable[[], None]) -> None:
        self._inner = inner
        self._give_back = give_back

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._inner:
            yield part

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            self._give_back()


class OneConnectionEach(httpx.AsyncBaseTransport):
    """As many connections as there are requests in flight, kept alive and used again, the latest one first."""

    def __init__(self) -> None:
        self._all: set[httpx.AsyncHTTPTransport] = set()
        self._idle: list[httpx.AsyncHTTPTransport] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        transport = self._idle.pop() if self._idle else self._open(request.url.scheme == "https")
        try:
            response = await transport.handle_async_request(request)
        except BaseException:
            self._idle.append(transport)  # its own small pool has dropped the broken connection
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Body(response.stream, lambda: self._idle.append(transport))
        return response

    async def close_idle(self) -> None:
        """Close the connections that no request uses."""
        while self._idle:
            transport = self._idle.pop()
            self._all.discard(transport)
            await transport.aclose()

    async def aclose(self) -> None:
        for transport in self._all:
            await transport.aclose()

    @cached_property
    def _certificates(self) -> ssl.SSLContext:
        return httpx.create_ssl_context(trust_env=False)  # a tenth of a second: once, and only where it is needed

    @cached_property
    def _no_certificates(self) -> ssl.SSLContext:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # for plain HTTP; a new one for each connection would be slow

    def _open(self, secure: bool) -> httpx.AsyncHTTPTransport:
        context = self._certificates if secure else self._no_certificates
        transport = httpx.AsyncHTTPTransport(verify=context, trust_env=False)
        self._all.add(transport)
        return transport
