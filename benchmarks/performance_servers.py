"""All contenders side by side, in interleaved rounds: every server stays in memory, and only the measured one runs.

A contender that can't be started, or fails, is left out from then on, and the record says why.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks import serve_datasets
from benchmarks.client import Server
from benchmarks.peers import compare
from benchmarks.peers.catalog import PEERS
from benchmarks.peers.install import Place, installed_version, say
from benchmarks.peers.residents import Resident, resident
from benchmarks.performance_contenders import QUESTIONS, Contender
from benchmarks.processes import OtherLoad, listeners
from benchmarks.prompts import Prompts, licence_text
from benchmarks.report import git_commit
from benchmarks.scenarios import SCENARIOS, SINGLE_REQUESTS, Metric, Scenario, single
from benchmarks.serve_acceptance import acceptance, read_counters
from benchmarks.serving import Measurement
from benchmarks.speculation_prompts import ORDINARY
from benchmarks.stream import BenchmarkError

SPARE_BYTES = 3 << 30  # of memory that must be free before another server starts
QUESTION_SETS = ("gsm8k", "mtbench", "humaneval")
WARM_UP_TOKENS, WARM_UP_REQUESTS = 8, 8


@dataclass(frozen=True, slots=True)
class Plan:
    """`minutes` are for the rounds: from the second on, no scenario begins that would last longer."""

    contenders: tuple[Contender, ...]
    scenarios: tuple[str, ...]
    rounds: int
    minutes: float
    new_tokens: int
    seed: int
    timeout: float = 600.0


class Counter(Protocol):
    """What is needed of the model's tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def render_chat(self, messages: Sequence[Mapping[str, object]]) -> str: ...


@dataclass
class Seat:
    """A contender that is up."""

    contender: Contender
    resident: Resident
    server: Server
    version: str
    command: tuple[str, ...]


@dataclass
class Found:
    """What came of it so far. `tokens_per_round`: by scenario and contender, of each round."""

    measurements: list[Measurement] = field(default_factory=list)
    tokens_per_round: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    sides: dict[str, compare.Side] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    tried_again: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    questions: str = ""

    def record(self, plan: Plan) -> dict[str, object]:
        return {
            "rounds": self.rounds,
            "new_tokens": plan.new_tokens,
            "seed": plan.seed,
            "questions": self.questions,
            "left_out": self.left_out,
            "tried_again": self.tried_again,
            "sides": {name: asdict(side) for name, side in self.sides.items()},
            "tokens_per_round": self.tokens_per_round,
            "measurements": [asdict(one) for one in self.measurements],
        }


async def run(plan: Plan, place: Place, tokenizer: Counter, save: Callable[[Found], None]) -> Found:
    """Start everybody, measure in turn, end everybody. `save` is called after each round."""
    found = Found()
    questions, found.questions = _questions()
    asked = [tokenizer.render_chat([{"role": "user", "content": text}]) for text in questions]
    scenarios = [scenario_named(name, asked) for name in plan.scenarios]

    async def count(text: str) -> int:
        return len(tokenizer.encode(text))

    prompts = Prompts(licence_text(), count, plan.seed)
    async with AsyncExitStack() as stack:
        seats = [seat for one in plan.contenders if (seat := await _seated(one, plan, place, stack, found))]
        await _round(0, seats, scenarios, prompts, plan, found)
        until, lasted = time.monotonic() + 60 * plan.minutes, dict[str, float]()
        for number in range(1, plan.rounds + 1):
            for scenario in scenarios:
                began = time.monotonic()
                if number > 1 and began + lasted[scenario.name] > until:
                    say(f"no time is left for {scenario.name} in round {number}")
                    continue
                await _round(number, seats, [scenario], prompts, plan, found)
                lasted[scenario.name] = max(lasted.get(scenario.name, 0.0), time.monotonic() - began)
                found.rounds = number
            for seat in seats:
                found.sides[seat.contender.name] = _side(seat)
            save(found)
    return found


def scenario_named(name: str, asked: Sequence[str]) -> Scenario:
    """A scenario by its name; `questions` is one client that asks what the chat template makes of questions."""
    if name != QUESTIONS:
        return next(scenario for scenario in SCENARIOS if scenario.name == name)
    turn = iter(range(10**9))

    async def prompts(_: Prompts) -> list[str]:
        first = SINGLE_REQUESTS * next(turn)
        return [asked[(first + i) % len(asked)] for i in range(SINGLE_REQUESTS)]

    return Scenario(QUESTIONS, (Metric("decode", "one stream of answers, decode tok/s", True),), prompts, single)


def _questions() -> tuple[list[str] | tuple[str, ...], str]:
    """Questions that a draft was not trained on, of data sets in turn; our own where none is installed."""
    found: dict[str, list[str]] = {}
    for name in QUESTION_SETS:
        with contextlib.suppress(BenchmarkError):
            found[name] = [one.content for one in serve_datasets.read(name)[:8] if isinstance(one.content, str)]
    if not found:
        return ORDINARY, "benchmarks/speculation_prompts.py"
    return [text for row in zip(*found.values(), strict=False) for text in row], ", ".join(found)


