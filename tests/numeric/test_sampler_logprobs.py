"""Reported log-probabilities: raw, ranked, sorted, with ties by lowest id."""

from __future__ import annotations

import math

import pytest
import torch

from engine.runtime.sampler import Sampler, prompt_logprobs, top_logprobs
from engine.types import TokenLogprob
from tests.numeric.sampler_reference import row, state


def slow(values: list[float], token: int, k: int) -> TokenLogprob:
    largest = max(values)
    norm = largest + math.log(math.fsum(math.exp(value - largest) for value in values))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    top = tuple((i, values[i] - norm) for i in order[:k])
    return TokenLogprob(token, values[token] - norm, order.index(token) + 1, top)


def assert_close(got: TokenLogprob, want: TokenLogprob) -> None:
    assert (got.token_id, got.rank) == (want.token_id, want.rank)
    assert [token for token, _ in got.top] == [token for token, _ in want.top]
    assert got.logprob == pytest.approx(want.logprob, abs=1e-5)
    assert [value for _, value in got.top] == pytest.approx([value for _, value in want.top], abs=1e-5)


def test_random_rows_equal_the_slow_reference() -> None:
    logits = torch.randn(150, 400, generator=torch.Generator().manual_seed(1)).mul(8).round().div(2)  # many ties
    tokens = torch.randint(0, 400, (150,), generator=torch.Generator().manual_seed(2))
    counts = [index % 21 for index in range(150)]
    found = top_logprobs(logits, tokens, counts)
    for values, token, k, got in zip(logits.tolist(), tokens.tolist(), counts, found, strict=True):
        assert len(got.top) == k
        assert_close(got, slow(values, token, k))


def test_ties_are_ranked_and_sorted_by_id() -> None:
    logits = row(0.0, 1.0, 1.0, 2.0, 1.0, 1.0)
    (entry,) = top_logprobs(logits, torch.tensor([4]), [3])
    assert entry.rank == 4
    assert [token for token, _ in entry.top] == [3, 1, 2]


def test_zero_alternatives_give_the_chosen_token_only() -> None:
    (entry,) = top_logprobs(row(0.0, 0.0), torch.tensor([1]), [0])
    assert_close(entry, TokenLogprob(1, math.log(0.5), 2, ()))


def test_minus_infinity_stays() -> None:
    (entry,) = top_logprobs(row(0.0, -math.inf, -math.inf), torch.tensor([2]), [3])
    assert entry.logprob == -math.inf and entry.rank == 3
    assert entry.top == ((0, 0.0), (1, -math.inf), (2, -math.inf))


def test_more_alternatives_than_tokens_give_all() -> None:
    (entry,) = top_logprobs(row(0.0, 1.0), torch.tensor([0]), [20])
    assert [token for token, _ in entry.top] == [1, 0]


def test_prompt_logprobs_match_rows_and_next_tokens() -> None:
    logits = torch.randn(130, 50, generator=torch.Generator().manual_seed(3))
    following = torch.arange(130) % 50
    found = prompt_logprobs(logits, following, 2)
    assert len(found) == 130
    for values, token, got in zip(logits.tolist(), following.tolist(), found, strict=True):
        assert_close(got, slow(values, token, 2))
    assert prompt_logprobs(logits[:0], following[:0], 2) == []


def test_sample_reports_the_raw_distribution_of_the_rows_that_asked() -> None:
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(4))
    padded = torch.cat((logits, torch.full((4, 4), 50.0)), dim=1)
    states = [
        state(temperature=0.2, top_k=3, seed=1),
        state(temperature=0.0),
        state((), (1, 2), repetition_penalty=1.5, bad_words=((int(logits[2].argmax()),),), temperature=0.0),
        state(allowed_token_ids=(7,)),
    ]
    sampled = Sampler(60).sample(padded, states, [5, None, 0, 1])
    assert sampled.logprobs[1] is None
    for index, k in ((0, 5), (2, 0), (3, 1)):
        entry = sampled.logprobs[index]
        assert entry is not None
        assert_close(entry, slow(logits[index].tolist(), int(sampled.tokens[index]), k))
    assert sampled.tokens[3] == 7
    assert sampled.logprobs[2] is not None and sampled.logprobs[2].rank > 1


def test_a_row_reports_the_same_bits_alone_and_in_a_batch() -> None:
    logits = torch.randn(9, 49_152, generator=torch.Generator().manual_seed(5))
    tokens = torch.arange(9) * 1000
    together = top_logprobs(logits, tokens, [3] * 9)
    assert together == [top_logprobs(logits[i : i + 1], tokens[i : i + 1], [3])[0] for i in range(9)]


def test_named_alternatives_are_told_in_their_order_beside_ranked_ones() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(3))
    logits[1, 7] = float("-inf")
    tokens = torch.tensor([5, 6, 7])
    named, ranked, none = top_logprobs(logits, tokens, [(9, 5, 0), 2, (7,)])
    laws = logits.log_softmax(1)
    assert [token for token, _ in named.top] == [9, 5, 0]
    assert [value for _, value in named.top] == laws[0, [9, 5, 0]].tolist()
    assert (named.token_id, named.logprob) == (5, named.top[1][1])
    assert ranked == top_logprobs(logits[1:2], tokens[1:2], [2])[0]
    assert none.top == ((7, none.logprob),)
