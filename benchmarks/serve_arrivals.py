"""When requests arrive in the rate mode of `bench serve`: a pure function of rate, burstiness and seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate, islice, repeat, takewhile


def arrivals(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Seconds from the start to each arrival, without end.

    Gaps are Gamma(shape = burstiness, mean = 1 / rate): 1 is a Poisson process, less comes in bursts, more is more
    even (the parameter of vLLM's benchmark). A rate of infinity lets all of them arrive at once.
    """
    if rate == float("inf"):
        return repeat(0.0)
    draws = random.Random(seed)
    return accumulate(draws.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in repeat(None))


def timetable(rate: float, burstiness: float, seed: int, requests: int | None, seconds: float | None) -> list[float]:
    """The arrivals of a run that ends after `requests` of them or after `seconds`, whichever is first."""
    if requests is None and (seconds is None or rate == float("inf")):
        raise ValueError("a timetable needs an end")
    times = arrivals(rate, burstiness, seed)
    return list(takewhile(lambda at: seconds is None or at < seconds, islice(times, requests)))
