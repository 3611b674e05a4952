"""The same texts whatever runs beside a request, and with results that come a step late (lag 1)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.e2e.process import ServerProcess, wait_until
from tests.e2e.wire import Json, assert_idle, check_error, get, http_request, raw

RIGHT = {"authorization": "Bearer sk-right"}


def jobs() -> list[Json]:
    """Greedy and seeded, short and several chunks long, with choices, penalties and stops."""
    prompts = ["a", "the quick brown fox " * 3, "lorem ipsum " * 25, [7] * 200 + [9] * 30, "bytes: äöü €"]
    kinds: list[Json] = [
        {"temperature": 0},
        {"temperature": 0, "frequency_penalty": 1.5, "repetition_penalty": 1.1},
        {"temperature": 1, "seed": 3, "top_p": 0.9, "n": 2},
        {"temperature": 0.7, "seed": -(2**63), "top_k": 20, "min_p": 0.01, "stop": ["a", "€"]},
    ]
    return [
        {"prompt": prompt, "max_tokens": 24 + 7 * i, "ignore_eos": True, **kind}
        for i, prompt in enumerate(prompts)
        for kind in kinds
    ]


async def run(server: ServerProcess, bodies: list[Json], at_once: int, headers: dict[str, str]) -> list[Any]:
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120) as client:

        async def one(body: Json) -> Any:
            async with gate:
                response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            return [(choice["text"], choice["finish_reason"]) for choice in response.json()["choices"]]

        return await asyncio.gather(*map(one, bodies))


@pytest.mark.asyncio
async def test_alone_together_and_with_lag(tiny: ServerProcess, keyed: ServerProcess) -> None:
    bodies = jobs()
    alone = await run(tiny, bodies, 1, {})
    assert await run(tiny, bodies[::-1], 8, {}) == alone[::-1]
    assert await run(keyed, bodies, 8, RIGHT) == alone
    assert await run(keyed, bodies[::-1], 8, RIGHT) == alone[::-1]  # now from the prefix cache
    assert_idle(tiny.url)
    assert_idle(keyed.url)


def test_a_server_with_a_key(keyed: ServerProcess) -> None:
    right = OpenAI(base_url=f"{keyed.url}/v1", api_key="sk-right", max_retries=0)
    assert right.completions.create(model="tiny", prompt="a", max_tokens=2).choices
    wrong = OpenAI(base_url=f"{keyed.url}/v1", api_key="sk-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        wrong.models.list()
    assert caught.value.code == "invalid_api_key"
    assert get(keyed.url, "/v1/models").headers["www-authenticate"] == "Bearer"
    assert get(keyed.url, "/health").status_code == 200
    assert "YOUR_API_KEY" in keyed.output and "sk-right" not in keyed.output + keyed.log


def test_a_server_with_enough_connections(keyed: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", keyed.port)))
        refused = raw(keyed.port, b"")
        assert (refused.status, refused.closed) == (503, True) and int(refused.headers["retry-after"]) >= 1
        assert check_error(json.loads(refused.body))["code"] == "overloaded"
    wait_until(
        lambda: raw(keyed.port, http_request(b"", "/health", "GET")).status == 200, "connections to be free again"
    )
