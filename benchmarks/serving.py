"""Side-by-side speed of servers over HTTP: `python -m benchmarks.serving --server name=url --server other=url`.

All servers must be up. Each round asks every server for the same prompts, scenario by scenario, the servers in a
new order each time; nothing else should run on the machine. Two figures of one round were taken within a minute of
each other, so ratios are made within rounds, and their median and range are printed. The load of everything but
the measured server and this client is printed beside: a figure taken beside other work is not one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from benchmarks import report
from benchmarks.client import Server, find_counter
from benchmarks.processes import OtherLoad, listeners
from benchmarks.prompts import Prompts, licence_text
from benchmarks.scenarios import NEW_TOKENS, SCENARIOS, Scenario, Values
from benchmarks.stream import BenchmarkError

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Measurement:
    """One scenario on one server in one round; `other_load` in busy cores."""

    scenario: str
    server: str
    round: int
    values: Values
    other_load: float


async def measure(
    servers: Sequence[Server],
    scenarios: Sequence[Scenario],
    prompts: Prompts,
    rounds: int,
    new_tokens: int,
    turn: Callable[[Server], AbstractAsyncContextManager[None]] = lambda _server: contextlib.nullcontext(),
) -> list[Measurement]:
    """A warm-up round with few tokens, then the rounds that count. Each measurement is in a `turn` of its server."""
    found: list[Measurement] = []
    for number in range(rounds + 1):
        tokens = new_tokens if number else min(new_tokens, WARM_UP_TOKENS)
        for scenario in scenarios:
            texts = await scenario.prompts(prompts)
            for server in _rotated(servers, number):
                async with turn(server):
                    with OtherLoad(listeners(server.url)) as load:
                        values = await scenario.run(server, texts, tokens)
                if number:
                    found.append(Measurement(scenario.name, server.name, number, values, load.cores))
                    _say(f"round {number}/{rounds}  {scenario.name:<11} {server.name:<14} {_line(scenario, values)}")
    return found


def _rotated(servers: Sequence[Server], number: int) -> list[Server]:
    """Everyone is first in turn: what runs second finds warm caches, or a warm and slower processor."""
    shift = number % len(servers)
    return [*servers[shift:], *servers[:shift]]


def _line(scenario: Scenario, values: Values) -> str:
    return "  ".join(f"{metric.title} {report.show(values[metric.key])}" for metric in scenario.metrics)


def speed_table(found: Sequence[Measurement], scenarios: Sequence[Scenario], names: Sequence[str]) -> list[list[str]]:
    """Rows: medians and ranges for each server, then how many times better the first one is than each other."""
    first, *others = names
    rows = [["", *names, *(f"{first} / {other}" for other in others)]]
    for scenario in scenarios:
        for metric in scenario.metrics:
            columns = {name: column(found, scenario.name, name, metric.key) for name in names}
            ratios = (
                report.paired_ratios(columns[first], columns[other], higher_is_better=metric.higher_is_better)
                for other in others
            )
            rows.append([metric.title, *map(report.spread, columns.values()), *map(report.spread, ratios)])
        loads = [[m.other_load for m in found if (m.scenario, m.server) == (scenario.name, name)] for name in names]
        rows.append([f"  beside it ({scenario.name}), cores", *map(report.spread, loads), *("" for _ in others)])
    return rows


def column(found: Sequence[Measurement], scenario: str, server: str, key: str) -> list[float]:
    """One figure over the rounds, in their order."""
    ordered = sorted(found, key=lambda m: m.round)
    return [m.values[key] for m in ordered if (m.scenario, m.server) == (scenario, server)]


def uneven_prompts(found: Sequence[Measurement]) -> list[str]:
    """Scenarios whose prompts were not equally long for all servers: those ran different models."""
    complaints = []
    for name in dict.fromkeys(m.scenario for m in found):
        of_round: dict[int, set[float]] = {}
        for m in found:
            if m.scenario == name:
                of_round.setdefault(m.round, set()).add(m.values["prompt_tokens"])
        if any(len(lengths) > 1 for lengths in of_round.values()):
            complaints.append(f"{name}: the servers counted different numbers of prompt tokens")
    return complaints


async def run(arguments: argparse.Namespace) -> int:
    scenarios = [s for s in SCENARIOS if not arguments.only or s.name in arguments.only]
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Server(name, url)) for name, url in arguments.server]
        count_tokens, counted_by = await find_counter(servers)
        prompts = Prompts(licence_text(), count_tokens, arguments.seed)
        began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        found = await measure(servers, scenarios, prompts, arguments.rounds, arguments.tokens)
    record = {
        "commit": report.git_commit(),
        "machine": report.machine(),
        "began": began,
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        "new_tokens": arguments.tokens,
        "tokens_counted_by": counted_by or "estimate",
        "servers": {server.name: {"url": server.url, "model": server.model} for server in servers},
        "measurements": [asdict(m) for m in found],
    }
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    print(report.table(speed_table(found, scenarios, [server.name for server in servers])))
    print(f"\nmedian (lowest-highest) of {arguments.rounds} rounds; {record['machine']}; commit {record['commit']}")
    print(f"load of other processes, all rounds: {statistics.mean(m.other_load for m in found):.2f} cores on average")
    for complaint in (*uneven_prompts(found), *(() if counted_by else ("prompt lengths are estimates",))):
        print(f"note: {complaint}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _server(text: str) -> tuple[str, str]:
    name, separator, url = text.partition("=")
    if not (name and separator and url.startswith(("http://", "https://"))):
        raise argparse.ArgumentTypeError(f"{text!r} is not name=http://host:port")
    return name, url


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.serving", description="Compare servers over HTTP.")
    made.add_argument(
        "--server", metavar="NAME=URL", type=_server, action="append", required=True, help="may be given again"
    )
    made.add_argument("--rounds", type=_count, default=5, help="default: %(default)s")
    made.add_argument("--tokens", type=_count, default=NEW_TOKENS, help="new tokens per request (default: %(default)s)")
    made.add_argument("--only", action="append", choices=[s.name for s in SCENARIOS], help="may be given again")
    made.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000, help="default: from the clock")
    made.add_argument("--json", type=Path, metavar="FILE", help="where to write every single figure")
    return made


def main() -> int:
    arguments = parser().parse_args()
    names = [name for name, _ in arguments.server]
    try:
        if len(set(names)) < len(names):
            raise BenchmarkError("two servers have one name")
        if arguments.tokens < 2:
            raise BenchmarkError("a decode rate needs at least 2 new tokens")
        return asyncio.run(run(arguments))
    except BenchmarkError as error:
        _say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
