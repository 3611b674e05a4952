"""What the record says, figure by figure: medians, paired ratios, the best peer, and the limit of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from benchmarks.performance_contenders import ALL, BY_NAME, EIGHT, MANY, PREFIX, QUESTIONS, SINGLE, Contender, Kind
from benchmarks.performance_record import Part
from benchmarks.scenarios import NEW_TOKENS, SINGLE_PROMPT

MEAN_PROMPT = 123.25  # tokens of a crowd's prompts: 45, 64, 128 and 256 in turn
CROWDS = {EIGHT: (8, 16), MANY: (32, 32)}  # clients, requests


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that is compared: a value of a scenario."""

    scenario: str
    key: str
    title: str
    higher: bool  # is better


FIGURES = (
    Figure(SINGLE, "decode", f"one stream ({SINGLE_PROMPT} tokens of a licence), tok/s", True),
    Figure(QUESTIONS, "decode", "one stream (answers to questions), tok/s", True),
    Figure(EIGHT, "output", "8 clients, tok/s", True),
    Figure(MANY, "output", "32 clients, tok/s", True),
    Figure(PREFIX, "first_ms", "first token of 512 new ones, ms", False),
    Figure(PREFIX, "second_ms", "first token, 511 known, ms", False),
)
BY_SCENARIO = {figure.scenario: figure for figure in reversed(FIGURES)}
assert set(BY_SCENARIO) == set(ALL)


class _Measured(msgspec.Struct):
    scenario: str
    server: str
    round: int
    values: dict[str, float]
    other_load: float


class Side(msgspec.Struct):
    version: str
    command: list[str]
    ready_seconds: float
    memory: int


class Servers(msgspec.Struct):
    """The part `servers` of the record."""

    rounds: int
    new_tokens: int
    questions: str
    left_out: dict[str, str]
    sides: dict[str, Side]
    tokens_per_round: dict[str, dict[str, list[float]]]
    measurements: list[_Measured]

    def values(self, server: str, figure: Figure) -> dict[int, float]:
        """By round."""
        return {
            one.round: one.values[figure.key]
            for one in self.measurements
            if (one.server, one.scenario) == (server, figure.scenario)
        }

    def load(self, server: str, scenario: str | None = None) -> float:
        """The most cores that others kept busy beside a measurement of this server."""
        fitting = (one for one in self.measurements if one.server == server and scenario in (None, one.scenario))
        return max((one.other_load for one in fitting), default=0.0)

    def present(self) -> list[Contender]:
        """Those that were measured, in the order of the catalogue."""
        seen = {one.server for one in self.measurements}
        return [contender for name, contender in BY_NAME.items() if name in seen]

    def drafting(self, server: str, scenario: str) -> float | None:
        """Median of the tokens per speculation round; None where nothing was drafted."""
        found = self.tokens_per_round.get(scenario, {}).get(server, [])
        return statistics.median(found) if found else None


class Peak(msgspec.Struct):
    """Per second, of all threads together: bytes read, operations with floats and with bytes."""

    read: float
    floats: float
    bytes: float


class Limits(msgspec.Struct):
    """What `performance_limits` found for one format."""

    quant: str
    calls: int
    weight_bytes: int
    gemm_ms: dict[str, float]
    rates: dict[str, float]  # operations per second of the kernel, by threads


class Work(msgspec.Struct):
    gemm_flops: float
    gemm_bytes: float
    attention_flops: float
    attention_bytes: float


class Case(msgspec.Struct):
    kind: str
    batch: int
    query: int
    kv: int


class Step(msgspec.Struct):
    """A case of `slipstream bench step`; times in milliseconds."""

    name: str
    case: Case
    ms: float
    parts_ms: dict[str, float]
    floors_ms: dict[str, float]
    work: Work

    def share(self, *parts: str) -> float:
        """Of the time by part."""
        return sum(self.parts_ms.get(part, 0.0) for part in parts) / sum(self.parts_ms.values())


