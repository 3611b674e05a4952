"""Unmask rules by cache and requests at once: tokens per second, in turns, beside the plain sampler.

The plain sampler has no cache and commits one token per step; it is timed at the smallest batch alone. Within a round
all variants answer the same cases, another first each time; ratios are made within rounds. Accuracy by cache is a part
of its own: it takes many more cases than can be timed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.diffusion_engine import Asked, Served, answers, check, timed
from benchmarks.diffusion_figures import Paired
from benchmarks.diffusion_options import Options
from benchmarks.diffusion_rules import Row, row
from benchmarks.diffusion_variants import Variant
from benchmarks.drafts_engine import Run
from benchmarks.drafts_figures import Ratio, paired
from benchmarks.drafts_options import say
from benchmarks.report import show

WARM_UP = 2  # requests of each variant


@dataclass(frozen=True, slots=True)
class Speed:
    """One variant at one load. `speeds`: tokens of all answers over wall time, prompts included, of every round.

    `seconds` per answer; `times` as fast as the first rule with the same cache and load; `times_plain`: as the plain
    sampler at the same load, where that was timed.
    """

    variant: str
    cache: str
    batch: int
    speeds: tuple[float, ...]
    seconds: tuple[float, ...]
    tokens_per_forward: float
    times: Ratio
    times_plain: Ratio | None


@dataclass(frozen=True, slots=True)
class Timed:
    """`requests`: timed in each round, by batch; each up to `tokens` long."""

    tokens: int
    requests: dict[int, int]
    speeds: tuple[Speed, ...]


@dataclass(frozen=True, slots=True)
class Cached:
    """Accuracy of every variant by cache, beside the reference: the first rule with the first cache."""

    reference: str
    cases: int
    rows: tuple[Row, ...]


Runs = Mapping[Variant, Sequence[Run]]  # one of each round


def measure(served: Served, asked: Asked, variants: Sequence[Variant], options: Options) -> Timed:
    """Speeds. `variants` are the plain sampler, then its rivals, cache by cache. Raises BenchmarkError."""
    plain = variants[0]
    for one in variants:
        timed(served, asked, asked.requests(served.info, one.params, "warm-up", range(WARM_UP)), 1)
    speeds, sizes = [], {}
    for batch in options.batches:
        chosen = variants if batch == min(options.batches) else variants[1:]
        sizes[batch] = max(options.timed, batch)
        speeds += told(rounds(served, asked, chosen, batch, sizes[batch], options.rounds), plain, batch)
    return Timed(asked.tokens, sizes, tuple(speeds))


def accuracies(served: Served, asked: Asked, variants: Sequence[Variant], clients: int) -> Cached:
    """Nothing is timed. The first variant is the plain sampler. Raises BenchmarkError."""
    check(served, asked, variants)
    found = {one: answers(served, asked, one, clients).samples for one in variants}
    compared, reference = Paired({one.title: samples for one, samples in found.items()}), variants[1].title
    return Cached(reference, compared.cases, tuple(row(one, compared, reference, one.title) for one in found))


def rounds(served: Served, asked: Asked, variants: Sequence[Variant], batch: int, size: int, count: int) -> Runs:
    """Every variant's runs, in turns."""
    runs: dict[Variant, list[Run]] = {one: [] for one in variants}
    turns, cases = deque(variants), len(asked.group.questions)
    for number in range(count):
        places = [(number * size + i) % cases for i in range(size)]
        for one in turns:
            wanted = asked.requests(served.info, one.params, one.name, places)
            runs[one].append(timed(served, asked, wanted, batch))
            speed = show(runs[one][-1].speed)
            say(f"round {number + 1} of {count}  {batch:>2} at once  {one.title:<28} {speed} tok/s")
        turns.rotate(-1)
    return runs


def told(runs: Runs, plain: Variant, batch: int) -> list[Speed]:
    """Ratios within rounds."""
    first: dict[str, Variant] = {}  # by cache
    for one in runs:
        if one != plain:
            first.setdefault(one.params.cache, one)
    speeds = {one: tuple(run.speed for run in own) for one, own in runs.items()}
    found = []
    for one, own in runs.items():
        reference = first.get(one.params.cache, one) if one != plain else plain
        over_plain = paired(speeds[one], speeds[plain]) if plain in runs else None
        seconds = tuple(run.seconds / len(run.answers) for run in own)
        times = paired(speeds[one], speeds[reference])
        found.append(Speed(one.name, one.params.cache, batch, speeds[one], seconds, _length(own), times, over_plain))
    return found


def _length(runs: Sequence[Run]) -> float:
    """Tokens per forward."""
    answers = [answer for run in runs for answer in run.answers]
    forwards = sum(one.passes.forwards + one.passes.draft_forwards for one in answers)
    return sum(len(one.tokens) for one in answers) / max(forwards, 1)
