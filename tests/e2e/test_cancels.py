"""Clients that leave at any moment: nothing of them stays behind, and nobody else's answer changes."""

from __future__ import annotations

import asyncio
import json
import random
import re
from dataclasses import dataclass

import httpx
import pytest

from tests.e2e.process import ServerProcess
from tests.e2e.wire import Json, assert_idle, complete, get, post

REQUESTS = 200
AT_ONCE = 40


@dataclass(frozen=True)
class Visit:
    """One client: what it asks, and after how many seconds it leaves (None: it stays to the end)."""

    body: Json
    patience: float | None


def visits(random_source: random.Random, words: str, longest: int, patience: float) -> list[Visit]:
    made = []
    for i in range(REQUESTS):
        stays = i % 8 == 0  # with a small request
        size = random_source.choice((1, 20) if stays else (1, 20, longest))
        body: Json = {
            "prompt": f"{i % 7} " + " ".join(random_source.choices(words.split(), k=size)),
            "max_tokens": 8 if stays else random_source.choice((5, 100, 400)),
            "temperature": 1,
            "seed": i,
            "ignore_eos": True,
            "stream": random_source.random() < 0.5,
            "n": random_source.choice((1, 1, 2)),
        }
        if random_source.random() < 0.3:
            body["stop"] = ["zzzz", "the end", " "]
        if random_source.random() < 0.2:
            body |= {"echo": True, "logprobs": 2}
        made.append(Visit(body, None if stays else random_source.uniform(0, patience)))
    return made


async def visit(client: httpx.AsyncClient, one: Visit, gate: asyncio.Semaphore) -> bytes | None:
    """The body of the answer; None when the client left before its end."""
    async with gate:
        try:
            async with (
                asyncio.timeout(one.patience),
                client.stream("POST", "/v1/completions", json=one.body) as response,
            ):
                whole = b"".join([piece async for piece in response.aiter_raw()])
        except TimeoutError:
            return None
    assert response.status_code == 200, whole
    return whole


async def storm(url: str, plan: list[Visit], prompt: str, expected: str) -> list[bytes | None]:
    """All visits, and beside them a client that stays and always gets the answer that it gets alone."""
    gate, ended = asyncio.Semaphore(AT_ONCE), asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:

        async def stay() -> None:
            body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
            while not ended.is_set():
                answer = await client.post("/v1/completions", json=body)
                assert answer.json()["choices"][0]["text"] == expected

        async with asyncio.TaskGroup() as group:
            group.create_task(stay())
            tasks = [group.create_task(visit(client, one, gate)) for one in plan]
            await asyncio.wait(tasks)
            ended.set()
    return [task.result() for task in tasks]


def aborted(url: str) -> float:
    """Requests that were cancelled since start."""
    page = get(url, "/metrics").text
    found = re.search(r'^vllm:request_success_total\{.*finished_reason="abort".*\} (\S+)$', page, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize(
    ("name", "prompt", "words", "longest", "patience"),
    [
        pytest.param("tiny", "the same as ever", "a bc def ghij klm no", 120, 0.6, id="tiny"),
        pytest.param("demo", "The sun rises in the east and", "red green blue one two three", 900, 0.8, id="demo"),
    ],
)
def test_two_hundred_clients_that_leave(
    request: pytest.FixtureRequest, name: str, prompt: str, words: str, longest: int, patience: float
) -> None:
    server: ServerProcess = request.getfixturevalue(name)
    engine, before = server.engine_pid, complete(server.url, prompt)
    plan = visits(random.Random(5), words, longest, patience)
    already = aborted(server.url)
    answers = asyncio.run(storm(server.url, plan, prompt, before))
    left = answers.count(None)
    assert REQUESTS // 4 < left < REQUESTS
    assert_idle(server.url)
    assert aborted(server.url) - already >= left // 2  # the others left before they were heard or after their answer
    assert server.engine_pid == engine
    assert complete(server.url, prompt) == before
    stayed = [
        (one.body, json.loads(answer))
        for one, answer in zip(plan, answers, strict=True)
        if answer is not None and not one.body["stream"]
    ]
    for body, answer in stayed[:5]:  # seeded: the same text in the storm and alone
        alone = post(server.url, "/v1/completions", body).json()
        assert [choice["text"] for choice in alone["choices"]] == [choice["text"] for choice in answer["choices"]]
