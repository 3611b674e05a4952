"""A crowd of streaming clients on bare sockets: bytes are stamped as they come, and looked at later."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from benchmarks.stream import BenchmarkError, Piece


@dataclass(frozen=True, slots=True)
class Ask:
    """What every client of a crowd asks for."""

    path: str
    body: dict[str, object]


class _Listener(asyncio.Protocol):
    """One streamed answer; `pieces` is what the socket gave, HTTP framing and all."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.pieces: list[Piece] = []
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002  as in the base
        self.open = False


class Crowd:
    """`size` clients of one server. Use it as an async context manager: leaving it hangs up."""

    def __init__(self, url: str, ask: Ask, size: int) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "", parts.port or 80
        body = msgspec.json.encode(ask.body)
        head = f"POST {ask.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode("ascii") + body
        self._size = size
        self._listeners: list[_Listener] = []

    async def __aenter__(self) -> Crowd:
        loop = asyncio.get_running_loop()
        for _ in range(self._size):
            _, listener = await loop.create_connection(lambda: _Listener(self._request), *self._address)
            self._listeners.append(listener)
        return self

    async def __aexit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.transport.abort()

    async def flowing(self, seconds: float) -> None:
        """Wait until every answer has some chunks. Raises BenchmarkError for refusals and after `seconds`."""
        began = time.monotonic()
        while min(len(listener.pieces) for listener in self._listeners) < 4:
            self._check()
            if time.monotonic() - began > seconds:
                raise BenchmarkError(f"not all of {self._size} answers began within {seconds:.0f} s")
            await asyncio.sleep(0.02)

    def pieces(self, begin: float, end: float) -> list[Piece]:
        """What all of them got between two times. Raises BenchmarkError if an answer ended early."""
        self._check()
        return [piece for listener in self._listeners for piece in listener.pieces if begin <= piece[0] < end]

    def _check(self) -> None:
        for listener in self._listeners:
            head = b"".join(data for _, data in listener.pieces[:2])
            if not listener.open or (head and not head.startswith(b"HTTP/1.1 200")):
                raise BenchmarkError(f"an answer is none: {head[:500].decode(errors='replace')}")
