"""A bare streaming client for `benchmarks.overhead`: bytes are stamped as the socket gives them.

httpx spends about 0.1 ms on every chunk, which is 3 ms for 32 of them on the cores that are being measured: as much
as the whole of what is to be found out. This one spends a third of that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import httptools

from benchmarks.client import completion_body
from benchmarks.stream import BenchmarkError, Piece, Timing, read_answer


class _Response(asyncio.Protocol):
    """One request on a connection of its own; `pieces` is what came after the headers."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0
        self.sent = 0.0
        self.pieces: list[Piece] = []
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.sent = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        self._finish(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._finish(error or ConnectionError("the connection was closed early"))

    def _finish(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(self._parser.get_status_code())
        else:
            self.ended.set_exception(error)


async def complete(url: str, model: str, prompt: Sequence[int], max_tokens: int) -> Timing:
    """As `client.Server.complete`, for token ids, with the count of tokens in every chunk. Raises BenchmarkError."""
    parts = urlsplit(url)
    body = completion_body(model, prompt, max_tokens, usage_each=True)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    try:
        transport, response = await loop.create_connection(
            lambda: _Response(head.encode("ascii") + body), parts.hostname or "", parts.port or 80
        )
        try:
            status = await response.ended
        finally:
            transport.close()
    except OSError as error:
        raise BenchmarkError(f"{url}: {error}") from error
    if status != 200:
        text = b"".join(data for _, data in response.pieces).decode(errors="replace")
        raise BenchmarkError(f"{url}: HTTP {status}: {text[:500]}")
    return read_answer(response.sent, response.pieces, max_tokens)
