"""Two one-way sockets between the front process and one engine process.

ZeroMQ push/pull pairs on unix-domain sockets in a directory that only this user can enter; the receiver binds,
so that a sender never finds nobody to send to. Queues are unbounded on purpose: sending never blocks either side,
and what can be under way is bounded by the request limits. Malformed messages are logged and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import zmq
import zmq.asyncio
from msgspec.msgpack import Decoder

from engine.cluster.messages import TO_ENGINE, TO_FRONT, M, MalformedMessage, ToEngine, ToFront, decode, encode

logger = logging.getLogger(__name__)

RETRY_MS = 20  # between attempts to reach an engine that does not listen yet
FLUSH_MS = 1000  # how long a closing engine process waits for its last words to leave


def _address(directory: Path, name: str) -> str:
    return f"ipc://{directory / name}"


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.linger = 0
    return socket


def _decode_or_drop(frames: Sequence[bytes], table: Mapping[bytes, Decoder[M]]) -> M | None:
    try:
        return decode(frames, table)
    except MalformedMessage as error:
        logger.warning("dropped a malformed message between processes: %s", error)
        return None


class FrontChannel:
    """The front process's end. Belongs to one event loop."""

    def __init__(self, directory: Path) -> None:
        self._context = zmq.asyncio.Context()
        self._receiver = self._context.socket(zmq.PULL)
        self._receiver.set_hwm(0)
        plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context(self._context)
        self._sender = _socket(plain, zmq.PUSH)
        self._sender.reconnect_ivl = RETRY_MS
        self._sender.connect(_address(directory, "to_engine"))
        self._receiver.bind(_address(directory, "to_front"))

    def send(self, message: ToEngine) -> None:
        """Never waits: what is sent before the engine listens is kept for it."""
        self._sender.send_multipart(encode(message), zmq.NOBLOCK)

    async def receive(self) -> ToFront:
        while True:
            message = _decode_or_drop(await self._receiver.recv_multipart(), TO_FRONT)
            if message is not None:
                return message

    async def pending(self, timeout: float) -> bool:
        """Is there a message to receive, now or within `timeout` seconds?"""
        return bool(await self._receiver.poll(int(timeout * 1000)))

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()
        self._context.term()


class EngineChannel:
    """The engine process's end. `send` and `receive` belong to one thread; other threads use a `sender`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._receiver = _socket(self._context, zmq.PULL)
        self._receiver.bind(_address(directory, "to_engine"))
        self._sender = self.sender()

    def sender(self) -> EngineSender:
        """A sender of its own for another thread, which must close it."""
        socket = _socket(self._context, zmq.PUSH)
        socket.linger = FLUSH_MS
        socket.connect(_address(self._directory, "to_front"))
        return EngineSender(socket)

    def send(self, message: ToFront) -> None:
        self._sender.send(message)

    def receive(self, *, block: bool) -> list[ToEngine]:
        """Everything that has arrived; with `block`, waits until something has."""
        messages: list[ToEngine] = []
        flags = 0 if block else zmq.NOBLOCK
        while True:
            try:
                frames = self._receiver.recv_multipart(flags)
            except zmq.Again:
                return messages
            message = _decode_or_drop(frames, TO_ENGINE)
            if message is not None:
                messages.append(message)
            flags = zmq.NOBLOCK

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()
        self._context.term()


class EngineSender:
    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket

    def send(self, message: ToFront) -> None:
        self._socket.send_multipart(encode(message))

    def close(self) -> None:
        self._socket.close()
