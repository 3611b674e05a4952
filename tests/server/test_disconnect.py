"""A client that leaves takes its requests with it, at whatever point it goes."""

from __future__ import annotations

import asyncio

import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Connection, Json, make_app, started

pytestmark = pytest.mark.asyncio
ENDPOINTS = [(CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION)]


async def submitted(engine: FakeEngine, count: int = 1) -> None:
    while len(engine.submitted) < count:
        await asyncio.sleep(0)


def all_aborted(engine: FakeEngine) -> bool:
    return sorted(engine.aborted) == sorted(r.id for r in engine.submitted) and len(engine.in_flight) == 0


@pytest.mark.parametrize("url, body", ENDPOINTS)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("n", [1, 4])
async def test_leaving_before_the_first_token(url: str, body: Json, streamed: bool, n: int) -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    async with started(make_app(engine)) as app:
        connection = Connection(app, url, {**body, "stream": streamed, "n": n})
        await submitted(engine, n)
        await connection.leave()
        assert all_aborted(engine) and len(engine.aborted) == n


@pytest.mark.parametrize("url, body", ENDPOINTS)
async def test_leaving_in_the_middle_of_a_stream(url: str, body: Json) -> None:
    engine = FakeEngine(answer=[*([258] * 5), *([259] * 400)])
    async with started(make_app(engine)) as app:
        connection = Connection(app, url, {**body, "stream": True, "max_tokens": 400})
        while b"Hello" not in (await connection.next()).get("body", b""):
            pass
        engine.flowing.clear()
        await connection.leave()
        assert all_aborted(engine)


async def test_leaving_without_having_read() -> None:
    """The server waits for room to write, not for the engine, when the client goes."""
    engine = FakeEngine(answer=[258] * 100)
    async with started(make_app(engine)) as app:
        connection = Connection(app, CHAT_URL, {**CHAT, "stream": True, "ignore_eos": True}, room=2)
        await submitted(engine)
        for _ in range(20):
            await asyncio.sleep(0)
        engine.flowing.clear()
        await connection.leave()
        assert all_aborted(engine)


@pytest.mark.parametrize("streamed", [False, True])
async def test_leaving_before_the_request_is_submitted(streamed: bool) -> None:
    """The text is long, so it is tokenized in a thread while the client goes."""
    engine = FakeEngine(max_model_len=100_000)
    engine.flowing.clear()
    async with started(make_app(engine)) as app:
        connection = Connection(app, COMPLETION_URL, {"prompt": "a" * 50_000, "stream": streamed})
        await connection.leave()
        assert len(engine.submitted) == 1 and all_aborted(engine)


async def test_a_cancelled_server_task_cancels_the_request() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    async with started(make_app(engine)) as app:
        for streamed in (False, True):
            connection = Connection(app, CHAT_URL, {**CHAT, "stream": streamed})
            await submitted(engine, 1 + streamed)
            if streamed:
                await connection.next()
            connection.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connection.task
        assert all_aborted(engine)


async def test_finished_requests_are_not_aborted() -> None:
    engine = FakeEngine()
    async with started(make_app(engine)) as app:
        for streamed in (False, True):
            connection = Connection(app, CHAT_URL, {**CHAT, "stream": streamed})
            assert b"stop" in await connection.rest()
    assert engine.aborted == [] and len(engine.submitted) == 2


async def test_a_storm_of_disconnects_leaves_nothing() -> None:
    engine = FakeEngine(answer=[258] * 300)
    async with started(make_app(engine)) as app:
        connections = []
        for i in range(60):
            url, body = ENDPOINTS[i % 2]
            full = {**body, "stream": i % 3 == 0, "n": 1 + i % 4, "max_tokens": 300}
            connections.append(Connection(app, url, full))
            for _ in range(i % 5):
                await asyncio.sleep(0)
            if i % 7:
                await connections[i // 2].leave()
        for connection in connections:
            await connection.leave()
        assert len(engine.in_flight) == 0
        page = (await Connection(app, "/metrics", {}, method="GET").rest()).decode()
    assert 'handler="/v1/chat/completions",method="POST",status="4xx"' in page
    assert 0 < len(engine.aborted) < len(engine.submitted)
