"""Limits of API keys: buckets by a clock of the test's own, and 429s, headers and slots as clients see them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from server.limit_settings import KeyLimits
from server.limits import Account, Accounts, Bucket, Lease, Limited, duration
from server.settings import Settings, load_settings
from tests.server.fake_engine import FakeEngine
from tests.server.harness import (
    CHAT,
    CHAT_URL,
    COMPLETION,
    COMPLETION_URL,
    Connection,
    Json,
    error_of,
    make_app,
    serving,
    started,
)

pytestmark = pytest.mark.asyncio
TEAM: Json = {"authorization": "Bearer team-secret"}
OTHER: Json = {"authorization": "Bearer other-secret"}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limits(**team: int | None) -> dict[str, object]:
    """Settings with a key named `team` and one without a name."""
    return {"api_keys": ["other-secret"], "limits": {"keys": {"team": {"api_key": "team-secret", **team}}}}


@asynccontextmanager
async def stopped_clock(*engines: FakeEngine, **settings: object) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server whose buckets never fill."""
    app = make_app(*(engines or (FakeEngine(),)), **settings)
    for own in app.state.service.accounts:
        for bucket in own._buckets.values():
            bucket._clock = lambda at=bucket._at: at
    async with started(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        yield client


def account(clock: Clock, **values: int) -> Account:
    return Account("x", KeyLimits(**values), clock)


async def test_a_bucket_fills_evenly_and_holds_a_minute() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert bucket.level == 0 and bucket.seconds_until(3) == 3
    clock.now += 2.5
    assert bucket.level == 2.5
    clock.now += 3600
    assert bucket.level == 60
    bucket.take(90)
    assert bucket.level == -30 and bucket.seconds_until(1) == 31
    bucket.take(-1000)
    assert bucket.level == 60


async def test_what_is_refused_costs_nothing() -> None:
    clock = Clock()
    own = account(clock, requests_per_minute=2, tokens_per_minute=100, concurrent_requests=1)
    first = Lease(own, "a", "/")
    own.admit(first)
    with pytest.raises(Limited, match="1 of 1 requests at once") as refused:
        own.admit(Lease(own, "b", "/"))
    assert refused.value.limit == "concurrency" and own.headers()["x-ratelimit-remaining-requests"] == "1"
    first.release()
    first.release()
    with pytest.raises(Limited, match="Request too large") as large:
        own.charge(101)
    assert (large.value.headers or {})["x-should-retry"] == "false"
    own.charge(60)
    with pytest.raises(Limited, match="40 of 100 a minute are left, and this needs 41"):
        own.charge(41)
    own.charge(40)
    with pytest.raises(Limited) as empty:
        own.admit(Lease(own, "c", "/"))
    assert empty.value.limit == "tokens" and not own.leases
    assert own.headers()["x-ratelimit-remaining-requests"] == "1"
    clock.now += 0.6
    own.admit(Lease(own, "d", "/"))


async def test_an_answer_may_leave_a_debt() -> None:
    clock = Clock()
    own = account(clock, tokens_per_minute=60)
    own.spend(90)
    assert own.headers() == {
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m30s",
    }
    with pytest.raises(Limited) as refused:
        own.charge(1)
    assert (refused.value.headers or {})["retry-after"] == "31"
    assert (refused.value.headers or {})["retry-after-ms"] == "31000"
    clock.now += 31
    own.charge(1)


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (60, "1m0s"), (372, "6m12s")],
)
async def test_durations_are_openai_s(seconds: float, text: str) -> None:
    assert duration(seconds) == text


async def test_which_limits_a_key_has() -> None:
    section: dict[str, object] = {
        "api_key": "plain",
        "limits": {
            "default": {"requests_per_minute": 10, "concurrent_requests": 2},
            "keys": {
                "a": {"api_key": "ka", "requests_per_minute": 20},
                "b": {"api_key": "kb", "requests_per_minute": None, "concurrent_requests": None},
            },
        },
    }
    found = {own.name: own for own in Accounts(load_settings(section), Clock())}
    assert list(found) == ["key-1", "a", "b"]
    assert {name: own.headers().get("x-ratelimit-limit-requests") for name, own in found.items()} == {
        "key-1": "10",
        "a": "20",
        "b": None,
    }
    full = found["a"]
    full.admit(Lease(full, "", "/"))
    full.admit(Lease(full, "", "/"))
    with pytest.raises(Limited):
        full.admit(Lease(full, "", "/"))
    (anonymous,) = Accounts(load_settings({"limits": {"default": {"tokens_per_minute": 5}}}), Clock())
    assert anonymous.name == "anonymous" and anonymous.counts_tokens


