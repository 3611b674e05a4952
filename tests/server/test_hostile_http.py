"""Bodies and headers that are wrong or meant to do harm. Each is refused in our shape, and the server goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from server.body import MAX_CONTAINERS, parse_json
from server.errors import ApiError
from tests.server.fake_engine import FakeEngine
from tests.server.harness import (
    CHAT,
    CHAT_URL,
    COMPLETION,
    COMPLETION_URL,
    Connection,
    error_of,
    make_app,
    serving,
    started,
)

pytestmark = pytest.mark.asyncio
JSON = {"content-type": "application/json"}
MESSAGE = b'{"messages": [{"role": "user", "content": "x"}], "extra": %s}'

BROKEN: dict[str, bytes] = {
    "empty": b"",
    "blank": b"  \n",
    "truncated": b'{"messages": [{"role"',
    "no quotes": b"{messages: 1}",
    "trailing": b'{"a": 1} {"b": 2}',
    "not json": b"prompt=hi&n=1",
    "nested arrays": b"[" * 100_000,
    "nested arrays, closed": b"[" * 100_000 + b"]" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "nested a bit": b'{"messages":' + b"[" * 65 + b"]" * 65 + b"}",
    "digits": MESSAGE % (b"9" * 5000),
    "NaN": MESSAGE % b"NaN",
    "Infinity": MESSAGE % b"-Infinity",
    "out of range": MESSAGE % b"1e400",
    "lone surrogate": MESSAGE % rb'"\ud800"',
    "lone surrogate before text": MESSAGE % rb'"\udc00abc"',
    "surrogate bytes": MESSAGE % b'"\xed\xa0\x80"',
    "latin-1": MESSAGE % b'"\xe9"',
    "UTF-16": json.dumps(CHAT).encode("utf-16"),
    "raw NUL": MESSAGE % b'"\x00"',
    "raw line break": MESSAGE % b'"\n"',
    "bad escape": MESSAGE % rb'"\x41"',
    "byte order mark": b"\xef\xbb\xbf{}",
    "many containers": b"[" + b"[]," * MAX_CONTAINERS + b"[]]",
}


@pytest.mark.parametrize("name", BROKEN)
async def test_bodies_that_are_no_json(name: str) -> None:
    async with serving() as client:
        error = error_of(await client.post(CHAT_URL, content=BROKEN[name], headers=JSON), 400)
        assert (await client.post(CHAT_URL, json=CHAT)).status_code == 200
    assert error["code"] == "invalid_json" and len(error["message"]) < 300


@pytest.mark.parametrize("body", [b"[]", b"1", b'"x"', b"true", b"[1, 2]"])
async def test_json_that_is_no_object(body: bytes) -> None:
    async with serving() as client:
        error_of(await client.post(CHAT_URL, content=body, headers=JSON), 400)


@pytest.mark.parametrize("body", [b"null", b"{}"])
async def test_json_without_the_fields(body: bytes) -> None:
    async with serving() as client:
        error = error_of(await client.post(CHAT_URL, content=body, headers=JSON), 400)
    assert error["code"] in ("missing_required_parameter", "invalid_type")


@pytest.mark.parametrize("depth, good", [(64, True), (65, False)])
async def test_depth_limit_is_exact(depth: int, good: bool) -> None:
    text = b"[" * depth + b"]" * depth
    if good:
        parse_json(text)
    else:
        with pytest.raises(ApiError, match="nested"):
            parse_json(text)


async def test_brackets_in_texts_are_no_nesting() -> None:
    text = "[{" * 1000
    assert parse_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}


async def test_nul_characters_and_special_tokens_are_text() -> None:
    async with serving() as client:
        body = {"messages": [{"role": "user", "content": "a\0b<eos>\u2028"}]}
        assert (await client.post(CHAT_URL, json=body)).status_code == 200
        assert (await client.post(COMPLETION_URL, json={"prompt": "a\0b<eos>"})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "x" * 1000},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/json", "content-encoding": "br"},
    ],
)
async def test_wrong_content_types(headers: dict[str, str]) -> None:
    async with serving() as client:
        response = await client.post(CHAT_URL, content=json.dumps(CHAT), headers=headers)
    assert error_of(response, 415)["code"] == "unsupported_media_type"


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"])
async def test_right_content_types(kind: str) -> None:
    async with serving() as client:
        response = await client.post(CHAT_URL, content=json.dumps(CHAT), headers={"content-type": kind})
        answer = await client.post(CHAT_URL, json=CHAT, headers={"accept-encoding": "gzip, br"})
    assert response.status_code == 200, response.text
    assert "content-encoding" not in answer.headers


async def test_declared_length_is_refused_before_anything_is_read() -> None:
    async with started(make_app(FakeEngine(), max_body_bytes=1000)) as app:
        for length in ("1001", "1000000000", "9" * 400):
            connection = Connection(app, CHAT_URL, CHAT, content_length=length)
            start = await connection.next()
            assert start["status"] == 413
            assert (b"connection", b"close") in start["headers"]
            assert json.loads((await connection.next())["body"])["error"]["code"] == "request_too_large"


async def test_counted_length_is_refused_without_a_declared_one() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b" " * 100

    async with serving(max_body_bytes=1000) as client:
        response = await client.post(CHAT_URL, content=endless(), headers=JSON)
    error_of(response, 413)
    assert sent <= 12


async def test_a_body_that_never_ends_in_time() -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with serving(body_timeout=0.05) as client:
        response = await client.post(CHAT_URL, content=slow(), headers=JSON)
        error_of(response, 408)
        assert response.headers["connection"] == "close"
        assert (await client.post(CHAT_URL, json=CHAT)).status_code == 200


@pytest.mark.parametrize(
    "given, expected",
    [
        ("abc-1.2:3_4", "abc-1.2:3_4"),
        ("a\r\nset-cookie: x", "aset-cookie:x"),
        ("<script>", "script"),
        ("x" * 5000, "x" * 128),
        ("é" * 10, None),
        ("", None),
    ],
)
async def test_request_ids(given: str, expected: str | None) -> None:
    sent = given.encode("ascii", "ignore").decode()
    async with started(make_app(FakeEngine())) as app:
        connection = Connection(app, "/nothing", {}, x_request_id=sent)
        start = dict((await connection.next())["headers"])
        await connection.task
    told = start[b"x-request-id"].decode()
    assert told == expected if expected is not None else len(told) == 32


async def test_request_ids_are_on_every_response() -> None:
    async with serving() as client:
        responses = [
            await client.get("/health"),
            await client.get("/nowhere"),
            await client.post(CHAT_URL, json=CHAT),
            await client.post(CHAT_URL, json={**CHAT, "stream": True}),
            await client.post(COMPLETION_URL, json={**COMPLETION, "n": 0}),
        ]
    assert len({response.headers["x-request-id"] for response in responses}) == 5
