"""What a grammar leaves of logits: on the host, on a device, and by a plain loop; and what other rules make of it."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from engine.grammar import Grammar
from engine.runtime.logit_rules import LogitRules
from engine.runtime.sampler import Sampler, SamplingState
from engine.runtime.token_masks import keep_, keep_on_device_
from engine.structured.matcher import Matcher
from engine.structured.state import GrammarState
from engine.structured.vocabulary import Mask, Texts, Vocabulary
from engine.types import Request, SamplingParams
from tests.numeric.sampler_reference import row

NEVER = -math.inf
WORDS = [b"a", b"b", b"c", b"ab", b"<eos>"]
EOS = 4


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(WORDS, frozenset({EOS}), (EOS,), Texts(WORDS[:EOS]))


def bound(vocabulary: Vocabulary, pattern: str, outputs: tuple[int, ...] = (), **sampling: object) -> SamplingState:
    grammar = Grammar("regex", pattern)
    params = SamplingParams(20, **sampling, grammar=grammar)  # type: ignore[arg-type]
    request = Request("r", (0, 1), params, (EOS,))
    return SamplingState(request, outputs, GrammarState(Matcher.compile(grammar, vocabulary), vocabulary))


def edited(logits: torch.Tensor, *states: SamplingState) -> list[list[float]]:
    work = logits.repeat(len(states), 1)
    LogitRules(states, work.shape[1], torch.device("cpu")).apply_(work)
    return work.tolist()


def packed(allowed: np.ndarray) -> Mask:
    return np.packbits(allowed, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("size", [5, 64, 101, 300])
def test_host_device_and_a_loop_agree(size: int) -> None:
    """Vocabularies of a model that are smaller than the masks, as large, and padded."""
    rng = np.random.default_rng(size)
    logits = torch.tensor(rng.normal(size=(7, size)), dtype=torch.float32)
    allowed = rng.random((3, 128)) < rng.random((3, 1))
    masks = [packed(one) for one in allowed]
    rows, expected = (5, 0, 3), logits.clone()
    for at, one in zip(rows, allowed, strict=True):
        for token in range(size):
            if token >= 128 or not one[token]:
                expected[at, token] = NEVER
    host, device = logits.clone(), logits.clone()
    keep_(host, list(zip(rows, masks, strict=True)))
    keep_on_device_(device, torch.tensor(rows), torch.from_numpy(np.stack(masks).view(np.uint8)))
    assert torch.equal(host, expected) and torch.equal(device, expected)


def test_only_what_the_grammar_allows_is_left(vocabulary: Vocabulary) -> None:
    """The logits of nobody's tokens, behind the vocabulary, are out, whatever they are."""
    logits = row(1.0, 2.0, 3.0, 4.0, 5.0, 99.0)
    one = bound(vocabulary, "a*b")
    free = SamplingState(Request("f", (0,), SamplingParams(3)))
    assert edited(logits, one, free) == [[1.0, 2.0, NEVER, 4.0, NEVER, NEVER], logits[0].tolist()]
    one.push(3)  # ab
    assert edited(logits, one, free) == [[NEVER, NEVER, NEVER, NEVER, 5.0, NEVER], logits[0].tolist()]
    one.push(EOS)
    assert edited(logits, one) == [logits[0].tolist()]  # over: nobody will read it


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ({"min_tokens": 9}, {0, 1}),  # the end is allowed by the grammar, and banned
        ({"bad_words": ((0,),)}, {1, EOS}),
        ({"bad_words": ((1, 0), (0,))}, {1, EOS}),
        ({"min_tokens": 9, "bad_words": ((0,),)}, {1}),
        ({"min_tokens": 9, "bad_words": ((0,), (1,), (3,))}, {0, 1, EOS}),  # nothing would be left
        ({"bad_words": ((0,), (1,), (3,), (EOS,), (77,))}, {0, 1, EOS}),
        ({"stop_token_ids": (0,), "min_tokens": 9}, {1}),
    ],
)
def test_bans_yield_to_a_grammar_that_has_nothing_else(
    vocabulary: Vocabulary, rules: dict[str, object], left: set[int]
) -> None:
    one = bound(vocabulary, "[ab]*c{0}", (1,), **rules)
    scores = edited(row(*[1.0] * 5), one)[0]
    assert {token for token, score in enumerate(scores) if score > NEVER} - {3} == left


def test_draws_and_laws_are_those_of_what_is_left(vocabulary: Vocabulary) -> None:
    """Truncations and temperature see the rest only; rows of many requests do not feel each other."""
    rng = random.Random(3)
    sampler, states, wanted = Sampler(5), [], []
    for seed in range(200):
        kind = rng.choice(({}, {"top_k": 1}, {"top_p": 0.4}, {"temperature": 0.0}, {"temperature": 0.5}))
        states.append(bound(vocabulary, "a|b", seed=seed, **kind))
        wanted.append({0, 1} if not kind or kind == {"temperature": 0.5} else {1})
    logits = row(1.0, 1.5, 9.0, 9.0, 9.0).repeat(200, 1)
    tokens = sampler.sample(logits, states).tokens.tolist()
    assert all(token in some for token, some in zip(tokens, wanted, strict=True)) and set(tokens) == {0, 1}
    laws = sampler.processed_log_probs(logits, states).exp()
    assert laws.sum(1).tolist() == pytest.approx([1.0] * 200)
    assert all({token for token in range(5) if law[token] > 0} == some for law, some in zip(laws, wanted, strict=True))


def test_states_ahead_carry_their_masks(vocabulary: Vocabulary) -> None:
    one = bound(vocabulary, "a(b|c)[ab]", min_tokens=2)
    states = one.ahead([0, 2, 1, EOS, 0], [-1, 0, 1, 2, 0])
    assert [state.ruled for state in states] == [True] * 6
    left = [{i for i, score in enumerate(scores) if score > NEVER} for scores in edited(row(*[1.0] * 5), *states)]
    # The second 0 may not come where it stands: nothing is read of what follows it.
    assert left[:4] == [{0, 3}, {1, 2}, {0, 1}, {EOS}]
    assert one.mask is not None and one.grammar is not None and not one.grammar.failure


def test_a_row_that_allows_nothing_fails_alone(vocabulary: Vocabulary) -> None:
    stuck, fine = bound(vocabulary, "xyz|xzy"), bound(vocabulary, "ab")
    sampled = Sampler(5).sample(row(*[1.0] * 5).repeat(2, 1), [stuck, fine])
    assert sampled.failed.tolist() == [True, False] and sampled.tokens[1] in (0, 3)
    assert stuck.grammar is not None and stuck.grammar.failure
