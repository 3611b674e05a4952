"""Requests at once against the same ones after another: wall time, the same answers, and how near to the products.

In each round the cases are answered one after the other, then all at once, then the matrix products of the passes at
once are run by themselves (`diffusion_products.py`): their share of the time is how near the engine is to what the
machine can multiply. What else a pass does (attention, norms, choosing tokens, scheduling) has no part in that limit.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.diffusion_engine import Asked, Served, timed
from benchmarks.diffusion_options import Options
from benchmarks.diffusion_variants import Variant
from benchmarks.drafts_figures import Ratio, paired
from benchmarks.drafts_options import say


@dataclass(frozen=True, slots=True)
class Batch:
    """One variant. `parts`: seconds by name of a run at once with a watch in it.

    `one_by_one` and `at_once` are seconds of each round; `products` of the bare products of the layers at once, and
    `attention` of those of attention. `ratio`: one by one over at once. `share`: the layers' products over at once;
    `share_all`: both over at once. `equal` answers at once are those alone.
    `rows`: of a pass at once, the mean; `gflops` of its products.
    """

    variant: str
    cache: str
    requests: int
    tokens: int
    one_by_one: tuple[float, ...]
    at_once: tuple[float, ...]
    products: tuple[float, ...]
    attention: tuple[float, ...]
    ratio: Ratio
    share: Ratio
    share_all: Ratio
    equal: int
    passes: int
    rows: float
    scored: float
    gflops: float
    parts: dict[str, float]


def measure(served: Served, asked: Asked, variants: Sequence[Variant], options: Options) -> list[Batch]:
    """All of the part. Raises BenchmarkError."""
    return [_measure(served, asked, one, options.clients, options.rounds) for one in variants]


def _measure(served: Served, asked: Asked, variant: Variant, count: int, rounds: int) -> Batch:
    from benchmarks.diffusion_products import watching  # torch, which is imported by now

    wanted = asked.requests(served.info, variant.params, variant.name, range(count))
    with watching() as seen:
        together = timed(served, asked, wanted, count)
    alone, at_once, products, attention = list[float](), list[float](), list[float](), list[float]()
    equal = count
    for number in range(rounds):
        single = timed(served, asked, wanted, 1)
        alone.append(single.seconds)
        again = timed(served, asked, wanted, count)
        at_once.append(again.seconds)
        products.append(seen.play())
        attention.append(seen.play_attention())
        same = (
            mine == both == other
            for mine, both, other in zip(single.tokens, again.tokens, together.tokens, strict=True)
        )
        equal = min(equal, sum(same))
        say(
            f"round {number + 1} of {rounds}  {variant.title:<28} {alone[-1]:.2f} s one by one, {at_once[-1]:.2f} s at "
            f"once, products {products[-1]:.2f} and {attention[-1]:.2f} s, {equal} of {count} equal"
        )
    return Batch(
        variant=variant.name,
        cache=variant.params.cache,
        requests=len(wanted),
        tokens=sum(map(len, together.tokens)),
        one_by_one=tuple(alone),
        at_once=tuple(at_once),
        products=tuple(products),
        attention=tuple(attention),
        ratio=paired(alone, at_once),
        share=paired(products, at_once),
        share_all=paired([a + b for a, b in zip(products, attention, strict=True)], at_once),
        equal=equal,
        passes=len(seen.rows),
        rows=statistics.mean(seen.rows),
        scored=statistics.mean(seen.scored),
        gflops=seen.flops / len(seen.rows) / 1e9,
        parts=seen.profile(lambda: timed(served, asked, wanted, count)),
    )
