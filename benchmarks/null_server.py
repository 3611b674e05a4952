"""A server that computes nothing: it streams a scripted answer, or a scripted fault, at next to no cost.

    python -m benchmarks.null_server --port 9100 --tokens 256 --interval-ms 20

What a load generator reports about it is the load generator's own cost; `tests/server` checks its figures with it.
It speaks just enough HTTP/1.1 over asyncio for that, and so every byte, pause and cut is the script's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

Body = Mapping[str, object]
MODEL = "null"


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request gets. Times in seconds; counts in chunks, each of which is one token."""

    tokens: int | None = None  # None: max_tokens of the request, or 16
    status: int = 200
    first: float = 0.0  # before the first chunk
    interval: float = 0.0  # between chunks
    gate: asyncio.Event | None = None  # waited for before the first chunk
    text: str = " x"
    usage: bool = True
    done: bool = True  # says [DONE]
    finish: bool = True  # the last chunk says why it ended
    cut_after: int | None = None  # the connection closes after so many chunks
    error_after: int | None = None  # an error event comes after so many
    piece: int = 0  # bytes in a write; 0 for whole chunks
    preamble: bytes = b""  # raw bytes before the first event


Script = Callable[[int, Body], Reply]


@dataclass
class NullServer:
    """Serves `script(number of the request, its body)` on a free loopback port. Use it as an async context manager."""

    script: Script = lambda _number, _body: Reply()
    metrics: Callable[[], str] | None = None
    tokenizes: bool = True
    port: int = 0
    asked: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    headers: list[bytes] = field(default_factory=list)
    opened: int = 0  # connections

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> NullServer:
        self._connections: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False where the connection is to be cut."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b" ", 2)
        length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), 0)
        body = msgspec.json.decode(await reader.readexactly(length), type=dict[str, object]) if length else {}
        self.headers.append(head)
        if (method, path) == (b"GET", b"/v1/models"):
            _answer(writer, 200, msgspec.json.encode({"object": "list", "data": [{"id": MODEL}]}))
        elif path in (b"/health", b"/ready"):
            _answer(writer, 200, b"{}")
        elif (method, path) == (b"GET", b"/metrics") and self.metrics is not None:
            _answer(writer, 200, self.metrics().encode())
        elif path == b"/tokenize" and self.tokenizes:
            tokens = list(range(len(str(body["prompt"]).split())))
            _answer(writer, 200, msgspec.json.encode({"tokens": tokens}))
        elif path in (b"/v1/completions", b"/v1/chat/completions"):
            self.asked.append((path.decode(), body))
            return await _stream(writer, path.endswith(b"chat/completions"), body, self._reply(body))
        else:
            _answer(writer, 404, b'{"error": {"message": "not here"}}')
        return True

    def _reply(self, body: Body) -> Reply:
        return self.script(len(self.asked) - 1, body)


def _answer(writer: asyncio.StreamWriter, status: int, content: bytes) -> None:
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)


async def _stream(writer: asyncio.StreamWriter, chat: bool, body: Body, reply: Reply) -> bool:
    if reply.status != 200:
        _answer(writer, reply.status, b'{"error": {"message": "not today"}}')
        return True
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    if reply.gate is not None:
        await reply.gate.wait()
    await asyncio.sleep(reply.first)
    await _write(writer, reply.preamble, reply.piece)
    asked = body.get("max_tokens")
    count = reply.tokens if reply.tokens is not None else asked if isinstance(asked, int) else 16
    for number in range(count):
        if number == reply.cut_after:
            return False
        if number == reply.error_after:
            await _write(writer, b'data: {"error": {"message": "out of luck"}}\n\ndata: [DONE]\n\n', reply.piece)
            break
        if number and reply.interval:
            await asyncio.sleep(reply.interval)
        reason = "length" if reply.finish and number == count - 1 else None
        content = {"delta": {"content": reply.text}} if chat else {"text": reply.text}
        await _write(writer, _event(choices=[{"index": 0, **content, "finish_reason": reason}]), reply.piece)
    else:
        await _write(writer, _closing(body, reply, count), reply.piece)
    writer.write(b"0\r\n\r\n")
    return True


def _closing(body: Body, reply: Reply, count: int) -> bytes:
    size = len(str(body.get("prompt") or body.get("messages")).split())
    usage = {"prompt_tokens": size, "completion_tokens": count, "total_tokens": size + count}
    last = _event(choices=[], usage=usage) if reply.usage else b""
    return last + (b"data: [DONE]\n\n" if reply.done else b"")


def _event(**fields: object) -> bytes:
    return b"data: " + msgspec.json.encode({"id": "null-1", "object": "chunk", "model": MODEL, **fields}) + b"\n\n"


async def _write(writer: asyncio.StreamWriter, data: bytes, size: int) -> None:
    """One HTTP chunk for each `size` bytes, or one for all of them."""
    for start in range(0, len(data), size or len(data) or 1):
        part = data[start : start + (size or len(data))]
        writer.write(b"%x\r\n%b\r\n" % (len(part), part))
        await writer.drain()
        if size:
            await asyncio.sleep(0)  # so that the next part leaves on its own


async def serve(arguments: argparse.Namespace) -> None:
    """Until somebody ends it."""
    reply = Reply(tokens=arguments.tokens, interval=arguments.interval_ms / 1000)
    async with NullServer(lambda _number, _body: reply, port=arguments.port) as server:
        print(f"streaming nothing on {server.url}", flush=True)
        await asyncio.get_running_loop().create_future()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.null_server", description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=9100)
    parser.add_argument("--tokens", type=int, help="in each answer (default: what is asked for)")
    parser.add_argument("--interval-ms", type=float, default=20.0, help="between two tokens of an answer")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
