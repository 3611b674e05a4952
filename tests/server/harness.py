"""The application around fake engines, and two ways to talk to it: httpx in process, and bare ASGI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from server.app import create_app
from server.metrics import Metrics
from server.settings import Settings
from tests.server.fake_engine import FakeEngine

Json = dict[str, Any]
CHAT: Json = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: Json = {"model": "tiny", "prompt": "hi"}
CHAT_URL, COMPLETION_URL = "/v1/chat/completions", "/v1/completions"


def make_app(*engines: FakeEngine, **settings: Any) -> FastAPI:
    return create_app({engine.info.id: engine for engine in engines}, Settings(**settings), Metrics())


@asynccontextmanager
async def started(app: FastAPI) -> AsyncIterator[FastAPI]:
    """The app with its engines ready; they are closed at the end."""
    async with app.router.lifespan_context(app):
        await app.state.service.lifecycle.settled()
        yield app


@asynccontextmanager
async def serving(*engines: FakeEngine, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a ready server with these engines."""
    async with started(make_app(*(engines or (FakeEngine(),)), **settings)) as app:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


def events(text: str) -> list[Json]:
    """The JSON events of a stream. Checks the framing: one line each, a blank line after it, `[DONE]` at the end."""
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""], blocks[-3:]
    found = [block for block in blocks[:-2] if not block.startswith(": ")]
    assert all(block.startswith("data: {") and "\n" not in block for block in found)
    return [json.loads(block.removeprefix("data: ")) for block in found]


async def stream(client: httpx.AsyncClient, url: str, body: Json) -> list[Json]:
    response = await client.post(url, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    return events(response.text)


def chat_text(chunks: Iterable[Json], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def error_of(response: httpx.Response, status: int) -> Json:
    """The error object of a response. Checks the shape that every error has."""
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: Json = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert error["code"] is None or isinstance(error["code"], str)
    return error


class Connection:
    """One HTTP exchange in bare ASGI: every message is seen as it is sent, and the client can leave at any time.

    `room`: messages that are taken before the server has to wait for `next`; 0 is any number.
    """

    def __init__(
        self, app: FastAPI, path: str, body: Mapping[str, object], method: str = "POST", room: int = 0, **headers: str
    ) -> None:
        names = {"content-type": "application/json", **headers}
        scope: Json = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in names.items()],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        self._incoming: asyncio.Queue[Json] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self._outgoing: asyncio.Queue[Json] = asyncio.Queue(room)
        self.task: asyncio.Task[None] = asyncio.create_task(app(scope, self._incoming.get, self._send))

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        await self._outgoing.put(dict(message))

    async def next(self) -> Json:
        """The next message of the server."""
        return await asyncio.wait_for(self._outgoing.get(), 10)

    async def rest(self) -> bytes:
        """The body from here to its end."""
        body = b""
        while True:
            message = await self.next()
            body += message.get("body", b"")
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await self.task
                return body

    async def leave(self) -> None:
        """Close the connection, and wait until the server has noticed."""
        self._incoming.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(self.task, 10)
