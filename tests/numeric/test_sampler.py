"""The draw itself: greedy, Gumbel-max law, independence of the batch, seeds, and rows that fail."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from engine.runtime.rng import Purpose, gumbel
from engine.runtime.sampler import Sampler, SamplingState
from engine.types import Request, SamplingParams
from tests.numeric.sampler_reference import chi_square, chi_square_limit, law, processed, row, state

NAN, INF = math.nan, math.inf


def random_state(chance: random.Random, vocab_size: int) -> SamplingState:
    """Any mix of parameters."""

    def some(*values):
        return chance.choice(values)

    ids = [chance.randrange(vocab_size) for _ in range(40)]
    return state(
        ids[:20],
        ids[20:30],
        eos_ids=(ids[30],),
        choice=chance.randrange(3),
        seed=chance.randrange(-(2**63), 2**63),
        temperature=some(0.0, 0.3, 1.0, 1.0, 2.5),
        top_k=some(0, 0, 1, 5, 60, 70, 3000, 10**6),
        top_p=some(1.0, 1.0, 0.5, 0.95, 0.9999),
        min_p=some(0.0, 0.0, 0.05),
        repetition_penalty=some(1.0, 1.3),
        presence_penalty=some(0.0, 0.7),
        frequency_penalty=some(0.0, -0.4),
        min_tokens=some(0, 50),
        logit_bias=some((), ((ids[31], 4.0), (ids[0], -3.0))),
        allowed_token_ids=some(None, None, tuple(range(0, vocab_size, 3))),
        bad_words=some((), ((ids[32],), (ids[29], ids[33]))),
    )


@pytest.mark.parametrize(("vocab_size", "rows", "scale"), [(300, 40, 2.0), (6000, 40, 1.0), (49_152, 16, 3.0)])
def test_a_row_is_bit_identical_alone_and_in_any_batch(vocab_size: int, rows: int, scale: float) -> None:
    chance = random.Random(vocab_size)
    states = [random_state(chance, vocab_size) for _ in range(rows)]
    padded = scale * torch.randn(rows, vocab_size + 64, generator=torch.Generator().manual_seed(1))
    padded[:, vocab_size:] = 1e4
    before = padded.clone()
    sampler = Sampler(vocab_size)
    alone = [sampler.sample(padded[i : i + 1], states[i : i + 1]).tokens.item() for i in range(rows)]
    laws = torch.cat([sampler.processed_log_probs(padded[i : i + 1], states[i : i + 1]) for i in range(rows)])
    for _ in range(3):
        order = chance.sample(range(rows), chance.randint(2, rows))
        sampled = sampler.sample(padded[order], [states[i] for i in order])
        assert not sampled.failed.any()
        assert sampled.tokens.tolist() == [alone[i] for i in order]
        assert torch.equal(sampler.processed_log_probs(padded[order], [states[i] for i in order]), laws[order])
    assert torch.equal(padded, before)  # logits are only read


def test_sparse_and_dense_noise_draw_the_same_tokens() -> None:
    """A large batch makes noise for the kept tokens only, a single row makes all of it."""
    logits = 4 * torch.randn(32, 49_152, generator=torch.Generator().manual_seed(3))
    states = [state(seed=i, top_p=0.9, top_k=40) for i in range(32)]
    sampler = Sampler(49_152)
    together = sampler.sample(logits, states).tokens.tolist()
    assert together == [sampler.sample(logits[i : i + 1], states[i : i + 1]).tokens.item() for i in range(32)]


def test_the_token_is_the_argmax_of_the_law_plus_the_target_noise() -> None:
    states = [
        state(seed=-4, choice=2),
        state(range(9), (5, 6), seed=8, temperature=0.7),
        state(seed=99, top_k=30, min_p=0.01),
        state((), (1,), seed=2**63 - 1, top_p=0.8, temperature=1.4, presence_penalty=1.0),
    ]
    logits = 2 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(5))
    sampler = Sampler(1000)
    laws = sampler.processed_log_probs(logits, states)
    fields = [(-4, 2, 3), (8, 0, 11), (99, 0, 3), (2**63 - 1, 0, 1)]
    noise = torch.stack([gumbel(*key, Purpose.TARGET, 1000, "cpu") for key in fields])
    assert sampler.sample(logits, states).tokens.tolist() == (laws + noise).argmax(1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6, "top_k": 7},
        {"temperature": 1.7, "top_p": 0.8},
        {"min_p": 0.1, "logit_bias": ((3, 2.0),)},
    ],
)
def test_tokens_follow_the_law(params: dict) -> None:
    values = [2.0, 1.5, 1.5, 0.3, 0.0, -0.2, -1.0, -1.5, -2.0, -4.0, 0.9, 0.1]
    sampling = SamplingParams(max_tokens=1, **params)
    expected = law(processed(values, sampling, (1, 2, 3), (), ()), sampling)
    count = 20_000
    states = [state(seed=seed, **params) for seed in range(count)]
    tokens = Sampler(len(values)).sample(row(*values).repeat(count, 1), states).tokens
    statistic, degrees = chi_square(tokens.bincount(minlength=len(values)).tolist(), expected)
    assert degrees > 0
    assert statistic < chi_square_limit(degrees)


def test_greedy_takes_the_lowest_id_on_ties_and_never_the_padding() -> None:
    logits = row(1.0, 5.0, -2.0, 5.0, 5.0, 9.0, NAN)
    for repeats in (1, 3):
        for params in ({"temperature": 0.0}, {"temperature": 9e-6}, {"top_k": 1}, {"temperature": 0.0, "top_k": 3}):
            sampled = Sampler(5).sample(logits.repeat(repeats, 1), [state(**params)] * repeats)
            assert sampled.tokens.tolist() == [1] * repeats
            assert not sampled.failed.any()


def test_greedy_is_the_limit_of_low_temperatures() -> None:
    logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(2))
    best = Sampler(500).sample(logits, [state(temperature=0.0)] * 20).tokens
    assert torch.equal(best, logits.argmax(1))
    cold = Sampler(500).sample(logits, [state(temperature=1.1e-5, seed=seed) for seed in range(20)]).tokens
    assert torch.equal(cold, best)


def test_seed_choice_and_position_change_the_draw_and_nothing_else_does() -> None:
    logits = torch.zeros(1, 50_000)
    sampler = Sampler(50_000)

    def draw(**fields) -> int:
        return int(sampler.sample(logits, [state(**fields)]).tokens)

    base = draw(seed=1)
    assert base == draw(seed=1) == draw(prompt=(9, 9, 9), seed=1) == draw(prompt=(9,), outputs=(4, 4), seed=1)
    others = [
        draw(seed=2),
        draw(seed=-1),
        draw(seed=1, choice=1),
        draw(seed=1, outputs=(1,)),
        draw(prompt=(1,), seed=1),
    ]
    assert len({base, *others}) == 6


def test_a_pushed_state_equals_a_rebuilt_one() -> None:
    chance = random.Random(4)
    logits = torch.randn(12, 100, generator=torch.Generator().manual_seed(4))
    sampler = Sampler(100)
    grown = state((1, 2), seed=5, repetition_penalty=1.2, frequency_penalty=0.5, bad_words=((1, 2), (3, 4, 5), (6,)))
    outputs: list[int] = []
    for step in range(12):
        rebuilt = SamplingState(Request("r", (1, 2), grown.sampling), outputs)
        token = int(sampler.sample(logits[step : step + 1], [grown]).tokens)
        assert token == int(sampler.sample(logits[step : step + 1], [rebuilt]).tokens)
        assert grown.position == rebuilt.position == 2 + step
        outputs.append(chance.choice([token, 3, 4, 1]))
        grown.push(outputs[-1])


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"min_p": 0.1, "temperature": 0.5}, {"presence_penalty": 1.0}]
)
def test_rows_with_nan_or_infinity_fail_alone(params: dict) -> None:
    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(6))
    healthy = logits.clone()
    logits[1, 7] = NAN
    logits[2] = NAN
    logits[3, 39] = INF
    logits[4] = -INF
    logits[5, 3:] = -INF  # still three tokens to choose from
    states = [state(seed=seed, **params) for seed in range(7)]
    sampler = Sampler(40)
    sampled = sampler.sample(logits, states, [1] * 7)
    assert sampled.failed.tolist() == [False, True, True, True, True, False, False]
    assert sampled.tokens[1:5].tolist() == [0] * 4 and sampled.tokens[5] < 3
    assert [entry is None for entry in sampled.logprobs] == sampled.failed.tolist()
    expected = sampler.sample(healthy, states).tokens
    assert sampled.tokens[[0, 6]].tolist() == expected[[0, 6]].tolist()
    laws = sampler.processed_log_probs(logits, states)
    assert laws.isnan().all(1).tolist() == sampled.failed.tolist()
    assert laws[[0, 5, 6]].exp().sum(1).tolist() == pytest.approx([1, 1, 1], rel=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_tokens_are_all_banned_fails_alone(temperature: float) -> None:
    states = [
        state(temperature=temperature),
        state(temperature=temperature, allowed_token_ids=(2,), eos_ids=(2,), min_tokens=1),
        state(temperature=temperature, top_k=2, allowed_token_ids=()),
        state(temperature=temperature, allowed_token_ids=(77, -1)),
        state(temperature=temperature, allowed_token_ids=(3,), top_p=0.5),
    ]
    sampled = Sampler(5).sample(torch.zeros(5, 5), states)
    assert sampled.failed.tolist() == [False, True, True, True, False]
    assert sampled.tokens[4] == 3


def test_nan_under_a_ban_still_fails_the_row() -> None:
    assert Sampler(3).sample(row(0.0, NAN, 1.0), [state(bad_words=((1,),))]).failed.tolist() == [True]


def test_greedy_law_is_one_hot() -> None:
    laws = Sampler(4).processed_log_probs(row(1, 3, 3, 0).repeat(2, 1), [state(temperature=0.0), state(top_k=1)])
    assert laws.exp().tolist() == [[0, 1, 0, 0]] * 2


def test_an_empty_batch_gives_nothing() -> None:
    sampled = Sampler(5).sample(torch.zeros(0, 8), [])
    assert sampled.tokens.shape == sampled.failed.shape == (0,) and not sampled.logprobs


def test_a_soft_law_of_a_greedy_row_is_that_of_temperature_1_without_truncation() -> None:
    """Rules hold, the other rows' laws stay as they are, and its best token is the one that is taken."""
    chance = random.Random(5)
    states = [random_state(chance, 60) for _ in range(60)]
    logits = 3 * torch.randn(60, 60, generator=torch.Generator().manual_seed(2))
    sampler, logits[7, 3] = Sampler(60), NAN
    hard, soft = sampler.processed_log_probs(logits, states), sampler.processed_log_probs(logits, states, soft=True)
    taken = sampler.sample(logits, states).tokens
    greedy = [i for i, each in enumerate(states) if each.greedy]
    assert 8 < len(greedy) < 50 and any(each.ruled for each in (states[i] for i in greedy))
    for i, each in enumerate(states):
        if i == 7:
            assert soft[i].isnan().all()
        elif each.greedy:
            whole = replace(each.sampling, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
            same = SamplingState(Request("r", (1, 2, 3), whole))
            for name in ("counts", "_bans", "_min_bans", "num_outputs", "allowed", "bias"):
                setattr(same, name, getattr(each, name))
            assert torch.equal(soft[i], sampler.processed_log_probs(logits[i : i + 1], [same])[0])
            assert soft[i].argmax() == taken[i]
        else:
            assert torch.equal(soft[i], hard[i])
