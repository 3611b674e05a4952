"""A pair of connected sockets between the front process and one engine process.

They are made before the process, which inherits its end: no path, nobody else can connect, and the end of one side is
the end of file of the other. A message is a head (length of the body, one kind byte) and its body, see `messages.py`.
Sending never waits on either side: what the socket does not take stays in memory and goes along with the next message,
and what can be under way is bounded by the request limits. Malformed messages are logged and dropped.

No library stands between: its threads would have to wake up between a step and its news, while the next step keeps the
cores busy (ZeroMQ: 0.4 ms more for the engine's send, 0.4 ms more of the front's processor time; 0.1 and 0.1 so).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import cast

from msgspec.msgpack import Decoder

from engine.cluster.messages import (
    TO_ENGINE,
    TO_FRONT,
    M,
    MalformedMessage,
    Shutdown,
    ToEngine,
    ToFront,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0  # how long a closing engine process waits for its last words to leave
PIECE = 1 << 18  # bytes to read at once
_HEAD = struct.Struct("<Ic")


def pair() -> tuple[socket.socket, socket.socket]:
    """The front's end and the engine's, which its process must inherit. None of the two waits."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        end.setblocking(False)
    return ends


class Inbox:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._needed = _HEAD.size

    def feed(self, data: bytes, table: Mapping[bytes, Decoder[M]]) -> list[M]:
        """The messages that these bytes complete."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:  # of a long prompt, say
                return []
            data, self._rest = bytes(self._rest), bytearray()
        messages: list[M] = []
        whole, start = memoryview(data), 0
        while len(data) - start >= _HEAD.size:
            length, kind = _HEAD.unpack_from(data, start)
            end = start + _HEAD.size + length
            if len(data) < end:
                break
            with contextlib.suppress(_Dropped):
                messages.append(_decode_or_drop(kind, whole[start + _HEAD.size : end], table))
            start = end
        if start < len(data):
            self._rest += whole[start:]
            self._needed = _HEAD.size
            if len(self._rest) >= _HEAD.size:
                self._needed += _HEAD.unpack_from(self._rest)[0]
        return messages


class _Dropped(Exception):
    """A message was malformed."""


def _decode_or_drop(kind: bytes, body: memoryview, table: Mapping[bytes, Decoder[M]]) -> M:
    try:
        return decode((kind, body), table)
    except MalformedMessage as error:
        logger.warning("dropped a malformed message between processes: %s", error)
        raise _Dropped from error


def framed(kind: bytes, body: bytes) -> bytes:
    """A message as it travels."""
    return _HEAD.pack(len(body), kind) + body


class FrontChannel(asyncio.Protocol):
    """The front process's end, with `on_message` called on the event loop; `broken` has what it raised, if it did."""

    def __init__(self, on_message: Callable[[ToFront], None]) -> None:
        loop = asyncio.get_running_loop()
        self.broken: asyncio.Future[Exception] = loop.create_future()
        self.ended = asyncio.Event()  # the engine's end is closed, and all that it said has been told
        self._on_message = on_message
        self._inbox = Inbox()
        self._transport: asyncio.Transport | None = None

    async def open(self, end: socket.socket) -> None:
        """Begin; `end` belongs to the channel from now on."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=end)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        if self.broken.done():
            return
        try:
            for message in self._inbox.feed(data, TO_FRONT):
                self._on_message(message)
        except Exception as error:
            self.broken.set_result(error)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002  as in the base
        self.ended.set()

    def send(self, message: ToEngine) -> None:
        """Never waits: what is sent before the engine listens is kept for it."""
        self.send_raw(framed(*encode(message)))

    def send_raw(self, data: bytes) -> None:
        """Bytes as they are: `framed` ones, or a test's."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class EngineChannel:
    """The engine process's end. `receive` belongs to one thread; `send` is any thread's."""

    def __init__(self, end: socket.socket) -> None:
        end.set_inheritable(False)
        end.setblocking(False)
        self._socket = end
        self._inbox = Inbox()
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._closed = False
        self._heard, self._bell = os.pipe()
        for pipe in (self._heard, self._bell):
            os.set_blocking(pipe, False)

    def wake(self) -> None:
        """End a `receive` that waits, or the next one that would; for other threads, which have news of their own."""
        with self._lock, contextlib.suppress(BlockingIOError):  # it has rung often enough
            if not self._closed:
                os.write(self._bell, b"\0")

    def send(self, message: ToFront) -> None:
        """Never waits; what a front process that has died should have read is dropped."""
        kind, body = encode(message)
        head = _HEAD.pack(len(body), kind)
        with self._lock:
            if self._unsent:
                self._unsent += head + body
                self._flush()
                return
            sent = 0
            with contextlib.suppress(BlockingIOError, ConnectionError):
                sent = self._socket.sendmsg((head, body))
            if sent < len(head) + len(body):
                self._unsent += memoryview(head + body)[sent:]

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while self._unsent:
                    del self._unsent[: self._socket.send(self._unsent)]
            except ConnectionError:
                self._unsent.clear()

    def receive(self, *, block: bool, seconds: float | None = None) -> list[ToEngine]:
        """Everything that has arrived; with `block`, waits until something has, for `seconds`, or for a `wake`.

        The end of the front process is a Shutdown.
        """
        messages: list[ToEngine] = []
        while True:
            try:
                data = self._socket.recv(PIECE)
            except BlockingIOError:
                if messages or not block or not self._wait(seconds):
                    return messages
                continue
            except ConnectionError:
                data = b""
            if not data:
                return [*messages, Shutdown()]
            messages += self._inbox.feed(data, TO_ENGINE)
            if len(data) < PIECE and (messages or not block):
                return messages

    def _wait(self, seconds: float | None) -> bool:
        """Until there may be something to read; what was not sent leaves meanwhile. False where there is nothing."""
        poll = select.poll()
        poll.register(self._heard, select.POLLIN)
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        ready = poll.poll(None if seconds is None else 1000 * seconds)
        if self._unsent:
            with self._lock:
                self._flush()
        if any(source == self._heard for source, _ in ready):
            os.read(self._heard, 4096)
            return False
        return bool(ready)

    def close(self) -> None:
        """Close, after the last words have left or FLUSH_SECONDS have gone by."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.settimeout(FLUSH_SECONDS)
            self._socket.sendall(self._unsent)
        self._socket.close()
        with self._lock:
            pipes = () if self._closed else (self._heard, self._bell)
            self._closed = True
            for pipe in pipes:
                os.close(pipe)
