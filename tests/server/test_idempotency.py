"""Requests that are sent again: request_id in the body, and Idempotency-Key."""

from __future__ import annotations

import asyncio

import pytest
from starlette.responses import Response

from server.errors import ApiError
from server.idempotency import MOST_ANSWERS, MOST_BYTES, MOST_OF_ONE, Replays, Sent
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
    stream,
)

pytestmark = pytest.mark.asyncio
KEY: Json = {"idempotency-key": "k1"}


@pytest.mark.parametrize("url, base, prefix", [(CHAT_URL, CHAT, "chatcmpl"), (COMPLETION_URL, COMPLETION, "cmpl")])
async def test_a_request_id_is_in_the_answer_s_id(url: str, base: Json, prefix: str) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        for name in ("mine", "a-0", "A.b:c_d".replace("_", "-"), "9" * 128):
            body = {**base, "request_id": name, "n": 2}
            assert (await client.post(url, json=body)).json()["id"] == f"{prefix}-{name}"
            assert {event["id"] for event in await stream(client, url, body)} == {f"{prefix}-{name}"}
        assert (await client.post(url, json={**base, "request_id": None})).status_code == 200
    assert engine.submitted[0].id == f"{prefix}-mine-0"


@pytest.mark.parametrize("name", ["", " ", "a b", "a\r\nset-cookie: x", "é", "\0", "../x", "-a", "x" * 129, 7, ["a"]])
async def test_odd_request_ids_are_refused(name: object) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        assert error_of(await client.post(CHAT_URL, json={**CHAT, "request_id": name}), 400)["param"] == "request_id"
    assert not engine.submitted


async def test_an_id_that_runs_is_refused_and_then_free_again() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    app = make_app(engine)
    body = {**CHAT, "request_id": "one"}
    async with started(app):
        first = Connection(app, CHAT_URL, {**body, "stream": True})
        assert (await first.next())["status"] == 200
        second = Connection(app, CHAT_URL, body)
        message = await second.next()
        assert message["status"] == 409 and (b"x-should-retry", b"false") in message["headers"]
        told = await second.rest()
        assert b'"request_id_in_use"' in told and b'"param":"request_id"' in told
        engine.flowing.set()
        await first.rest()
        third = Connection(app, CHAT_URL, body)
        assert (await third.next())["status"] == 200
        await third.rest()


async def test_the_same_key_and_body_get_the_same_answer() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        first = await client.post(CHAT_URL, json=CHAT, headers={**KEY, "x-request-id": "one"})
        again = await client.post(CHAT_URL, json=CHAT, headers={**KEY, "x-request-id": "two"})
        assert again.content == first.content and again.headers["content-type"] == first.headers["content-type"]
        assert "idempotent-replayed" not in first.headers and again.headers["idempotent-replayed"] == "true"
        assert again.headers["x-request-id"] == "two" and len(engine.submitted) == 1
        # Another key, another path and no key are other requests.
        for url, body, headers in (
            (CHAT_URL, CHAT, {"idempotency-key": "k2"}),
            (COMPLETION_URL, COMPLETION, KEY),
            (CHAT_URL, CHAT, {}),
        ):
            other = await client.post(url, json=body, headers=headers)
            assert other.status_code == 200 and "idempotent-replayed" not in other.headers
        assert len(engine.submitted) == 4


async def test_another_body_under_the_same_key() -> None:
    async with serving() as client:
        await client.post(CHAT_URL, json=CHAT, headers=KEY)
        response = await client.post(CHAT_URL, json={**CHAT, "seed": 1}, headers=KEY)
    assert error_of(response, 422)["code"] == "idempotency_key_reused"


async def test_callers_do_not_see_each_other_s_answers() -> None:
    engine = FakeEngine()
    async with serving(engine, api_keys="a,b") as client:
        for key in ("a", "b"):
            response = await client.post(CHAT_URL, json=CHAT, headers={**KEY, "authorization": f"Bearer {key}"})
            assert response.status_code == 200 and "idempotent-replayed" not in response.headers
    assert len(engine.submitted) == 2


async def test_while_the_first_one_runs() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    app = make_app(engine)
    async with started(app):
        first = Connection(app, CHAT_URL, CHAT, **KEY)
        while not len(engine.in_flight):
            await asyncio.sleep(0)
        second = Connection(app, CHAT_URL, CHAT, **KEY)
        message = await second.next()
        assert message["status"] == 409 and (b"retry-after", b"1") in message["headers"]
        assert b"idempotency_key_in_use" in await second.rest()
        await first.leave()  # a client that left has got nothing: its key is free
        engine.flowing.set()
        third = Connection(app, CHAT_URL, CHAT, **KEY)
        assert (await third.next())["status"] == 200
        await third.rest()
    assert len(engine.submitted) == 2


async def test_streams_and_errors_are_made_anew() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        for _ in range(2):
            response = await client.post(CHAT_URL, json={**CHAT, "stream": True}, headers=KEY)
            assert response.status_code == 200 and "idempotent-replayed" not in response.headers
            wrong = await client.post(CHAT_URL, json={}, headers={"idempotency-key": "k9"})
            assert wrong.status_code == 400 and "idempotent-replayed" not in wrong.headers
        assert (await client.post(CHAT_URL, json=CHAT, headers={"idempotency-key": "k9"})).status_code == 200
    assert len(engine.submitted) == 3


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_keys_that_are_none(key: str) -> None:
    async with serving() as client:
        response = await client.post(CHAT_URL, json=CHAT, headers={"idempotency-key": key})
    assert error_of(response, 400)["param"] == "idempotency-key"


async def test_it_can_be_turned_off() -> None:
    engine = FakeEngine()
    async with serving(engine, idempotency_seconds=0) as client:
        for _ in range(2):
            assert (await client.post(CHAT_URL, json=CHAT, headers=KEY)).status_code == 200
    assert len(engine.submitted) == 2


def make(replays: Replays, name: bytes, answer: Response) -> None:
    with replays.making(Sent(name, b"body")) as keep:
        with pytest.raises(ApiError):
            replays.find(Sent(name, b"body"))
        keep(answer)


async def test_what_is_kept_has_bounds() -> None:
    now = [0.0]
    replays = Replays(60.0, lambda: now[0])
    make(replays, b"first", Response(b"x"))
    make(replays, b"error", Response(b"x", 500))
    make(replays, b"large", Response(bytes(MOST_OF_ONE + 1)))
    assert replays.find(Sent(b"first", b"body")) is not None
    assert replays.find(Sent(b"error", b"body")) is None and replays.find(Sent(b"large", b"body")) is None
    for i in range(MOST_ANSWERS):
        make(replays, b"%d" % i, Response(b"x"))
    assert replays.find(Sent(b"first", b"body")) is None
    assert replays.find(Sent(b"0", b"body")) is not None and replays._bytes == MOST_ANSWERS
    for i in range(MOST_BYTES // MOST_OF_ONE + 2):
        make(replays, b"big %d" % i, Response(bytes(MOST_OF_ONE)))
    assert replays._bytes <= MOST_BYTES and replays.find(Sent(b"5", b"body")) is None
    now[0] = 59.9
    assert replays.find(Sent(b"big 9", b"body")) is not None
    now[0] = 60.0
    assert replays.find(Sent(b"big 9", b"body")) is None
    assert replays._bytes == 0 and not replays._kept and not replays._running
