"""Drafters beside each other and beside none: speed at several loads, first tokens, memory, and the same output.

All engines are loaded before the first run and take turns: within a round every one answers the same prompts at one
load, each time another first. Nothing is cached between runs. Ratios are made within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import report
from benchmarks.drafts_engine import Answer, Conditions, Run, Served, run
from benchmarks.drafts_figures import Agreement, Ratio, acceptance, agreement, first_difference, paired
from benchmarks.drafts_memory import HEAD, Memory, memory
from benchmarks.drafts_options import Options, say
from benchmarks.drafts_prompts import greedy, mixed
from benchmarks.processes import OtherLoad
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import Request

WARM_UP_TOKENS = 8
LEAST = {1: 5, 4: 8}  # requests of a run at that many clients; else an eighth more than clients, for the tail


@dataclass(frozen=True, slots=True)
class Timed:
    """One run of one engine at one load; `others` in busy cores."""

    variant: str
    clients: int
    round: int
    run: Run
    others: float


@dataclass(frozen=True, slots=True)
class Row:
    """One engine at one load over all rounds: medians, and ratios to the engine without drafts.

    `speed`: tokens of all answers over wall time, prompts included. `decode_speed`: of one stream past its first token.
    `first_token` in seconds.
    """

    variant: str
    clients: int
    tokens_per_round: float
    speed: float
    decode_speed: float
    first_token: float
    speed_ratio: Ratio
    decode_ratio: Ratio
    first_token_ratio: Ratio
    same: Agreement


@dataclass(frozen=True, slots=True)
class Compared:
    rows: tuple[Row, ...]
    memories: tuple[Memory, ...]
    timed: tuple[Timed, ...]


def measure(folder: Path, options: Options) -> Compared:
    """Load everything, warm it up, run the rounds. Raises BenchmarkError."""
    tokenizer = Tokenizer.load(folder)
    named = mixed(options.sources, max(options.prompts, max(map(requests_at, options.concurrency))))
    engines = []
    for one in options.variants:
        engines.append(Served(folder, one, options.load))
        say(f"loaded {one.name}")
    for served in engines:
        run(served.core(Conditions()), greedy(tokenizer, named[:4], WARM_UP_TOKENS))
    timed: list[Timed] = []
    for number in range(options.rounds):
        for clients in options.concurrency:
            first = number * requests_at(clients)  # other prompts in each round, where there are enough
            chosen = [named[(first + i) % len(named)] for i in range(requests_at(clients))]
            requests = greedy(tokenizer, chosen, options.tokens)
            shift = number % len(engines)
            for served in (*engines[shift:], *engines[:shift]):
                with OtherLoad(()) as others:
                    found = run(served.core(Conditions(seqs=max(clients, 2))), requests, clients)
                timed.append(Timed(served.variant.name, clients, number, found, others.cores))
                say(f"round {number + 1}/{options.rounds}  {clients:>2} x {served.variant.name:<14} {_line(found)}")
    margins = _margins(engines[0], timed)
    rows = [row(timed, served.variant.name, clients, margins) for clients in options.concurrency for served in engines]
    return Compared(tuple(rows), tuple(memory(served) for served in engines), tuple(timed))


def requests_at(clients: int) -> int:
    """Requests of one run: with a few more than clients, so that a part of the run has all of them busy."""
    return LEAST.get(clients, clients + clients // 8)


def _line(found: Run) -> str:
    rounds = acceptance(one for answer in found.answers for one in answer.rounds)
    return f"{found.speed:7.1f} tok/s  {rounds.tokens_per_round:.2f} tokens per round"


def _margins(plain: Served, timed: Sequence[Timed]) -> Mapping[str, list[float]]:
    """For every answer that differs anywhere from the reference: the gaps of the reference, which is asked again."""
    asked: dict[str, Request] = {}
    for clients, number in {(one.clients, one.round) for one in timed}:
        runs = {one.variant: one.run for one in timed if (one.clients, one.round) == (clients, number)}
        reference = runs.pop(plain.variant.name)
        for found in runs.values():
            for want, have in zip(reference.answers, found.answers, strict=True):
                if first_difference(want.tokens, have.tokens) is not None:
                    asked[want.request.id] = want.request
    again = [replace(one, sampling=replace(one.sampling, logprobs=2)) for one in asked.values()]
    answered = run(plain.core(Conditions()), again, clients=1).answers if again else ()
    return {answer.request.id: answer.gaps for answer in answered}


def row(timed: Sequence[Timed], variant: str, clients: int, margins: Mapping[str, list[float]]) -> Row:
    """Medians and paired ratios of one engine at one load. The first engine of each round is not special."""
    ours = _runs(timed, variant, clients)
    plain = _runs(timed, "none", clients)
    answers = [answer for found in ours for answer in found.answers]
    reference = [answer for found in plain for answer in found.answers]
    rounds = acceptance(one for answer in answers for one in answer.rounds)
    return Row(
        variant=variant,
        clients=clients,
        tokens_per_round=rounds.tokens_per_round,
        speed=statistics.median(found.speed for found in ours),
        decode_speed=statistics.median(found.decode_speed for found in ours),
        first_token=statistics.median(answer.to_first for answer in answers),
        speed_ratio=paired([found.speed for found in ours], [found.speed for found in plain]),
        decode_ratio=paired([found.decode_speed for found in ours], [found.decode_speed for found in plain]),
        first_token_ratio=paired(_to_first(answers), _to_first(reference)),
        same=_same(reference, answers, margins),
    )


def _runs(timed: Sequence[Timed], variant: str, clients: int) -> list[Run]:
    chosen = (one for one in timed if (one.variant, one.clients) == (variant, clients))
    return [one.run for one in sorted(chosen, key=lambda one: one.round)]


def _to_first(answers: Sequence[Answer]) -> list[float]:
    return [answer.to_first for answer in answers]


def _same(reference: Sequence[Answer], answers: Sequence[Answer], margins: Mapping[str, list[float]]) -> Agreement:
    names = [answer.request.id for answer in reference]
    gaps = [margins.get(name, []) for name in names]
    return agreement([one.tokens for one in reference], [one.tokens for one in answers], names, gaps)


def tables(found: Compared, quant: str) -> list[list[list[str]]]:
    """The one table of the drafters, and what each takes of memory."""
    rows = [["requests at once", "drafts", "tokens per round", "tok/s", "x none", "decode tok/s", "x none"]]
    rows[0] += ["first token, ms", "x none", "same answers"]
    for one in found.rows:
        speed, first = (report.show(one.speed), report.show(one.speed_ratio.median)), 1000 * one.first_token
        decode = report.show(one.decode_speed), str(one.decode_ratio)
        rows.append([str(one.clients), one.variant, f"{one.tokens_per_round:.2f}", *speed, *decode])
        same = f"{one.same.equal}/{one.same.of}"
        if one.same.differences:
            same += f" ({one.same.near_ties(quant)} near-ties)"
        rows[-1] += [report.show(first), f"{one.first_token_ratio.median:.2f}", same]
    return [rows, [HEAD, *(one.cells() for one in found.memories)]]


def record(found: Compared) -> dict[str, object]:
    """Everything but the tokens themselves."""
    runs = [
        {
            "variant": one.variant,
            "clients": one.clients,
            "round": one.round,
            "speed": one.run.speed,
            "decode_speed": one.run.decode_speed,
            "seconds": one.run.seconds,
            "to_first": _to_first(one.run.answers),
            "acceptance": asdict(acceptance(r for answer in one.run.answers for r in answer.rounds)),
            "other_processes_cores": one.others,
        }
        for one in found.timed
    ]
    return {
        "rows": [asdict(one) for one in found.rows],
        "memory": [asdict(one) for one in found.memories],
        "runs": runs,
    }
