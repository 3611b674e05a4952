"""Masks, bias and penalties: hand-worked cases, their order, and random ones against the slow reference."""

from __future__ import annotations

import math
import random

import pytest
import torch

from engine.runtime.logit_rules import LogitRules
from engine.runtime.sampler import Sampler, SamplingState
from engine.types import Request, SamplingParams
from tests.numeric.sampler_reference import processed, row, state

NEVER = -math.inf


def edited(logits: torch.Tensor, *states: SamplingState) -> list[list[float]]:
    work = logits.repeat(len(states), 1) if len(logits) == 1 else logits.clone()
    LogitRules(states, work.shape[1], torch.device("cpu")).apply_(work)
    return work.tolist()


def test_repetition_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    one = state((0, 1), (2, 2), repetition_penalty=2.0)
    assert edited(row(4.0, -4.0, 1.0, 3.0, 0.0), one) == [[2.0, -8.0, 0.5, 3.0, 0.0]]


def test_presence_and_frequency_count_the_output_only() -> None:
    one = state((0, 0), (1, 2, 2, 2), presence_penalty=0.5, frequency_penalty=0.25)
    assert edited(row(1.0, 1.0, 1.0, 1.0), one) == [[1.0, 0.25, -0.25, 1.0]]
    negative = state((0, 0), (1, 2, 2, 2), frequency_penalty=-1.0)
    assert edited(row(1.0, 1.0, 1.0, 1.0), negative) == [[1.0, 2.0, 4.0, 1.0]]


def test_order_is_mask_bias_repetition_then_presence_and_frequency() -> None:
    one = state(
        (),
        (0, 1, 1),
        logit_bias=((0, 3.0), (1, -5.0), (2, 100.0), (4, 1.0), (4, 0.5)),
        bad_words=((2,),),
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    # 0: (1 + 3) / 2 - 0.75; 1: (1 - 5) * 2 - 1; 2: banned whatever its bias; 4: two biases of one id add up
    assert edited(row(1.0, 1.0, 1.0, 1.0, 1.0), one) == [[1.25, -9.0, NEVER, 1.0, 2.5]]


def test_temperature_comes_after_the_penalties() -> None:
    one = state((), (0,), presence_penalty=1.0, temperature=0.5)
    laws = Sampler(2).processed_log_probs(row(2.0, 0.0), [one])
    assert laws[0, 0] - laws[0, 1] == pytest.approx((2.0 - 1.0) / 0.5)


def test_allowed_ids_leave_nothing_else() -> None:
    assert edited(row(1.0, 2.0, 3.0), state(allowed_token_ids=(2, 0, 2))) == [[1.0, NEVER, 3.0]]


def test_ends_are_banned_until_min_tokens_exist() -> None:
    one = state(eos_ids=(1,), stop_token_ids=(3, 999), min_tokens=2, temperature=0.0)
    logits = row(0.0, 9.0, 1.0, 9.5)
    for _ in range(2):
        assert edited(logits, one) == [[0.0, NEVER, 1.0, NEVER]]
        assert Sampler(4).sample(logits, [one]).tokens.tolist() == [2]
        one.push(2)
    assert edited(logits, one) == [[0.0, 9.0, 1.0, 9.5]]
    assert Sampler(4).sample(logits, [one]).tokens.tolist() == [3]


def test_bad_words_ban_their_last_token_after_their_head_only() -> None:
    one = state((7, 1), bad_words=((0,), (1, 2), (1, 3, 4), ()))
    logits = row(1.0, 1.0, 1.0, 1.0, 1.0)
    assert edited(logits, one) == [[NEVER, 1.0, NEVER, 1.0, 1.0]]  # the head may lie in the prompt
    one.push(3)
    assert edited(logits, one) == [[NEVER, 1.0, 1.0, 1.0, NEVER]]
    one.push(3)
    assert edited(logits, one) == [[NEVER, 1.0, 1.0, 1.0, 1.0]]


def test_a_bad_word_longer_than_the_text_bans_nothing() -> None:
    assert edited(row(1.0, 1.0), state((0,), bad_words=((0, 0, 0, 1),))) == [[1.0, 1.0]]


def test_a_bad_word_never_appears_in_a_sampled_text() -> None:
    one = state((1,), seed=3, bad_words=((0, 1), (1, 1, 0)))
    sampler, text = Sampler(3), [1]
    for _ in range(300):
        token = int(sampler.sample(torch.zeros(1, 3), [one]).tokens)
        one.push(token)
        text.append(token)
    written = "".join(map(str, text))
    assert "01" not in written and "110" not in written and set(written) == set("012")


def test_ids_outside_the_vocabulary_touch_nothing() -> None:
    one = state(
        (50, -1),
        (99,),
        eos_ids=(4, -3),
        stop_token_ids=(10**9,),
        min_tokens=9,
        logit_bias=((4, 1.0), (-1, 1.0)),
        bad_words=((4,), (-1,)),
        repetition_penalty=1.5,
        presence_penalty=1.0,
    )
    neighbour = state()
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [1.0, 1.0, 1.0, 1.0]])
    assert edited(logits, neighbour, one, neighbour) == logits.tolist()


def test_counts_grow_past_their_first_buffer() -> None:
    one = state(range(40), range(20, 320), frequency_penalty=1.0, repetition_penalty=2.0)
    assert one.counts is not None and len(one.counts.ids) == 320
    logits = torch.full((1, 400), 4.0)
    expected = [2.0] * 20 + [1.0] * 300 + [4.0] * 80
    assert edited(logits, one) == [expected]


@pytest.mark.parametrize("seed", range(8))
def test_random_mixes_equal_the_slow_reference(seed: int) -> None:
    chance = random.Random(seed)
    size = 30
    logits = 3 * torch.randn(10, size, generator=torch.Generator().manual_seed(seed))
    states, expected = [], []
    for values in logits.tolist():
        prompt = [chance.randrange(size) for _ in range(12)]
        outputs = [chance.randrange(size) for _ in range(chance.randrange(15))]
        text = [*prompt, *outputs]
        params = SamplingParams(
            max_tokens=50,
            presence_penalty=chance.choice([0.0, 1.5, -0.5]),
            frequency_penalty=chance.choice([0.0, 0.3]),
            repetition_penalty=chance.choice([1.0, 1.2, 0.8]),
            min_tokens=chance.choice([0, 7]),
            stop_token_ids=(chance.randrange(size),),
            logit_bias=tuple((chance.randrange(size), chance.uniform(-5, 5)) for _ in range(3)),
            allowed_token_ids=chance.choice([None, tuple(chance.sample(range(size), 20))]),
            bad_words=((*text[-2:], 5), (text[-1], 6), (7,), (text[-2], 8)),
        )
        states.append(SamplingState(Request("r", tuple(prompt), params, eos_ids=(1,)), outputs))
        expected.append(processed(values, params, prompt, outputs, (1,)))
    for got, want in zip(edited(logits, *states), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)
