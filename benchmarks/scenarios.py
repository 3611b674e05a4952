"""What `benchmarks.serving` asks of each server: one client, eight, thirty-two, and the same prefix twice."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from benchmarks.client import Server
from benchmarks.prompts import Prompts
from benchmarks.report import percentile
from benchmarks.stream import Timing

NEW_TOKENS = 128
SINGLE_REQUESTS = 3  # one after the other in each round; their median counts
SINGLE_PROMPT = 64  # tokens
Values = dict[str, float]


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the printed table; `key` names it within the values of its scenario."""

    key: str
    title: str
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class Scenario:
    """`prompts` makes what one round sends, the same for every server; `run` sends it and measures."""

    name: str
    metrics: tuple[Metric, ...]
    prompts: Callable[[Prompts], Awaitable[Sequence[str]]]
    run: Callable[[Server, Sequence[str], int], Awaitable[Values]]


async def single(server: Server, prompts: Sequence[str], new_tokens: int) -> Values:
    """One request at a time."""
    timings = [await server.complete(prompt, new_tokens) for prompt in prompts]
    return {
        "decode": statistics.median(timing.decode_rate for timing in timings),
        "first_token_ms": 1000 * statistics.median(timing.first_token for timing in timings),
        "prompt_tokens": statistics.mean(timing.prompt_tokens for timing in timings),
    }


async def crowd(server: Server, prompts: Sequence[str], new_tokens: int, clients: int) -> Values:
    """`clients` clients take the prompts from one list until it is empty; tokens per second of the whole."""
    waiting = iter(prompts)
    timings: list[Timing] = []

    async def client() -> None:
        for prompt in waiting:
            timings.append(await server.complete(prompt, new_tokens))

    began = time.monotonic()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
    except ExceptionGroup as failed:  # one is enough to know
        raise failed.exceptions[0] from None
    seconds = time.monotonic() - began
    gaps = [gap for timing in timings for gap in timing.gaps]
    first = [timing.first_token for timing in timings]
    return {
        "output": sum(timing.completion_tokens for timing in timings) / seconds,
        "seconds": seconds,
        "first_token_ms": 1000 * statistics.median(first),
        "first_token_p99_ms": 1000 * percentile(first, 99),
        "gap_ms": 1000 * statistics.median(gaps) if gaps else 0.0,
        "gap_p99_ms": 1000 * percentile(gaps, 99) if gaps else 0.0,
        "prompt_tokens": statistics.mean(timing.prompt_tokens for timing in timings),
    }


async def same_prefix(server: Server, prompts: Sequence[str], new_tokens: int) -> Values:
    """A prompt that the server has not seen, then the same with another ending."""
    first = await server.complete(prompts[0], min(new_tokens, 2))
    second = await server.complete(prompts[1], min(new_tokens, 2))
    return {
        "first_ms": 1000 * first.first_token,
        "second_ms": 1000 * second.first_token,
        "speedup": first.first_token / second.first_token,
        "prompt_tokens": first.prompt_tokens,
    }


def _crowd_scenario(clients: int, requests: int) -> Scenario:
    async def run(server: Server, prompts: Sequence[str], new_tokens: int) -> Values:
        return await crowd(server, prompts, new_tokens, clients)

    metric = Metric("output", f"{clients} clients, tok/s", True)
    return Scenario(f"{clients} clients", (metric,), lambda prompts: prompts.mixed(requests), run)


async def _single_prompts(prompts: Prompts) -> list[str]:
    return [await prompts.make(SINGLE_PROMPT) for _ in range(SINGLE_REQUESTS)]


SCENARIOS = (
    Scenario(
        "single",
        (
            Metric("decode", "one stream, decode tok/s", True),
            Metric("first_token_ms", f"first token of {SINGLE_PROMPT}, ms", False),
        ),
        _single_prompts,
        single,
    ),
    _crowd_scenario(8, 16),
    _crowd_scenario(32, 32),
    Scenario(
        "prefix",
        (
            Metric("first_ms", "first token of a new 512, ms", False),
            Metric("second_ms", "first token, same 512 again, ms", False),
            Metric("speedup", "the second is faster, times", True),
        ),
        Prompts.pair,
        same_prefix,
    ),
)