async def test_requests_a_minute_over_http() -> None:
    async with stopped_clock(**limits(requests_per_minute=2)) as client:
        for left in ("1", "0"):
            response = await client.post(CHAT_URL, json=CHAT, headers=TEAM)
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == left
            assert response.headers["x-ratelimit-reset-requests"].endswith("s")
        response = await client.post(CHAT_URL, json=CHAT, headers=TEAM)
        error = error_of(response, 429)
        assert (error["code"], error["type"], error["param"]) == ("rate_limit_exceeded", "requests", None)
        assert response.headers["retry-after"] == "30" and response.headers["retry-after-ms"] == "30000"
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert "x-ratelimit-limit-tokens" not in response.headers
        # What has no body is free, and other keys have their own account.
        assert (await client.get("/v1/models", headers=TEAM)).status_code == 200
        other = await client.post(CHAT_URL, json=CHAT, headers=OTHER)
        assert other.status_code == 200 and not any(name.startswith("x-ratelimit") for name in other.headers)
        page = (await client.get("/metrics")).text
    assert 'slipstream:rate_limited_requests_total{key="team",limit="requests"} 1.0' in page
    assert 'slipstream:rate_limited_requests_total{key="key-1",limit="tokens"} 0.0' in page
    assert "secret" not in page


async def test_tokens_of_prompts_and_answers_are_counted() -> None:
    engine = FakeEngine(answer=[65] * 10)
    async with stopped_clock(engine, **limits(tokens_per_minute=100)) as client:
        response = await client.post(
            COMPLETION_URL, json={"prompt": ["a" * 20, "b" * 10], "n": 2, "max_tokens": 5}, headers=TEAM
        )
        assert response.headers["x-ratelimit-remaining-tokens"] == "50"
        assert response.json()["usage"]["total_tokens"] == 50
        response = await client.post(COMPLETION_URL, json={"prompt": "a" * 60}, headers=TEAM)
        error = error_of(response, 429)
        assert error["type"] == "tokens" and "60" in error["message"]
        response = await client.post(COMPLETION_URL, json={"prompt": "a" * 101}, headers=TEAM)
        assert response.headers["x-should-retry"] == "false" and "retry-after" not in response.headers
        assert error_of(response, 429)["code"] == "rate_limit_exceeded"
        refused = await client.post(COMPLETION_URL, json={"prompt": "a" * 10, "logit_bias": {"9999": 1}}, headers=TEAM)
        assert refused.status_code == 400
        assert refused.headers["x-ratelimit-remaining-tokens"] == "50"  # what the engine has refused costs nothing
        assert len(engine.submitted) == 4


async def test_a_stream_holds_its_place_until_it_ends() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    app = make_app(engine, **limits(concurrent_requests=1))
    async with started(app):
        stream = Connection(app, CHAT_URL, {**CHAT, "stream": True}, **TEAM)
        assert (await stream.next())["status"] == 200
        refused = Connection(app, CHAT_URL, CHAT, **TEAM)
        message = await refused.next()
        headers = dict(message["headers"])
        assert message["status"] == 429 and headers[b"retry-after"] == b"1"
        assert b"at once" in await refused.rest()
        engine.flowing.set()
        await stream.rest()
        again = Connection(app, CHAT_URL, CHAT, **TEAM)
        assert (await again.next())["status"] == 200
        await again.rest()
        assert not app.state.service.accounts.leases


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_gives_its_place_back(streamed: bool) -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    app = make_app(engine, **limits(concurrent_requests=1))
    async with started(app):
        for _ in range(3):
            connection = Connection(app, CHAT_URL, {**CHAT, "stream": streamed}, **TEAM)
            while not engine.in_flight._live:
                await asyncio.sleep(0)
            assert len(app.state.service.accounts.leases) == 1
            await connection.leave()
            assert not app.state.service.accounts.leases
    assert len(engine.aborted) == 3


async def test_a_request_that_fails_gives_its_place_back() -> None:
    app = make_app(FakeEngine(), **limits(concurrent_requests=1))
    async with started(app):
        for body, status in ((b"{", 400), (b"[]", 400), (b'{"messages": 1}', 400)):
            connection = Connection(app, CHAT_URL, {}, **TEAM)
            connection._incoming.get_nowait()
            connection._incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
            assert (await connection.next())["status"] == status
            await connection.rest()
        wrong = Connection(app, CHAT_URL, CHAT, **{**TEAM, "content-type": "text/plain"})
        assert (await wrong.next())["status"] == 415
        await wrong.rest()
        assert not app.state.service.accounts.leases


async def test_an_open_server_has_one_account_for_all() -> None:
    async with serving(limits={"default": {"requests_per_minute": 1}}) as client:
        assert (await client.post(COMPLETION_URL, json=COMPLETION)).status_code == 200
        assert error_of(await client.post(COMPLETION_URL, json=COMPLETION), 429)


async def test_without_limits_nobody_watches() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        response = await client.post(COMPLETION_URL, json=COMPLETION)
        assert not any(name.startswith("x-ratelimit") for name in response.headers)
        assert len(engine.observers) == 1  # the metrics' own


async def test_keys_are_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(**limits(requests_per_minute=1))  # type: ignore[arg-type]
    assert "secret" not in repr(settings) + str(settings.model_dump(mode="json"))
    with caplog.at_level("DEBUG", "server"):
        async with serving(**limits(requests_per_minute=1)) as client:
            for _ in range(2):
                response = await client.post(CHAT_URL, json=CHAT, headers=TEAM)
    assert "secret" not in caplog.text + response.text + str(response.headers)
