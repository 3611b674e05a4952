"""Starting, being ready, draining, and failing to start: as /health, /ready and requests see it."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from engine.errors import ModelLoadError
from engine.types import Health, Phase
from server.app import create_app
from server.lifecycle import State
from server.metrics import Metrics
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, CHAT_URL, Connection, error_of, events, make_app, serving, started

pytestmark = pytest.mark.asyncio


def client_of(app: object) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")  # type: ignore[arg-type]


async def test_from_start_to_end() -> None:
    engine, phases, ready = FakeEngine(), list[Phase](), list[str]()
    engine.may_start.clear()
    app = create_app(
        {"tiny": engine}, Settings(), Metrics(), on_phase=phases.append, on_ready=lambda: ready.append("ready")
    )
    async with app.router.lifespan_context(app), client_of(app) as client:
        await asyncio.sleep(0)
        health = await client.get("/health")
        assert health.status_code == 503
        assert health.json() == {"status": "unhealthy", "reason": "starting", "phase": "weights"}
        assert (await client.get("/ready")).status_code == 503
        response = await client.post(CHAT_URL, json=CHAT)
        assert error_of(response, 503)["code"] == "starting" and int(response.headers["retry-after"]) >= 1
        assert (await client.get("/v1/models")).status_code == 503
        assert (await client.get("/version")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        engine.may_start.set()
        await app.state.service.lifecycle.settled()
        assert [phase.name for phase in phases] == ["weights"] and ready == ["ready"]
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/ready")).status_code == 200
        assert len(engine.observers) == 1
    assert engine.closed


async def test_an_engine_that_can_not_start() -> None:
    engine = FakeEngine()
    engine.start_error = ModelLoadError("no weights in /secret/path")
    app = make_app(engine)
    async with app.router.lifespan_context(app), client_of(app) as client:
        with pytest.raises(ModelLoadError):
            await app.state.service.lifecycle.settled()
        assert (await client.get("/health")).status_code == 503
        response = await client.post(CHAT_URL, json=CHAT)
        error_of(response, 503)
        assert "secret" not in response.text + (await client.get("/health")).text
    assert engine.closed


async def test_stopping_while_it_starts() -> None:
    engine = FakeEngine()
    engine.may_start.clear()
    app = make_app(engine)
    async with app.router.lifespan_context(app):
        await asyncio.sleep(0)
    assert engine.closed and app.state.service.lifecycle.state is State.DRAINING


HEALTHS = pytest.mark.parametrize(
    "health, healthy, ready",
    [
        (Health(True, True), 200, 200),
        (Health(True, False, "starting"), 200, 503),
        (Health(False, False, "the engine process is gone"), 503, 503),
        (Health(False, True, "no progress for 120 s"), 503, 503),
    ],
)


@HEALTHS
async def test_probes_ask_the_engine_and_never_generate(health: Health, healthy: int, ready: int) -> None:
    engine = FakeEngine("good")
    async with serving(engine) as client:
        engine.health_now = health
        answer = await client.get("/health")
        assert answer.status_code == healthy
        if healthy == 503:
            assert answer.json()["reason"] == f"good: {health.reason}"
        assert (await client.get("/ready")).status_code == ready
        assert (await client.head("/health")).status_code == healthy
    assert engine.submitted == []


@HEALTHS
async def test_a_model_that_is_not_well_leaves_the_others_in_service(health: Health, healthy: int, ready: int) -> None:
    good, other = FakeEngine("good"), FakeEngine("other")
    async with serving(good, other) as client:
        other.health_now = health
        for path, status, word in (("/health", healthy, "ok"), ("/ready", ready, "ready")):
            answer = await client.get(path)
            assert answer.status_code == 200
            if status == 200:
                assert answer.json() == {"status": word}
            else:
                assert answer.json() == {"status": "degraded", "reason": f"other: {health.reason}"} or health.ok
                assert answer.json()["status"] == "degraded" and answer.json()["reason"].startswith("other: ")
            assert (await client.get(path, params={"model": "good"})).json() == {"status": word}
            assert (await client.get(path, params={"model": "other"})).status_code == status
            assert error_of(await client.get(path, params={"model": "third"}), 404)["code"] == "model_not_found"
        good.health_now = health
        assert (await client.get("/health")).status_code == healthy
        assert (await client.get("/ready")).status_code == ready
    assert good.submitted == other.submitted == []


async def test_phases_of_several_models_say_whose_they_are() -> None:
    phases = list[Phase]()
    engines = {name: FakeEngine(name) for name in ("one", "two")}
    app = create_app(engines, Settings(), Metrics(), on_phase=phases.append)
    async with started(app):
        assert [phase.name for phase in phases] == ["one: weights", "two: weights"]


async def test_drain_lets_requests_finish_and_refuses_new_ones() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    app = make_app(engine)
    async with started(app), client_of(app) as client:
        connection = Connection(app, CHAT_URL, {**CHAT, "stream": True})
        await connection.next()
        await connection.next()
        lifecycle = app.state.service.lifecycle
        drain = asyncio.ensure_future(lifecycle.drain(30))
        await asyncio.sleep(0)
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        refused = await client.post(CHAT_URL, json=CHAT)
        assert error_of(refused, 503)["code"] == "draining" and refused.headers["retry-after"]
        assert not drain.done()
        engine.flowing.set()
        body = await connection.rest()
        await drain
    assert events(body.decode())[-1]["choices"][0]["finish_reason"] == "stop"


async def test_what_does_not_finish_in_time_ends_with_an_error() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    app = make_app(engine, drain_timeout=0.01)
    async with started(app):
        connection = Connection(app, CHAT_URL, {**CHAT, "stream": True})
        await connection.next()
        await connection.next()
    end = (await connection.rest()).decode()
    assert "error" in events(end)[0]


async def test_http_numbers_and_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="server.access"):
        async with serving() as client:
            await client.post(CHAT_URL, json=CHAT, headers={"x-request-id": "me"})
            await client.get("/made/up%0Aby-a-client")
            await client.get("/v1/models/made-up")
            await client.get("/health")
            page = (await client.get("/metrics")).text
    assert 'http_requests_total{handler="/v1/chat/completions",method="POST",status="2xx"} 1.0' in page
    assert 'handler="/v1/models/{model:path}"' in page and 'handler="none"' in page
    assert "made" not in page and "/health" not in page
    lines = [record.getMessage() for record in caplog.records if record.name == "server.access"]
    assert len(lines) == 3 and "POST" in lines[0] and lines[0].endswith(" me") and "\n" not in lines[1]
