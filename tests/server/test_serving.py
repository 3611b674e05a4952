"""The real server on a loopback port: connections, limits, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from openai import OpenAI

from engine.errors import ModelLoadError
from server.serving import Server, make_server, run
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, CHAT_URL, Json, error_of, events, make_app

pytestmark = pytest.mark.asyncio


@dataclass
class Running:
    server: Server
    task: asyncio.Task[None]
    engine: FakeEngine
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def say(self, *parts: bytes) -> bytes:
        """Send bytes and return all that comes until the server hangs up."""
        reader, writer = await self.connect()
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
        try:
            return await asyncio.wait_for(reader.read(), 10)
        except ConnectionResetError:
            return b""
        finally:
            writer.close()

    async def ended(self) -> None:
        await asyncio.wait_for(asyncio.shield(self.task), 10)


@contextlib.asynccontextmanager
async def listening(engine: FakeEngine | None = None, **settings: Any) -> AsyncIterator[Running]:
    engine = engine or FakeEngine()
    app = make_app(engine, **settings)
    server = make_server(app, Settings(port=0, **settings))
    task = asyncio.ensure_future(server.serve())
    await app.state.service.lifecycle.settled()
    while not server.started:
        await asyncio.sleep(0)
    running = Running(server, task, engine, server.servers[0].sockets[0].getsockname()[1])
    try:
        yield running
    finally:
        server.handle_exit(signal.SIGTERM, None)
        engine.flowing.set()
        await running.ended()


def post(body: Json, *headers: bytes) -> bytes:
    data = json.dumps(body).encode()
    lines = [b"POST /v1/chat/completions HTTP/1.1", b"host: x", b"content-type: application/json", *headers]
    return b"\r\n".join([*lines, b"content-length: %d" % len(data), b"", data])


def parse(answer: bytes) -> tuple[int, Json]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\nx-big: " + b"a" * 1_000_000 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 50_000 + b"\r\n", 400),
        (b"GET /" + b"a" * 1_000_000, 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: a\0b\r\n\r\n", 400),
    ],
    ids=["header", "headers", "target", "TLS", "nonsense", "negative length", "two lengths", "NUL"],
)
async def test_what_is_no_http(request_bytes: bytes, status: int) -> None:
    async with listening() as running:
        answer = await running.say(request_bytes)
        if answer:  # a client that still sends may see a reset in place of the answer
            found, body = parse(answer)
            assert found == status and body["error"]["type"] == "invalid_request_error"
        async with httpx.AsyncClient(base_url=running.url) as client:
            assert (await client.post(CHAT_URL, json=CHAT)).status_code == 200


@pytest.mark.parametrize("start", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"])
async def test_headers_that_never_end(start: bytes) -> None:
    async with listening(header_timeout=0.1) as running:
        status, body = parse(await running.say(start))
        assert status == 408 and body["error"]["code"] == "timeout"
        assert not running.server.server_state.connections


async def test_a_second_request_whose_headers_never_end() -> None:
    async with listening(header_timeout=0.1) as running:
        reader, writer = await running.connect()
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.write(b"GET /h")
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_the_rest_of_a_refused_body_that_never_comes() -> None:
    async with listening(header_timeout=0.1, api_key="k") as running:
        reader, writer = await running.connect()
        writer.write(post(CHAT)[:-5])
        assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 401")
        writer.write(b".")
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_too_many_connections() -> None:
    async with listening(max_connections=2) as running:
        first, second = await running.connect(), await running.connect()
        status, body = parse(await running.say(b""))
        assert status == 503 and body["error"]["code"] == "overloaded"
        for _, writer in (first, second):
            writer.close()
            await writer.wait_closed()
        while running.server.server_state.connections:
            await asyncio.sleep(0.001)
        async with httpx.AsyncClient(base_url=running.url) as client:
            assert (await client.get("/health")).status_code == 200


async def test_point_69_a_connection_survives_errors() -> None:
    async with listening(api_key="k") as running:
        reader, writer = await running.connect()
        key = b"authorization: Bearer k"
        big = {**CHAT, "metadata": "x" * 200_000}
        for request, status in ((post(CHAT), 401), (post(big), 401), (post({}, key), 400), (post(big, key), 200)):
            writer.write(request)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            assert int(head.split()[1]) == status
        writer.close()


async def test_pipelined_requests_and_requests_in_bits() -> None:
    async with listening() as running:
        health = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        assert (await running.say(health + health + last)).count(b"HTTP/1.1 200") == 3
        assert (await running.say(*(bytes([byte]) for byte in last))).count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_closed_socket_cancels_the_request(streamed: bool) -> None:
    async with listening() as running:
        running.engine.flowing.clear()
        reader, writer = await running.connect()
        writer.write(post({**CHAT, "stream": streamed, "n": 2}))
        if streamed:
            await reader.readuntil(b"assistant")
        while len(running.engine.submitted) < 2:
            await asyncio.sleep(0.001)
        writer.transport.abort()
        while len(running.engine.aborted) < 2:
            await asyncio.sleep(0.001)
        assert len(running.engine.in_flight) == 0


async def test_sigterm_drains_with_the_port_open() -> None:
    async with listening() as running, httpx.AsyncClient(base_url=running.url) as client:
        running.engine.flowing.clear()
        async with client.stream("POST", CHAT_URL, json={**CHAT, "stream": True}) as response:
            chunks = response.aiter_text()
            text = await anext(chunks)
            os.kill(os.getpid(), signal.SIGTERM)
            while (await client.get("/ready")).status_code != 503:
                pass
            assert (await client.get("/health")).status_code == 200
            error_of(await client.post(CHAT_URL, json=CHAT), 503)
            assert not running.task.done()
            running.engine.flowing.set()
            text += "".join([part async for part in chunks])
        assert events(text)[-1]["choices"][0]["finish_reason"] == "stop"
        await running.ended()
        assert running.engine.closed


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_does_not_wait(second: signal.Signals) -> None:
    async with listening() as running, httpx.AsyncClient(base_url=running.url) as client:
        running.engine.flowing.clear()
        async with client.stream("POST", CHAT_URL, json={**CHAT, "stream": True}) as response:
            chunks = response.aiter_text()
            text = await anext(chunks)
            os.kill(os.getpid(), signal.SIGTERM)
            while (await client.get("/ready")).status_code != 503:
                pass
            os.kill(os.getpid(), second)
            text += "".join([part async for part in chunks])
        assert "error" in events(text)[-1]
        await running.ended()
        assert running.engine.closed


async def test_an_engine_that_can_not_start_ends_the_server() -> None:
    engine = FakeEngine()
    engine.start_error = ModelLoadError("no weights")
    with pytest.raises(ModelLoadError, match="no weights"):
        await asyncio.to_thread(run, make_app(engine), Settings(port=0))
    assert engine.closed


async def test_the_sync_openai_client() -> None:
    async with listening() as running:

        def talk() -> tuple[str | None, str]:
            with OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
                messages = CHAT["messages"]
                whole = client.chat.completions.create(model="tiny", messages=messages)
                streamed = client.completions.create(model="tiny", prompt="x", stream=True)
                return whole.choices[0].message.content, "".join(chunk.choices[0].text for chunk in streamed)

        assert await asyncio.to_thread(talk) == ("Hello, wörld!", "Hello, wörld!")
