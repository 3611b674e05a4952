"""The two SDKs in process, and the framing of streams whose events have names."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic import TypeAdapter

from tests.server.fake_engine import FakeEngine
from tests.server.harness import Json, make_app, started


@asynccontextmanager
async def in_process(engine: FakeEngine, **settings: Any) -> AsyncIterator[Json]:
    """Arguments of a client that checks every answer strictly and never asks twice."""
    async with (
        started(make_app(engine, **settings)) as app,
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as http,
    ):
        yield {"api_key": "k", "http_client": http, "max_retries": 0, "_strict_response_validation": True}


@asynccontextmanager
async def openai_client(engine: FakeEngine, **settings: Any) -> AsyncIterator[AsyncOpenAI]:
    async with in_process(engine, **settings) as arguments:
        yield AsyncOpenAI(base_url="http://test/v1", **arguments)


@asynccontextmanager
async def anthropic_client(engine: FakeEngine, **settings: Any) -> AsyncIterator[AsyncAnthropic]:
    async with in_process(engine, **settings) as arguments:
        yield AsyncAnthropic(base_url="http://test", **arguments)


def named_events(text: str, types: TypeAdapter[Any], untyped: Collection[str] = ()) -> list[Json]:
    """The events of a stream. Checks their framing and names, and that they are of the SDK's `types`."""
    blocks = text.split("\n\n")
    assert blocks[-1] == "" and "[DONE]" not in text
    found = []
    for block in blocks[:-1]:
        if block.startswith(": "):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] not in untyped:
            types.validate_python(event)
        found.append(event)
    return found