class StepRun(msgspec.Struct):
    title: str
    quant: str
    threads: int
    cases: list[Step]

    def case(self, kind: str, batch: int) -> Step | None:
        fitting = (one for one in self.cases if (one.case.kind, one.case.batch) == (kind, batch))
        return next(fitting, None)


class Steps(msgspec.Struct):
    """The part `steps` of the record; runs and limits by format."""

    runs: dict[str, StepRun]
    limits: dict[str, Limits]
    peaks: dict[str, Peak]  # by threads


@dataclass(frozen=True, slots=True)
class Best:
    """A peer, its median, and in each round how many times better ours was."""

    name: str
    median: float
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def servers_of(parts: Mapping[str, Part]) -> Servers | None:
    return msgspec.convert(parts["servers"].found, Servers) if "servers" in parts else None


def served_step_ms(found: Servers, server: str, scenario: str) -> float | None:
    """The time from token to token as a client sees it; None for a scenario without."""
    seen = [one.values for one in found.measurements if (one.server, one.scenario) == (server, scenario)]
    gaps = [1e3 / values["decode"] if "decode" in values else values.get("gap_ms", 0.0) for values in seen]
    return statistics.median(gaps) if gaps and all(gaps) else None


def steps_of(parts: Mapping[str, Part]) -> Steps | None:
    """What the programs `step-<format>` and `limits-<format>` wrote."""
    if "steps" not in parts:
        return None
    found = msgspec.convert(parts["steps"].found["json"], dict[str, object])
    runs = {name[5:]: msgspec.convert(one, StepRun) for name, one in found.items() if name.startswith("step-")}
    limits = {name[7:]: msgspec.convert(one, Limits) for name, one in found.items() if name.startswith("limits-")}
    return Steps(runs, limits, msgspec.convert(found.get("peaks", {}), dict[str, Peak]))


def against(found: Servers, server: str, other: str, figure: Figure) -> Best | None:
    """Ours beside another, round by round; None where one of them has no figure."""
    mine, theirs = found.values(server, figure), found.values(other, figure)
    shared = sorted(mine.keys() & theirs.keys())
    if not shared:
        return None
    ratios = tuple(mine[n] / theirs[n] if figure.higher else theirs[n] / mine[n] for n in shared)
    return Best(other, statistics.median(theirs.values()), ratios)


def best_peer(found: Servers, server: str, figure: Figure, kinds: Iterable[Kind]) -> Best | None:
    """The peer of these kinds with the best median."""
    names = [one.name for one in found.present() if one.kind in tuple(kinds)]
    beside = [best for name in names if (best := against(found, server, name, figure)) is not None]
    pick = max if figure.higher else min
    return pick(beside, key=lambda best: best.median) if beside else None


def limit(limits: Limits, figure: Figure, new_tokens: int = NEW_TOKENS) -> float:
    """What a figure would be if nothing but the matrix products took time, in its own unit, without drafts.

    A crowd's prompts are read at the rate of a pass of 512 tokens, and its answers at that of full batches.
    """
    gemm = limits.gemm_ms
    if figure.scenario in (SINGLE, QUESTIONS):
        return 1e3 / gemm["1"]
    if figure.scenario == PREFIX:
        return gemm["512"] if figure.key == "first_ms" else gemm["1"]
    clients, requests = CROWDS[figure.scenario]
    prompts = requests * MEAN_PROMPT / 512 * gemm["512"]
    answers = requests / clients * new_tokens * gemm[str(clients)]
    return requests * new_tokens / (prompts + answers) * 1e3


def share_of_limit(value: float, limit: float, figure: Figure) -> float:
    """1 is at the limit, below is slower."""
    return value / limit if figure.higher else limit / value


def medians(found: Servers, server: str, figures: Sequence[Figure] = FIGURES) -> dict[Figure, float]:
    """Of what was measured."""
    values = {figure: list(found.values(server, figure).values()) for figure in figures}
    return {figure: statistics.median(column) for figure, column in values.items() if column}