async def _seated(contender: Contender, plan: Plan, place: Place, stack: AsyncExitStack, found: Found) -> Seat | None:
    """Started and suspended; None where that fails."""
    free = available_memory()
    try:
        if free < SPARE_BYTES:
            raise BenchmarkError(f"only {free / 1e9:.1f} GB of memory are left")
        return await _start(contender, plan, place, stack)
    except BenchmarkError as error:
        found.left_out[contender.name] = in_short(error)
        say(f"{contender.name} is left out: {error}")
        return None


async def _start(contender: Contender, plan: Plan, place: Place, stack: AsyncExitStack) -> Seat:
    model, ignore_eos, ready, version = "", True, "/ready", git_commit()
    command: Sequence[str] = contender.command()
    if contender.kind != "ours":
        peer, version = PEERS[contender.name], installed_version(PEERS[contender.name].environment, place)
        values = compare.blanks(peer, place, _peer_plan(plan))
        command = compare.filled(peer, values)
        model, ignore_eos, ready = peer.model.format(**values), peer.ignore_eos, peer.ready_path
    started = stack.enter_context(resident(command, place.folder / f"{contender.name}.log", ready, plan.timeout))
    say(f"{contender.name}: ready after {started.launched.ready_seconds:.1f} s")
    await started.resume()
    try:
        server = Server(contender.name, started.launched.url, model=model, ignore_eos=ignore_eos)
        await stack.enter_async_context(server)
    finally:
        started.suspend()
    return Seat(contender, started, server, version, compare.shown(command, place))


def _peer_plan(plan: Plan) -> compare.Plan:
    return compare.Plan(Path("demo.yaml"), "demo", (), plan.rounds, plan.new_tokens, 2, plan.timeout, plan.seed)


async def _round(
    number: int, seats: list[Seat], scenarios: Sequence[Scenario], prompts: Prompts, plan: Plan, found: Found
) -> None:
    """Round 0 warms up with few tokens and does not count."""
    order = random.Random(plan.seed + number)
    for scenario in scenarios:
        texts = await scenario.prompts(prompts)
        texts = texts if number else texts[:WARM_UP_REQUESTS]
        turns = [seat for seat in seats if scenario.name in seat.contender.scenarios]
        for seat in order.sample(turns, len(turns)):
            if not await _measured(number, seat, scenario, texts, plan, found):
                seats.remove(seat)


async def _measured(
    number: int, seat: Seat, scenario: Scenario, texts: Sequence[str], plan: Plan, found: Found
) -> bool:
    """Whether it could be. A second try is for a server that closed a connection between two requests."""
    name = seat.contender.name
    for last in (False, True):
        try:
            await _measure(number, seat, scenario, texts, plan, found)
            return True
        except BenchmarkError as error:
            say(f"{name}{' is left out from here' if last else ', tried again'}: {error}")
            where = found.left_out if last else found.tried_again
            where[name] = in_short(error)
    return False


async def _measure(number: int, seat: Seat, scenario: Scenario, texts: Sequence[str], plan: Plan, found: Found) -> None:
    name, tokens = seat.contender.name, plan.new_tokens if number else min(plan.new_tokens, WARM_UP_TOKENS)
    async with seat.resident.turn(seat.server), _tokens_per_round(seat) as per_round:
        with OtherLoad(listeners(seat.server.url)) as load:
            values = await scenario.run(seat.server, texts, tokens)
    if not number:
        return
    found.measurements.append(Measurement(scenario.name, name, number, values, load.cores))
    if per_round:
        found.tokens_per_round.setdefault(scenario.name, {}).setdefault(name, []).extend(per_round)
    shown = "  ".join(f"{metric.title} {values[metric.key]:.1f}" for metric in scenario.metrics)
    say(f"round {number}/{plan.rounds}  {scenario.name:<11} {name:<15} {shown}  (beside it: {load.cores:.2f})")


@contextlib.asynccontextmanager
async def _tokens_per_round(seat: Seat) -> AsyncIterator[list[float]]:
    """Filled at the end of the block, from the server's own counters; stays empty where nothing was drafted."""
    made: list[float] = []
    if not seat.contender.drafts:
        yield made
        return
    before = read_counters(await seat.server.text_of("/metrics") or "")
    yield made
    grown = acceptance(before, read_counters(await seat.server.text_of("/metrics") or ""))
    if grown is not None:
        made.append(grown.length)


def _side(seat: Seat) -> compare.Side:
    return compare.Side(
        seat.contender.name, seat.version, seat.command, seat.resident.launched.ready_seconds, seat.resident.peak
    )


def in_short(error: BenchmarkError) -> str:
    """What happened, and the last line of a log that may follow it."""
    first, *log = [line for line in str(error).splitlines() if line.strip()] or ["no reason was given"]
    return f"{first} {log[-1].strip()}" if log else first


def available_memory() -> int:
    """Bytes that programs may still take, as the kernel sees it."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
