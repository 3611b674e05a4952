"""Milliseconds that the front adds to a streamed token at 32 streams: `python -m benchmarks.overhead`.

Two figures, because there are two ways to add time, and neither sees the other:

- delivery: from the end of the engine step that made a token to the moment the client has the chunk with it. It
  holds the message between the processes, detokenizing, JSON, the HTTP write, and the client's own reading, all
  while the next step keeps the cores busy. Both ends are read on one clock (`time.monotonic()` is the same for all
  processes of a Linux machine), token by token: chunks are matched to steps through the prompt and the count of
  tokens that every chunk carries. The mean over all chunks is the figure; percentiles stand beside it.
- slower steps: the front and this client take processor time from the engine, and the engine process sends a
  message after each step. So the time from step to step, with all streams decoding, is compared with an EngineCore
  alone in one process: the same prompts and configuration, alternating, the difference made within each round.
  It is noisy: steps differ by more than this from minute to minute. Look at its range, and run more rounds.

A user waits for the sum. What is left out: queueing and prefill, which are the engine's (and in `benchmarks.serving`).
The client stamps bare sockets (`wire.py`) and parses later; its reading is inside both figures, and so they are
upper bounds. The server is `slipstream serve` itself, with a worker that also logs the end of each step
(`engine_steps.py`), at a cost of about 0.05 ms a step on either side.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import msgspec

from benchmarks import report, wire
from benchmarks.client import Server
from benchmarks.engine_steps import TIMED_WORKER, Order, Step, full_steps, prompt_key, read_steps
from benchmarks.launch import Launched, free_port, running
from benchmarks.processes import OtherLoad
from benchmarks.prompts import Prompts, licence_text
from benchmarks.stream import BenchmarkError, Timing

STREAMS = 32
NEW_TOKENS = 128
WARM_UP_TOKENS = 16
READY_SECONDS = 600.0
_SERVE = f"""
import functools, sys, engine.async_engine as module
module.AsyncEngine = functools.partial(module.AsyncEngine, worker={TIMED_WORKER!r})
from server.cli import main
sys.exit(main())
"""


@dataclass(frozen=True, slots=True)
class Round:
    """Milliseconds. `delivery` is sorted; steps are medians from one step to the next."""

    delivery: list[float]
    served_step: float
    lone_step: float
    other_load: float  # busy cores beside, while the server was measured


def deliveries(timings: Mapping[str, Timing], steps: Sequence[Step]) -> list[float]:
    """Seconds from the end of the step that made a chunk's last token to the chunk's arrival, for all chunks.

    `timings` by prompt key. Raises BenchmarkError for a server that does not count tokens in every chunk.
    """
    ends: dict[str, list[float]] = {key: [] for key in timings}
    for step in steps:
        for key, count in step.tokens:
            if key in ends:
                ends[key].extend([step.at] * count)
    found = []
    for key, timing in timings.items():
        for chunk in timing.chunks:
            if chunk.total is None:
                raise BenchmarkError("the server does not tell the count of tokens with every chunk")
            if chunk.total == 0:  # it opens the stream
                continue
            if chunk.total > len(ends[key]):
                raise BenchmarkError(f"a chunk speaks of token {chunk.total}, the engine made {len(ends[key])}")
            found.append(chunk.at - ends[key][chunk.total - 1])
    return found


class LoneCore:
    """An EngineCore in a process without a front (`engine_steps.main`). Use it as a context manager."""

    def __init__(self, config: Path, cache_dir: Path, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "benchmarks.engine_steps", str(config), str(cache_dir)]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._expect("ready")

    def run(self, order: Order) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order).decode() + "\n")
        self._process.stdin.flush()
        self._expect("done")

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        if word not in map(str.strip, self._process.stdout):  # reads up to the word, or to the end
            raise BenchmarkError(f"the lone engine failed:\n{self.log.read_text(errors='replace')[-3000:]}")

    def __enter__(self) -> LoneCore:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closing its stdin ends it


async def ask_server(server: Server, order: Order) -> dict[str, Timing]:
    """All prompts at once, each on a connection of its own; by prompt key."""
    asked = [wire.complete(server.url, server.model, prompt, order.max_tokens) for prompt in order.prompts]
    timings = await asyncio.gather(*asked)
    return {prompt_key(prompt): timing for prompt, timing in zip(order.prompts, timings, strict=True)}


async def encoded(server: Server, prompts: Prompts, count: int, max_tokens: int) -> Order:
    """`count` new prompts as token ids."""
    texts = await prompts.mixed(count)
    return Order([await server.tokenize(text) or [] for text in texts], max_tokens)


async def measure(arguments: argparse.Namespace, folder: Path) -> list[Round]:
    """Start both engines, then alternate between them, each first in turn; a short round warms both up."""
    port, log, lone_log = free_port(), folder / "server.log", folder / "lone.log"
    command = [sys.executable, "-c", _SERVE, "serve", "--config", str(arguments.config), "--port", str(port)]
    with running(command, port, log, "/ready", READY_SECONDS) as launched:
        async with Server("slipstream", launched.url) as server:
            text = licence_text()
            prompts = Prompts(text, lambda part: _count(server, part), int(time.time()) % 1_000_000)
            with LoneCore(arguments.config, arguments.cache_dir, lone_log) as lone:
                warm_up = await encoded(server, prompts, arguments.streams, WARM_UP_TOKENS)
                await ask_server(server, warm_up)
                lone.run(warm_up)
                rounds = []
                for number in range(arguments.rounds):
                    order = await encoded(server, prompts, arguments.streams, arguments.tokens)
                    rounds.append(await one_round(server, launched, lone, order, number % 2 == 0))
    return rounds


async def one_round(server: Server, launched: Launched, lone: LoneCore, order: Order, server_first: bool) -> Round:
    """The same prompts through the server and through the engine alone."""
    began = time.monotonic()
    if not server_first:
        lone.run(order)
    with OtherLoad({launched.pid}) as load:
        timings = await ask_server(server, order)
    if server_first:
        lone.run(order)
    steps = read_steps(launched.log, began)
    served, alone = _step_ms(steps, len(order.prompts)), _step_ms(read_steps(lone.log, began), len(order.prompts))
    delivery = sorted(1000 * seconds for seconds in deliveries(timings, steps))
    return Round(delivery, served, alone, load.cores)


async def _count(server: Server, text: str) -> int:
    return len(await server.tokenize(text) or ())


def _step_ms(steps: Sequence[Step], streams: int) -> float:
    gaps = full_steps(steps, streams)
    if not gaps:
        raise BenchmarkError(f"no two steps in a row held all {streams} streams; use more tokens, or a larger KV pool")
    return 1000 * median(gaps)


def overhead_table(rounds: Sequence[Round]) -> str:
    """One row per figure, its median and range over the rounds, in milliseconds."""
    figures = {
        "delivery, mean of all chunks": [mean(r.delivery) for r in rounds],
        "delivery, median": [median(r.delivery) for r in rounds],
        "delivery, p95": [report.percentile(r.delivery, 95) for r in rounds],
        "delivery, p99": [report.percentile(r.delivery, 99) for r in rounds],
        "step to step, served": [r.served_step for r in rounds],
        "step to step, engine alone": [r.lone_step for r in rounds],
        "slower steps (paired difference)": [r.served_step - r.lone_step for r in rounds],
        "sum: mean delivery + slower steps": [mean(r.delivery) + r.served_step - r.lone_step for r in rounds],
        "beside it, cores": [r.other_load for r in rounds],
    }
    return report.figure_table("milliseconds", figures)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=report.ROOT / "configs" / "demo.yaml")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/slipstream"), help="the server's own setting")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="slipstream-overhead-") as folder:
            rounds = asyncio.run(measure(arguments, Path(folder)))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    commit, machine = report.git_commit(), report.machine()
    if arguments.json:
        about = {"commit": commit, "machine": machine, "streams": arguments.streams, "tokens": arguments.tokens}
        record = {**about, "rounds": [asdict(r) for r in rounds]}
        arguments.json.write_bytes(msgspec.json.encode(record) + b"\n")
    print(overhead_table(rounds))
    print(f"\n{arguments.streams} streams, {arguments.tokens} tokens each, {len(rounds)} rounds; {machine}; {commit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
