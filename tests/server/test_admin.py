"""Control endpoints: who may use them, and what they do."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute

from engine.errors import ControlRefused, EngineDead
from engine.types import EngineStats
from server.routes import ADMIN_ROUTERS
from server.routes.admin import PROFILE_STEPS, AdminRoute
from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, CHAT_URL, Connection, Json, error_of, make_app, serving, started

pytestmark = pytest.mark.asyncio
KEYS = {"api_key": "user", "admin_key": "root"}
ADMIN: Json = {"authorization": "Bearer root"}
USER: Json = {"authorization": "Bearer user"}
URLS = [
    ("GET", "/admin/requests"),
    *(("POST", f"/admin/{name}") for name in ("abort", "reset_prefix_cache", "drain", "undrain", "profile")),
]


async def test_without_an_admin_key_they_do_not_exist() -> None:
    assert {route.path for router in ADMIN_ROUTERS for route in router.routes if isinstance(route, APIRoute)} == {
        url for _, url in URLS
    }
    assert all(isinstance(route, AdminRoute) for router in ADMIN_ROUTERS for route in router.routes)
    async with serving(api_key="user") as client:
        for method, url in URLS:
            for headers in (USER, ADMIN, {}):
                response = await client.request(method, url, json={"all": True}, headers=headers)
                assert error_of(response, 404)["code"] == "not_found"
        assert "/admin" not in (await client.get("/openapi.json")).text


@pytest.mark.parametrize("headers", [{}, USER, {"authorization": "Bearer roo"}, {"x-api-key": "root"}])
async def test_only_an_admin_key_opens_them(headers: dict[str, str]) -> None:
    engine = FakeEngine()
    async with serving(engine, **KEYS) as client:
        for method, url in URLS:
            response = await client.request(method, url, content=b"{", headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert "root" not in response.text
        assert (await client.post(CHAT_URL, json=CHAT, headers=USER)).status_code == 200
        assert (await client.post(CHAT_URL, json=CHAT, headers=ADMIN)).status_code == 401  # it is no API key
    assert engine.asked.calls == []


async def running(app: object, engine: FakeEngine, count: int, **headers: str) -> list[Connection]:
    """Streams that have begun and wait for their first token."""
    engine.flowing.clear()
    streams = [Connection(app, CHAT_URL, {**CHAT, "stream": True}, **USER, **headers) for _ in range(count)]  # type: ignore[arg-type]
    for stream in streams:
        assert (await stream.next())["status"] == 200
    return streams


def client_of(app: object) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t", headers=ADMIN)  # type: ignore[arg-type]


async def test_abort_ends_all_requests() -> None:
    engines = FakeEngine("tiny"), FakeEngine("two")
    app = make_app(*engines, **KEYS)
    async with started(app), client_of(app) as client:
        streams = await running(app, engines[0], 3)
        assert (await client.post("/admin/abort", json={"all": True, "model": "two"})).json() == {"aborted": 0}
        assert (await client.post("/admin/abort", json={"all": True})).json() == {"aborted": 3}
        for stream in streams:
            body = await stream.rest()
            assert b"request_cancelled" in body and body.endswith(b"data: [DONE]\n\n")
        assert len(engines[0].aborted) == 3 and not len(engines[0].in_flight)
        assert not app.state.service.accounts.leases


async def test_an_answer_that_is_not_streamed_is_not_to_be_retried() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    app = make_app(engine, **KEYS)
    async with started(app), client_of(app) as client:
        whole = Connection(app, CHAT_URL, CHAT, **USER)
        while not len(engine.in_flight):
            await asyncio.sleep(0)
        assert (await client.post("/admin/abort", json={"all": True})).json() == {"aborted": 1}
        message = await whole.next()
        assert message["status"] == 503 and (b"x-should-retry", b"false") in message["headers"]
        assert b"request_cancelled" in await whole.rest()


@pytest.mark.parametrize("by", ["answer", "choice", "x-request-id"])
async def test_abort_ends_one_request(by: str) -> None:
    engine = FakeEngine()
    app = make_app(engine, **KEYS)
    async with started(app), client_of(app) as client:
        first, second = await running(app, engine, 1, x_request_id="mine") + await running(app, engine, 1)
        choice = engine.submitted[0].id
        name = {"answer": choice.rpartition("-")[0], "choice": choice, "x-request-id": "mine"}[by]
        rows = (await client.get("/admin/requests")).json()["requests"]
        assert [row["request_id"] == "mine" for row in rows] == [True, False]
        assert rows[0]["ids"] == [choice] and rows[0]["key"] == "key-1" and rows[0]["path"] == CHAT_URL
        assert (await client.post("/admin/abort", json={"request_id": "unknown"})).json() == {"aborted": 0}
        assert (await client.post("/admin/abort", json={"request_id": name})).json() == {"aborted": 1}
        assert b"request_cancelled" in await first.rest()
        engine.flowing.set()
        assert b"request_cancelled" not in await second.rest()


@pytest.mark.parametrize(
    "url, body, param",
    [
        ("abort", {}, "request_id"),
        ("abort", {"all": True, "request_id": "x"}, "request_id"),
        ("abort", {"all": 1}, "all"),
        ("abort", {"request_id": ""}, "request_id"),
        ("abort", {"request_id": "x", "other": 1}, "other"),
        ("reset_prefix_cache", {"model": 1}, "model"),
        ("reset_prefix_cache", [], None),
        ("profile", {}, "action"),
        ("profile", {"action": "pause"}, "action"),
        ("profile", {"action": "start", "seconds": 301}, "seconds"),
        ("profile", {"action": "start", "seconds": 0}, "seconds"),
        ("profile", {"action": "start", "folder": "/etc"}, "folder"),
    ],
)
async def test_wrong_bodies(url: str, body: object, param: str | None, tmp_path: Path) -> None:
    async with serving(**KEYS, profile_dir=tmp_path) as client:
        response = await client.post(f"/admin/{url}", json=body, headers=ADMIN)
        assert error_of(response, 400)["param"] == param
        missing = await client.post(f"/admin/{url}", json={"model": "x", "all": True, "action": "stop"}, headers=ADMIN)
        assert missing.status_code in (400, 404)


async def test_reset_prefix_cache() -> None:
    engines = FakeEngine("one"), FakeEngine("two")
    async with serving(*engines, **KEYS) as client:
        client.headers.update(ADMIN)
        assert (await client.post("/admin/reset_prefix_cache")).json() == {"blocks": {"one": 1, "two": 1}}
        response = await client.post("/admin/reset_prefix_cache", json={"model": "two"})
        assert response.json() == {"blocks": {"two": 2}}
        response = await client.post("/admin/reset_prefix_cache", json={"model": "three"})
        assert error_of(response, 404)["code"] == "model_not_found"
        engines[0].asked.refusal = EngineDead("gone")
        assert error_of(await client.post("/admin/reset_prefix_cache"), 503)["code"] == "engine_unavailable"


async def test_drain_and_undrain() -> None:
    engine = FakeEngine()
    app = make_app(engine, **KEYS)
    async with started(app), client_of(app) as client:
        (stream,) = await running(app, engine, 1)
        assert (await client.post("/admin/drain")).json() == {"draining": True, "in_flight": 1}
        refused = await client.post(CHAT_URL, json=CHAT, headers=USER)
        assert error_of(refused, 503)["code"] == "draining" and int(refused.headers["retry-after"]) >= 1
        ready = await client.get("/ready")
        assert ready.status_code == 503 and ready.json()["reason"] == "draining"
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/load")).json()["draining"] is True
        engine.flowing.set()
        assert b"request_cancelled" not in await stream.rest()
        assert (await client.post("/admin/undrain")).json() == {"draining": False, "in_flight": 0}
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post(CHAT_URL, json=CHAT, headers=USER)).status_code == 200


async def test_a_drained_server_still_ends_well() -> None:
    engine = FakeEngine()
    app = make_app(engine, **KEYS, drain_timeout=0)
    async with started(app), client_of(app) as client:
        (stream,) = await running(app, engine, 1)
        await client.post("/admin/drain")
        await app.state.service.lifecycle.drain(0.0)
        assert b'"error"' in await stream.rest()


async def test_profile(tmp_path: Path) -> None:
    engine = FakeEngine("org/tiny model")
    async with serving(engine, **KEYS) as client:
        response = await client.post("/admin/profile", json={"action": "start"}, headers=ADMIN)
        assert error_of(response, 400)["code"] == "not_configured"
    async with serving(engine := FakeEngine("org/tiny model"), **KEYS, profile_dir=tmp_path) as client:
        client.headers.update(ADMIN)
        answer: Json = (await client.post("/admin/profile", json={"action": "start", "seconds": 2})).json()
        folder = Path(answer["folder"])
        assert folder.parent == tmp_path and folder.name.startswith("org_tiny_model-")
        assert engine.asked.calls == [("start_profile", folder, 2.0, PROFILE_STEPS)]
        answer = (await client.post("/admin/profile", json={"action": "stop"})).json()
        assert answer == {"model": "org/tiny model", "steps": 2}
        engine.asked.refusal = ControlRefused("no recording is under way")
        response = await client.post("/admin/profile", json={"action": "stop"})
        assert error_of(response, 409)["code"] == "control_refused"


async def test_every_call_is_written_down(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(**KEYS) as client:
        with caplog.at_level("INFO", "server.audit"):
            await client.post("/admin/drain", headers={**ADMIN, "x-request-id": "q1"})
            await client.post("/admin/abort", json={"all": True}, headers={**ADMIN, "x-request-id": "q2"})
            await client.post("/admin/abort", json={"all": True}, headers={**USER, "x-request-id": "q3"})
    lines = [record.getMessage() for record in caplog.records if record.name == "server.audit"]
    assert len(lines) == 3
    assert lines[0] == "POST '/admin/drain' '' by '127.0.0.1': done (q1)"
    assert lines[1] == "POST '/admin/abort' '{\"all\":true}' by '127.0.0.1': done (q2)"
    assert lines[2] == "POST '/admin/abort' '' by '127.0.0.1': refused (q3)"
    assert "root" not in caplog.text


async def test_load() -> None:
    engine = FakeEngine()
    app = make_app(engine, **KEYS)
    async with started(app), client_of(app) as client:
        assert (await client.get("/load")).json() == {
            "server_load": 0,
            "draining": False,
            "models": {"tiny": {"running": 0, "waiting": 0, "kv_cache_usage": 0.0, "kv_blocks": 0}},
        }
        (stream,) = await running(app, engine, 1)
        engine.stats = EngineStats(running=1, waiting=2, kv_blocks_used=1, kv_blocks_total=3)
        answer = (await client.get("/load")).json()
        assert answer["server_load"] == 1
        assert answer["models"]["tiny"] == {"running": 1, "waiting": 2, "kv_cache_usage": 0.3333, "kv_blocks": 3}
        engine.flowing.set()
        await stream.rest()
        assert (await client.get("/load")).json()["server_load"] == 0
        assert (await client.get("/is_sleeping")).json() == {"is_sleeping": False}
        for method in ("GET", "POST", "HEAD"):
            response = await client.request(method, "/ping")
            assert (response.status_code, response.content) == (200, b"")
        engine.health_now = engine.health_now.__class__(False, False, "dead")
        assert (await client.get("/ping")).status_code == 503
