"""The numbers to reach, and whether the same run reached them. Data, and what each kind of number is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.performance_contenders import EIGHT, MANY, PREFIX, QUESTIONS, SINGLE, ours
from benchmarks.performance_figures import (
    BY_SCENARIO,
    FIGURES,
    Servers,
    Steps,
    against,
    best_peer,
    limit,
    medians,
    share_of_limit,
)

Verdict = Literal["met", "missed", "not measured"]


@dataclass(frozen=True, slots=True)
class Target:
    """`ours` reaches `at_least` of, or times, what `beside` names.

    `beside`: "limit" (of the products alone), "step" (share of products and attention in a step of 32), "server",
    "library", "any" (the best peer of that kind), or a contender's name.
    """

    title: str
    at_least: float
    ours: str
    scenario: str
    beside: str


_DRAFTING = ours("int8", True)
TARGETS = (
    *(
        Target(f"plain decode, one stream, {quant}: share of the limit of its products", 0.8, quant, SINGLE, "limit")
        for quant in ("int8", "int4", "fp16")
    ),
    *(
        Target(f"32 sequences, {quant}: products and attention's share of a step", 0.85, quant, MANY, "step")
        for quant in ("int8", "int4", "fp16")
    ),
    Target("int8, one stream, beside llama.cpp Q8_0", 1.0, "int8", SINGLE, "llamacpp-q8_0"),
    Target("int4, one stream, beside llama.cpp Q4_1", 1.0, "int4", SINGLE, "llamacpp-gguf"),
    Target("DFlash in int8, questions, beside the best peer", 1.4, _DRAFTING, QUESTIONS, "any"),
    Target("DFlash in int8, questions, beside ours without it", 1.5, _DRAFTING, QUESTIONS, "int8"),
    Target("DFlash in int8, licence text, beside the best peer", 1.4, _DRAFTING, SINGLE, "any"),
    Target("DFlash in int8, licence text, beside ours without it", 1.5, _DRAFTING, SINGLE, "int8"),
    Target("32 clients, int8, beside the best server", 2.0, "int8", MANY, "server"),
    Target("32 clients, int8, beside the best library", 1.4, "int8", MANY, "library"),
    Target("8 clients, int8, beside the best server", 1.7, "int8", EIGHT, "server"),
    Target("8 clients, int8, beside the best library", 1.4, "int8", EIGHT, "library"),
    Target("first token of 512, int8, beside the best server", 1.4, "int8", PREFIX, "server"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`found` is the ratio or share, `beside` who it was compared with, in words; `tokens` per round of the drafts."""

    target: Target
    found: float | None
    beside: str = ""
    tokens: float | None = None

    @property
    def verdict(self) -> Verdict:
        if self.found is None:
            return "not measured"
        return "met" if self.found >= self.target.at_least else "missed"


def outcomes(servers: Servers | None, steps: Steps | None) -> list[Outcome]:
    """All targets, each with what this run says about it."""
    return [_outcome(target, servers, steps) for target in TARGETS]


def _outcome(target: Target, servers: Servers | None, steps: Steps | None) -> Outcome:
    if target.beside == "step":
        return _step_share(target, steps)
    if servers is None:
        return Outcome(target, None)
    figure = BY_SCENARIO[target.scenario]
    if target.beside == "limit":
        value = medians(servers, target.ours, FIGURES).get(figure)
        limits = steps.limits.get(target.ours) if steps else None
        if value is None or limits is None:
            return Outcome(target, None)
        most = limit(limits, figure, servers.new_tokens)
        return Outcome(target, share_of_limit(value, most, figure), f"{value:.0f} of {most:.0f}")
    kinds = {"server": ("server",), "library": ("library",), "any": ("server", "library")}.get(target.beside)
    if kinds is not None:
        best = best_peer(servers, target.ours, figure, kinds)  # type: ignore[arg-type]
    else:
        best = against(servers, target.ours, target.beside, figure)
    if best is None:
        return Outcome(target, None)
    drafted = servers.drafting(target.ours, target.scenario)
    return Outcome(target, best.ratio, f"{best.name}: {best.median:.0f}", drafted)


def _step_share(target: Target, steps: Steps | None) -> Outcome:
    run = steps.runs.get(target.ours) if steps else None
    step = run.case("decode", 32) if run else None
    if step is None:
        return Outcome(target, None)
    return Outcome(target, step.share("gemm", "attention"), f"a step of {step.ms:.1f} ms")
