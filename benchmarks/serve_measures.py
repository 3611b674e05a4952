"""From the outcomes of a point to its figures: rates over its wall time, latencies as percentiles, errors by kind."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import percentile
from benchmarks.serve_load import INTERRUPTED, OK, Outcome
from benchmarks.stream import Timing

# Each objective of --goodput: the milliseconds of a request. TPOT is 0 for answers of one token.
OBJECTIVES: Mapping[str, Callable[[Timing], float]] = {
    "ttft": lambda timing: 1000 * timing.first_token,
    "tpot": lambda timing: 1000 * (timing.per_token or 0.0),
    "e2e": lambda timing: 1000 * (timing.ended - timing.sent),
}


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds. Percentiles are values that were seen (nearest rank)."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one point. `seconds` is from the first request sent to the last one ended.

    TTFT: request sent to the first text. ITL: between neighbouring chunks with text, of all requests together.
    TPOT: of each request, first to last text over its tokens less one. E2E: sent to the end of the stream.
    Tokens and latencies are those of whole answers; the others are in `failed`, by kind, or `interrupted`.
    """

    succeeded: int
    failed: dict[str, int]
    interrupted: int
    seconds: float
    request_rate: float
    output_rate: float
    total_rate: float
    input_tokens: int
    output_tokens: int
    chunks: int
    peak_in_flight: int
    goodput: float | None
    without_usage: int
    ttft: Spread | None
    itl: Spread | None
    tpot: Spread | None
    e2e: Spread | None
    lateness: Spread | None


def summarize(outcomes: Sequence[Outcome], objectives: Mapping[str, float]) -> Summary:
    """`objectives` are those of --goodput; without any there is no goodput."""
    timings = [outcome.timing for outcome in outcomes if outcome.timing is not None]
    seconds = max(o.ended for o in outcomes) - min(o.sent for o in outcomes) if outcomes else 0.0
    output = sum(timing.completion_tokens for timing in timings)
    prompts = sum(timing.prompt_tokens for timing in timings)
    good = sum(all(OBJECTIVES[name](t) <= limit for name, limit in objectives.items()) for t in timings)

    def per_second(count: float) -> float:
        return count / seconds if seconds else 0.0

    return Summary(
        succeeded=len(timings),
        failed=dict(Counter(o.kind for o in outcomes if o.kind not in (OK, INTERRUPTED))),
        interrupted=sum(o.kind == INTERRUPTED for o in outcomes),
        seconds=seconds,
        request_rate=per_second(len(timings)),
        output_rate=per_second(output),
        total_rate=per_second(output + prompts),
        input_tokens=prompts,
        output_tokens=output,
        chunks=sum(outcome.chunks for outcome in outcomes),
        peak_in_flight=peak_in_flight(outcomes),
        goodput=per_second(good) if objectives else None,
        without_usage=sum(outcome.counted for outcome in outcomes),
        ttft=spread(timing.first_token for timing in timings),
        itl=spread(gap for timing in timings for gap in timing.gaps),
        tpot=spread(t.per_token for t in timings if t.per_token is not None),
        e2e=spread(timing.ended - timing.sent for timing in timings),
        lateness=spread(o.sent - o.planned for o in outcomes if o.planned is not None),
    )


def spread(seconds: Iterable[float]) -> Spread | None:
    """In milliseconds; None of nothing."""
    values = sorted(1000 * value for value in seconds)
    if not values:
        return None
    ranks = [percentile(values, percent) for percent in (50, 90, 95, 99, 100)]
    return Spread(len(values), statistics.fmean(values), *ranks)


def peak_in_flight(outcomes: Sequence[Outcome]) -> int:
    """The most requests that were in flight at one moment; one that ends when another is sent makes room for it."""
    return max((count for _, count in in_flight(outcomes)), default=0)


def in_flight(outcomes: Sequence[Outcome]) -> list[tuple[float, int]]:
    """(time, requests in flight from then on), in order of time."""
    changes = sorted([(o.ended, -1) for o in outcomes] + [(o.sent, 1) for o in outcomes])
    found, count = [], 0
    for at, change in changes:
        count += change
        found.append((at, count))
    return found
