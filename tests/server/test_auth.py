"""API keys and CORS."""

from __future__ import annotations

import pytest
from fastapi.routing import APIRoute

from server.auth import KeyRing
from server.body import GuardedRoute
from server.errors import ApiError
from server.routes import ROUTERS
from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, error_of, serving, stream

pytestmark = pytest.mark.asyncio
OPEN = {"/", "/health", "/ready", "/version", "/metrics", "/load", "/ping", "/is_sleeping"}
KEYS = {"api_keys": "first,second", "api_key": "third"}


async def test_every_route_is_guarded_but_the_open_ones() -> None:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    page = "/playground/{digest}/{name}"  # its files
    assert {route.path for route in routes if not isinstance(route, GuardedRoute)} == OPEN | {page}
    assert {CHAT_URL, COMPLETION_URL, "/v1/models", "/v1/models/{model:path}", "/tokenize", "/detokenize"} <= {
        route.path for route in routes
    }


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic first", "first", "Bearer firs", "Bearer é"]
)
async def test_wrong_keys(header: str | None) -> None:
    headers: dict[bytes, bytes] = {} if header is None else {b"authorization": header.encode()}
    engine = FakeEngine()
    async with serving(engine, **KEYS) as client:
        for method, url in (("POST", CHAT_URL), ("POST", COMPLETION_URL), ("GET", "/v1/models"), ("POST", "/tokenize")):
            response = await client.request(method, url, content=b"{", headers=headers)  # no body is parsed
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert "first" not in response.text
    assert engine.submitted == []


@pytest.mark.parametrize("key", ["first", "second", "third"])
async def test_right_keys(key: str) -> None:
    async with serving(**KEYS) as client:
        client.headers["authorization"] = f"bearer  {key} "
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post(COMPLETION_URL, json=COMPLETION)).status_code == 200
        assert await stream(client, CHAT_URL, CHAT)


async def test_point_65_what_needs_no_key() -> None:
    async with serving(**KEYS, cors_origins="https://a.example") as client:
        for url in (*OPEN, "/docs", "/openapi.json"):
            assert (await client.get(url)).status_code == 200, url
        assert (await client.head("/")).status_code == 200
        preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
        assert (await client.options(CHAT_URL, headers=preflight)).status_code == 200


async def test_keys_of_any_characters() -> None:
    ring = KeyRing(["schlüssel"])
    ring.check("Bearer schlüssel".encode().decode("latin-1"))
    for wrong in ("Bearer schlüssel", "Bearer schl"):
        with pytest.raises(ApiError):
            ring.check(wrong)
    KeyRing([]).check(None)


async def test_cors_is_off_by_default() -> None:
    async with serving() as client:
        response = await client.get("/v1/models", headers={"origin": "https://a.example"})
    assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize("allowed, told", [("https://a.example", "https://a.example"), ("*", "*")])
async def test_cors_covers_errors_too(allowed: str, told: str) -> None:
    async with serving(cors_origins=allowed, api_key="k") as client:
        for response in (
            await client.get("/v1/models", headers={"origin": "https://a.example"}),
            await client.post(CHAT_URL, json={}, headers={"origin": "https://a.example", "authorization": "Bearer k"}),
        ):
            assert response.status_code >= 400
            assert response.headers["access-control-allow-origin"] == told
            assert "x-request-id" in response.headers["access-control-expose-headers"]
        other = await client.get("/health", headers={"origin": "https://b.example"})
    assert ("access-control-allow-origin" in other.headers) == (allowed == "*")
