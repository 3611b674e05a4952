"""Unmask rules over their knobs: accuracy against tokens per forward, at one cache, on all cases of a task.

Nothing is timed. Rules are compared at equal accuracy: the best that a rule does with any value of its knob, among
those no more than a point less accurate than the reference, threshold 0.9. The same on either half of the cases: those
that the model is surest of when it commits one token per step, and the others. No compared rule has a say in that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.diffusion_confidence import Histogram
from benchmarks.diffusion_engine import Asked, Served, answers, check
from benchmarks.diffusion_figures import Best, Paired, Sample, halves, part
from benchmarks.diffusion_variants import PLAIN, Variant, matching
from benchmarks.verifiers_figures import Estimate

REFERENCE = "threshold 0.9"


@dataclass(frozen=True, slots=True)
class Row:
    """One variant on some cases. `less` in accuracy than the reference, and `times` its tokens per forward."""

    variant: str
    rule: str
    value: float | None
    cache: str
    accuracy: Estimate
    tokens_per_forward: Estimate
    forwards: Estimate
    tokens: Estimate
    less: Estimate
    times: Estimate


@dataclass(frozen=True, slots=True)
class Match:
    """Frechet's rule at a margin over the factor rule at 1 - margin: tokens per forward and forwards.

    Of the cases, `fewer` took Frechet's rule fewer forwards, `more` took it more.
    """

    frechet: str
    factor: str
    times: Estimate
    forwards: Estimate
    less: Estimate
    fewer: int
    same: int
    more: int


@dataclass(frozen=True, slots=True)
class Part:
    """All cases or half of them: every variant, and the best of each rule at equal accuracy.

    `confidence`: mean at commit of these cases with one token per step, the least and the most; None without that run.
    """

    name: str
    cases: int
    confidence: tuple[float, float] | None
    rows: tuple[Row, ...]
    best: dict[str, Best | None]
    matches: tuple[Match, ...]


@dataclass(frozen=True, slots=True)
class Swept:
    reference: str
    parts: tuple[Part, ...]
    histograms: tuple[Histogram, ...]


def sweep(served: Served, asked: Asked, variants: Sequence[Variant], clients: int) -> Swept:
    """Every variant on every case, among them the reference; halves need one token per step. Raises BenchmarkError."""
    check(served, asked, variants)
    found: dict[str, list[Sample]] = {}
    histograms = []
    for variant in variants:
        told = answers(served, asked, variant, clients)
        found[variant.name] = told.samples
        if variant.name in (PLAIN, REFERENCE) and told.histogram is not None:
            histograms.append(told.histogram)
    named: dict[str, Sequence[int]] = {"all": range(len(found[REFERENCE]))}
    if PLAIN in found:
        named["saturated half"], named["unsaturated half"] = halves(found[PLAIN])
    parts = [compared(name, variants, part(found, places)) for name, places in named.items() if len(places)]
    return Swept(REFERENCE, tuple(parts), tuple(histograms))


def compared(name: str, variants: Sequence[Variant], found: Mapping[str, Sequence[Sample]]) -> Part:
    """All comparisons on some cases."""
    paired = Paired(found)
    rules: dict[str, list[str]] = {}
    for one in variants:
        rules.setdefault(one.rule, []).append(one.name)
    sure = [one.confidence for one in found.get(PLAIN, ())]
    return Part(
        name=name,
        cases=paired.cases,
        confidence=(min(sure), max(sure)) if sure else None,
        rows=tuple(row(one, paired) for one in variants),
        best={rule: paired.best(names, REFERENCE) for rule, names in rules.items()},
        matches=tuple(match(paired, *pair) for pair in matching(variants)),
    )


def row(one: Variant, paired: Paired, reference: str = REFERENCE, key: str = "") -> Row:
    """What is told of a variant; `key`: what it and the others are called there, where that is not their name."""
    key = key or one.name
    measures = {name: paired.of(key, name) for name in ("accuracy", "tokens_per_forward", "forwards", "tokens")}
    less, times = paired.less(key, reference), paired.times(key, reference)
    return Row(one.name, one.rule, one.value, one.params.cache, **measures, less=less, times=times)


def match(paired: Paired, ours: Variant, theirs: Variant) -> Match:
    """Two rules at matching knobs."""
    names = ours.name, theirs.name
    return Match(
        *names, paired.times(*names), paired.times(*names, "forwards"), paired.less(*names), *paired.sides(*names)
    )
