"""Thinking budgets: the end of the span is forced when they are spent, whoever drafts and verifies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.pipelines.autoregressive import AutoregressivePipeline
from engine.registry import VERIFIERS
from engine.runtime.sampler import Sampler, SamplingState
from engine.thinking import ThinkingBudget
from engine.types import Request, SamplingParams, SpeculationParams
from tests.relaxed import KNOBS, SEGMENTS, pipeline, verifiers
from tests.sequences import SegmentRunner, requests, serve

BEGIN, END = 1, 2


def spent(tokens: Sequence[int], opened: bool) -> list[tuple[int, int | None]]:
    """Written down once more: the thought tokens up to each token of a span, and what comes next."""
    inside, count = opened, 0
    found: list[tuple[int, int | None]] = []
    for token in tokens:
        if inside:
            found.append((count, token))
        if token == END:
            inside = False
        elif inside:
            count += 1
        elif token == BEGIN:
            inside = True
    return found


def asked(n: int, temperature: float, **more: Any) -> list[Request]:
    """Requests of all budgets, in turn; those of every other one begin inside the span."""
    found = []
    for i, request in enumerate(requests(n, temperature=temperature, **more)):
        budget = ThinkingBudget((0, 1, 3, 7)[i % 4], opened=i % 8 > 3, around=(BEGIN, END))
        found.append(replace(request, sampling=replace(request.sampling, thinking=budget)))
    return found


def assert_kept(request: Request, tokens: Sequence[int]) -> int:
    """The budget holds; returns how often it forced the end."""
    budget = request.sampling.thinking
    assert budget is not None
    forced = [token for count, token in spent(tokens, budget.opened) if count >= budget.tokens]
    assert set(forced) <= {END}, (budget, tokens)
    return len(forced)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("more", [{}, {"presence_penalty": 1.0, "bad_words": ((0, 2), (2,)), "min_tokens": 5}])
def test_with_drafts_and_preemption_the_answers_are_the_same(temperature: float, more: dict[str, Any]) -> None:
    wanted = asked(16, temperature, **more)
    plain = serve(AutoregressivePipeline(SegmentRunner(SEGMENTS)), wanted)
    assert sum(assert_kept(request, plain[request.id].tokens) for request in wanted) > 20
    free = serve(
        AutoregressivePipeline(SegmentRunner(SEGMENTS)),
        [replace(one, sampling=replace(one.sampling, thinking=None)) for one in wanted],
    )
    assert any(plain[one.id].tokens != free[one.id].tokens for one in wanted)
    for lag, blocks in itertools.product((0, 1), (512, 20)):
        drafted = serve(pipeline(verifiers("strict"), "chain"), wanted, blocks, lag)
        assert {name: answer.tokens for name, answer in drafted.items()} == {
            name: answer.tokens for name, answer in plain.items()
        }
        assert sum(answer.accepted for answer in drafted.values()) > 50
        assert (blocks < 512) == any(answer.preemptions for answer in drafted.values())


@pytest.mark.parametrize("name", VERIFIERS)
@pytest.mark.parametrize("drawn", [True, False])
def test_no_verifier_lets_a_token_stand_that_the_budget_forbids(name: str, drawn: bool) -> None:
    knobs = tuple(KNOBS.get(name, {}).items())
    wish = SpeculationParams(verifier=name, knobs=knobs, sample=drawn)
    wanted = [replace(one, speculation=wish) for one in asked(24, 0.9)]
    answers = serve(pipeline(verifiers(name), "chain", sample=drawn and verifiers(name)[0].card.drawn), wanted)
    assert sum(assert_kept(one, answers[one.id].tokens) for one in wanted) > 30
    assert sum(answer.accepted for answer in answers.values()) > 50


def test_branches_of_a_tree_have_budgets_of_their_own() -> None:
    budget = ThinkingBudget(2, opened=True, around=(7, 8))
    state = SamplingState(Request("x", (7,), SamplingParams(8, temperature=0.0, thinking=budget)), (5,))
    #        state: 1 left   5: 0 left    8: closed   7: open again  3: under 5   4: after the end
    states = state.ahead([5, 8, 7, 3, 4], [-1, -1, 1, 0, 1])
    assert [one.forced for one in states] == [None, 8, None, None, 8, None]
    assert [one.forced for one in state.ahead([5, 8, 7, 5])] == [None, 8, None, 8, 8]
    assert state.forced is None, "what lies ahead changes nothing"
    again = SamplingState(Request("x", (7,), SamplingParams(8, thinking=budget)), (5, 6))
    assert again.forced == 8, "as after a preemption"


@pytest.mark.parametrize("temperature, top_k", [(0.0, 0), (1.0, 0), (1.0, 3)])
def test_the_forced_token_wins_over_all_other_rules(temperature: float, top_k: int) -> None:
    sampling = SamplingParams(
        8,
        temperature=temperature,
        top_k=top_k,
        bad_words=((8,),),
        logit_bias=((8, -100.0),),
        frequency_penalty=2.0,
        thinking=ThinkingBudget(0, opened=True, around=(7, 8)),
    )
    other = replace(sampling, thinking=None, bad_words=(), logit_bias=())
    states = [SamplingState(Request(name, (1,), given)) for name, given in (("a", sampling), ("b", other))]
    logits = torch.randn(2, 11, generator=torch.Generator().manual_seed(3))
    sampler = Sampler(11)
    drawn = sampler.sample(logits, states, (2, None))
    assert drawn.tokens[0] == 8 and not drawn.failed.any()
    assert drawn.logprobs[0] is not None
    assert drawn.logprobs[0].logprob == pytest.approx(float(logits[0].log_softmax(0)[8])), "of the raw logits"
    laws = sampler.processed_log_probs(logits, states)
    assert laws[0].exp().tolist() == [0.0] * 8 + [1.0] + [0.0] * 2
    logits[0, 4] = float("nan")
    assert sampler.sample(logits, states).failed.tolist() == [True, False]
