"""The short way of chunks: the same bytes as the usual one, on a real socket."""

from __future__ import annotations

import asyncio
import random
import re

import pytest

from engine.types import FinishReason, TokenEvent, Usage
from server.serving import SocketWriter
from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, events, serving
from tests.server.test_serving import listening, post

pytestmark = pytest.mark.asyncio

ANSWER = "The quick brown fox jumps over the lazy dog. " * 4
VARIANTS: tuple[dict[str, object], ...] = (
    {},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"logprobs": True, "top_logprobs": 2, "n": 2},
    {"stop": ["lazy"], "return_token_ids": True},
)


def plain(text: str) -> list[object]:
    """The events of an answer without what differs from one to the next, those of each choice in a row."""
    found = events(re.sub(r'"(id|created)":("[^"]*"|\d+)', r'"\1":0', text))
    return sorted(found, key=lambda event: (str(event) == "[DONE]", _choice(event)))


def _choice(event: object) -> int:
    choices = event.get("choices") if isinstance(event, dict) else None
    return choices[0]["index"] if choices else 99


def unchunk(body: bytes) -> list[bytes]:
    """The HTTP chunks of a body; asserts that nothing is behind the last one."""
    parts = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        parts.append(rest[:length])
        body = rest[length + 2 :]
    assert parts.pop() == b""
    return parts


@pytest.mark.parametrize("extra", VARIANTS, ids=lambda extra: ",".join(extra) or "plain")
async def test_the_short_way_says_what_the_usual_one_says(extra: dict[str, object]) -> None:
    asked = {**CHAT, "stream": True, "max_tokens": 300, "seed": 1, **extra}
    async with serving(FakeEngine(answer=ANSWER)) as client:  # in-process: nobody lends a socket
        usual = await client.post("/v1/chat/completions", json=asked)
    async with listening(FakeEngine(answer=ANSWER)) as running:
        answer = await running.say(post(asked, b"connection: close"))
        old = await running.say(post(asked).replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    parts = unchunk(body)
    assert len(parts) > 20 and all(part.startswith(b"data: ") and part.endswith(b"\n\n") for part in parts)
    expected = plain(usual.text)
    assert len(expected) > 20 and plain(b"".join(parts).decode()) == expected
    assert plain(old.partition(b"\r\n\r\n")[2].decode()) == expected  # HTTP/1.0 has no chunks


async def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    write = SocketWriter.write

    def noted(self: SocketWriter, data: bytes) -> None:
        written.append(data)
        write(self, data)

    monkeypatch.setattr(SocketWriter, "write", noted)
    async with listening(FakeEngine(answer=ANSWER)) as running:
        answer = await running.say(post({**CHAT, "stream": True}, b"connection: close"))
        page = (await running.say(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).decode()
    body = b"".join(unchunk(answer.partition(b"\r\n\r\n")[2]))
    assert len(written) > 5 and b"".join(written) in body
    assert f'http_response_size_bytes_sum{{handler="/v1/chat/completions"}} {float(len(body))}' in page


async def test_a_way_that_is_closed_now_and_then_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the connection can't take waits, and is not overtaken."""
    turns = random.Random(3)
    monkeypatch.setattr(SocketWriter, "ready", lambda _: turns.random() < 0.5)
    asked = {**CHAT, "stream": True, "max_tokens": 300, "logprobs": True, "top_logprobs": 1}
    async with listening(FakeEngine(answer=ANSWER)) as running:
        answer = await running.say(post(asked, b"connection: close"))
    found = events(b"".join(unchunk(answer.partition(b"\r\n\r\n")[2])).decode())[1:]
    choices = [chunk["choices"][0] for chunk in found]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == ANSWER
    scores = [entry["token"] for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert "".join(scores[:-1]) == ANSWER


async def test_what_writing_a_chunk_raises_ends_that_stream_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(answer=ANSWER)
    engine.flowing.clear()
    async with listening(engine) as running:
        asking = asyncio.create_task(running.say(post({**CHAT, "stream": True}, b"connection: close")))
        other = asyncio.create_task(running.say(post({**CHAT, "stream": True}, b"connection: close")))
        while len(engine.submitted) < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        first = engine.submitted[0].id
        broken = TokenEvent(first, (1,), "x", Usage(1, 1), finish=FinishReason.ABORT)  # no answer ends like this
        engine.in_flight._live[first].stream.put(broken)
        assert b'{"error":{"message":' in await asking and b"[DONE]" in await asking
        engine.flowing.set()
        assert b"error" not in await other
    assert not [record for record in caplog.records if record.exc_info]
