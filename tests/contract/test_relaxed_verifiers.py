"""What every relaxed verifier of the registry must keep, through pipeline and engine core.

The law that its formula says, and a bias that says how far that is from the target's; strict answers where its knobs
leave it nothing to relax; the request's own masks; and nothing of all this may hang on who else is in the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.pipelines.autoregressive import AutoregressivePipeline
from engine.registry import VERIFIERS
from engine.types import Request, SamplingParams, SeqResult, SpeculationParams, VerifierStats
from tests.laws import REFUSED
from tests.relaxed import KNOBS, NEUTRAL, SEGMENTS, ToyHead, law, made, pipeline, raised, served_by, tables, under
from tests.relaxed import verifiers as offered
from tests.sequences import VOCAB, Answer, SegmentRunner, context, decode, requests, serve

RELAXED = [name for name in VERIFIERS if not made(name).card.lossless]


def test_every_relaxed_verifier_is_covered_here() -> None:
    assert set(KNOBS) == set(RELAXED)
    assert {name for name in RELAXED if any(knob.neutral is not None for knob in made(name).card.knobs)} == set(NEUTRAL)


def tokens(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.tokens for name, answer in answers.items()}


def p_value_of_rows(counts: Tensor, laws: Tensor) -> float:
    """Of a chi-square test of counts [rows, vocabulary], given how many each row has; thin cells are pooled.

    0 for the impossible.
    """
    if counts[laws < 1e-9].any():
        return 0.0
    expected, order = (laws * counts.sum(1, keepdim=True)).sort(1)
    seen = counts.gather(1, order).double()
    statistic, degrees = 0.0, 0
    for row, wanted in zip(seen.tolist(), expected.tolist(), strict=True):
        while len(wanted) > 1 and wanted[0] < 5:
            row[:2], wanted[:2] = [sum(row[:2])], [sum(wanted[:2])]
        statistic += sum((a - b) ** 2 / b for a, b in zip(row, wanted, strict=True) if b)
        degrees += len(wanted) - 1
    assert degrees > 0
    return float(torch.special.gammaincc(torch.tensor(degrees / 2), torch.tensor(statistic / 2)))


def counted(asked: Sequence[Request], results: Sequence[SeqResult]) -> tuple[Tensor, Tensor, list[tuple[int, float]]]:
    """Tokens by context: at drafted positions that were reached, and elsewhere; (context, bias) of the former."""
    drafted, others = torch.zeros(len(SEGMENTS.target), VOCAB), torch.zeros(len(SEGMENTS.target), VOCAB)
    biases: list[tuple[int, float]] = []
    text = {request.id: list(request.prompt_ids) for request in asked}
    for result in results:
        assert len(result.bias) in (0, len(result.new_tokens))
        for place, token in enumerate(result.new_tokens):
            at = context(text[result.request_id])
            if place < result.drafted:
                drafted[at, token] += 1
                biases.append((at, result.bias[place]))
            else:
                others[at, token] += 1
                assert not any(result.bias[place:])
            text[result.request_id].append(token)
    return drafted, others, biases


@pytest.mark.parametrize("drawn", [False, True], ids=["chosen", "drawn"])
@pytest.mark.parametrize("name", RELAXED)
def test_tokens_have_the_law_of_the_rule_and_their_bias_is_its_distance(name: str, drawn: bool) -> None:
    """At every drafted position that is reached, by what stands before it; elsewhere the law is the target's."""
    asked = [under(one, name, sample=drawn) for one in requests(240, temperature=0.9)]
    _, results = decode(pipeline(offered("strict")), asked, lookahead=(3, 2, 0, 1, 3))
    drafted, others, biases = counted(asked, results)
    predicted, (p, _) = law(name, 0.9, drawn), tables(0.9)
    assert p_value_of_rows(drafted, predicted) > REFUSED
    assert p_value_of_rows(drafted, p) < REFUSED, "the target's own law would pass, too"
    assert p_value_of_rows(others, p) > REFUSED
    distances = (predicted - p).abs().sum(1) / 2
    assert [bias for _, bias in biases] == pytest.approx([float(distances[at]) for at, _ in biases], abs=1e-5)
    bound = made(name).card.bound(KNOBS[name])
    assert 0.02 < sum(bias for _, bias in biases) / len(biases) < max(distances) <= bound + 1e-6


@pytest.mark.parametrize("name", RELAXED)
def test_greedy_answers_take_the_likeliest_token_of_the_rules_law(name: str) -> None:
    """The draft's, where the rule raises it above all others, else the target's: the same under any seed, in any batch.

    The bias counts tokens that are not the target's likeliest.
    """
    p, q = tables(1.0)
    asked = [under(one, name) for one in requests(4, temperature=0.0)]
    answers = serve(pipeline(offered("strict")), asked)
    want = answers[asked[0].id]
    assert all(answer.tokens == want.tokens and answer.bias == want.bias for answer in answers.values())
    alone = serve(served_by(made(name), knobs=KNOBS[name]), requests(1, temperature=0.0))["r0"]
    assert (alone.tokens, alone.bias) == (want.tokens, want.bias)
    prompts = [tuple(int(digit) for digit in f"{code:04d}") for code in (0, 1, 2, 10, 21, 102, 2001, 1220, 1111)]
    asked = [
        replace(under(one, name), prompt_ids=prompt, id=str(prompt))
        for one, prompt in zip(requests(9, temperature=0.0, prompt=4), prompts, strict=True)
    ]
    asked = [replace(one, prompt_ids=one.prompt_ids[: 1 + i % 4]) for i, one in enumerate(asked)]
    _, results = decode(pipeline(offered("strict")), asked, lookahead=(3, 2, 0, 1))
    text = {one.id: list(one.prompt_ids) for one in asked}
    found = 0.0
    for result in results:
        bias = result.bias or (0.0,) * len(result.new_tokens)
        for place, token in enumerate(result.new_tokens):
            at = context(text[result.request_id])
            best, drafted = int(p[at].argmax()), int(q[at].argmax())
            expected = best
            if place < result.drafted:
                weight = float(ToyHead().weights(SEGMENTS.draft[at], SEGMENTS.target[at]))
                mass = raised(name, p[at], float(q[at, drafted]), drafted, weight)
                others = p[at].clone()
                others[drafted] = 0
                expected = drafted if mass > float(others.max()) * (1 - mass) / (1 - float(p[at, drafted])) else best
            assert token == expected and bias[place] == (token != best)
            found += bias[place]
            text[result.request_id].append(token)
    assert found > 0, "the rule never left the target's own tokens"


@pytest.mark.parametrize("name", NEUTRAL)
@pytest.mark.parametrize("lag", [0, 1])
def test_neutral_knobs_are_strict_bit_for_bit(name: str, lag: int) -> None:
    """Named by requests, or the server's own; drawn or not, they are the tokens of plain decoding."""
    asked = [
        replace(one, id=f"{one.id} {t}")
        for t in (0.0, 0.9)
        for one in requests(6, length=20, temperature=t, logprobs=2)
    ]
    knobs = tuple(NEUTRAL[name].items())
    want = serve(AutoregressivePipeline(SegmentRunner(SEGMENTS)), asked)
    for sample in (False, True):
        wish = SpeculationParams(verifier=name, knobs=knobs, sample=sample)
        by_request = serve(pipeline(offered("strict")), [replace(one, speculation=wish) for one in asked], lag=lag)
        by_default = serve(pipeline(offered(name), knobs=NEUTRAL[name]), asked, lag=lag)
        for got in (by_request, by_default):
            assert sum(answer.accepted for answer in got.values()) > 60
            for one in asked:
                assert (got[one.id].tokens, got[one.id].logprobs) == (want[one.id].tokens, want[one.id].logprobs)
                assert not any(got[one.id].bias)


def crowd() -> list[Request]:
    """Requests of all verifiers, with and without a temperature, their drafts drawn and chosen."""
    asked = []
    for seed, name in enumerate([*VERIFIERS, *VERIFIERS]):
        sample = seed >= len(VERIFIERS)
        for temperature in (0.0, 0.8) if sample else (0.8,):
            one = requests(seed + 1, temperature=temperature)[seed]
            one = replace(one, prompt_ids=one.prompt_ids + (seed % 3,) * (seed % 5))
            asked.append(replace(under(one, name, sample=sample), id=f"{seed} {name} {temperature}"))
    quiet = SpeculationParams(verifier="lenient", enabled=False)
    return [*asked, replace(requests(1, temperature=0.8)[0], id="undrafted", speculation=quiet)]


def test_requests_of_different_verifiers_share_a_batch_and_nothing_else() -> None:
    """Each answers as alone, whatever the others want, in any order and after preemptions."""
    asked = crowd()
    by_itself = {one.id: serve(pipeline(offered("strict")), [one])[one.id] for one in asked}
    for order, blocks in ((asked, 512), (asked[::-1], 512), (asked, 100)):
        together = serve(pipeline(offered("block")), order, num_blocks=blocks)
        assert any(answer.preemptions for answer in together.values()) == (blocks == 100)
        for name, answer in by_itself.items():
            assert together[name].tokens == answer.tokens, name
            assert together[name].bias == pytest.approx(answer.bias, abs=1e-6)
    plain = serve(AutoregressivePipeline(SegmentRunner(SEGMENTS)), asked)
    for one in asked:
        if one.id == "undrafted" or made(one.speculation.verifier).card.exact:
            assert by_itself[one.id].tokens == plain[one.id].tokens
    assert sum(any(answer.bias) for answer in by_itself.values()) > 8


MASKS = [
    SamplingParams(24, allowed_token_ids=(0, 2)),
    SamplingParams(24, bad_words=((1,), (0, 0))),
    SamplingParams(24, top_k=2),
    SamplingParams(24, top_k=1),
    SamplingParams(24, allowed_token_ids=(1, 2), bad_words=((2, 2), (1, 1, 1)), top_p=0.9),
]


def forbidden(mask: SamplingParams, text: list[int]) -> set[int]:
    """Tokens that may not follow; truncation alone does not bind a greedy request, whose law is whole."""
    found = set(range(VOCAB)).difference(mask.allowed_token_ids or range(VOCAB))
    for word in mask.bad_words:
        if text[len(text) - len(word) + 1 :] == list(word[:-1]):
            found.add(word[-1])
    if mask.temperature and mask.top_k:
        found.update(SEGMENTS.target[context(text)].argsort(descending=True)[mask.top_k :].tolist())
    return found


@pytest.mark.parametrize("name", [*RELAXED, "block"])
def test_no_rule_writes_what_the_request_forbids(name: str) -> None:
    """Not chosen, not drawn, not greedy; drafts know nothing of masks, and propose what is forbidden all the time."""
    asked = []
    for number, mask in enumerate(MASKS):
        for sample, temperature in ((False, 0.9), (True, 0.9), (False, 0.0)):
            for one in requests(6 if temperature else 1):
                params = replace(mask, temperature=temperature, seed=one.sampling.seed)
                one = under(replace(one, sampling=params), name, sample=sample)
                asked.append(replace(one, id=f"{one.id} {number} {temperature}"))
    answers = serve(pipeline(offered("strict")), asked)
    met: Counter[int] = Counter()
    for one in asked:
        text = list(one.prompt_ids)
        for token in answers[one.id].tokens:
            banned = forbidden(one.sampling, text)
            assert token not in banned, (one.id, text)
            met[int(SEGMENTS.draft[context(text)].argmax()) in banned] += 1
            text.append(token)
    assert met[1] > 100


@pytest.mark.parametrize("drawn", [False, True], ids=["chosen", "drawn"])
@pytest.mark.parametrize("name", ["ensemble", "top_k_gap"])
def test_outside_the_thinking_span_the_law_is_the_targets(name: str, drawn: bool) -> None:
    """A span begins behind a 0 and ends with a 2: in the prompt, in the answer, and inside of drafts."""
    asked = [
        under(one, name, sample=drawn, thinking_only=True, thinking=(0, 2)) for one in requests(240, temperature=0.9)
    ]
    asked = [replace(one, prompt_ids=(0, 2, 1, (i % 2) * 2)) for i, one in enumerate(asked)]
    _, results = decode(pipeline(offered("strict")), asked, lookahead=(3, 2, 0, 1, 3))
    counts = {inside: torch.zeros(len(SEGMENTS.target), VOCAB) for inside in (True, False)}
    text = {one.id: list(one.prompt_ids) for one in asked}
    for result in results:
        for place, token in enumerate(result.new_tokens):
            before = text[result.request_id]
            inside = next(known == 0 for known in reversed(before) if known != 1)
            if place < result.drafted:
                counts[inside][context(before), token] += 1
                assert inside or not any(result.bias[place : place + 1])
            before.append(token)
    p, _ = tables(0.9)
    assert p_value_of_rows(counts[False], p) > REFUSED
    assert p_value_of_rows(counts[True], law(name, 0.9, drawn)) > REFUSED > p_value_of_rows(counts[True], p)


def test_who_thinks_outside_of_the_span_is_verified_strictly() -> None:
    """Chosen drafts that can't be relaxed anywhere are left to the exact verifier: those are the very tokens."""
    asked = [under(one, "lenient", thinking_only=True, thinking=(7, 8)) for one in requests(6, temperature=0.9)]
    got = serve(pipeline(offered("strict")), asked)
    assert tokens(got) == tokens(serve(AutoregressivePipeline(SegmentRunner(SEGMENTS)), asked))
    assert sum(answer.accepted for answer in got.values()) > 20


def test_what_verifiers_did_is_counted_by_their_names() -> None:
    """Up to each answer's end the biases are those of its tokens; the totals are those of all rounds."""
    asked = [replace(one, eos_ids=(2,)) for one in crowd()]
    answers: dict[str, Answer] = {}
    stats: dict[str, VerifierStats] = {}
    for name in VERIFIERS:
        mine = [one for one in asked if one.speculation.verifier == name]
        answers.update(serve(pipeline(offered("strict")), mine, stats=stats))
        assert set(stats) == {name}
        told = stats.pop(name)
        assert told.drafted >= told.accepted > 0 and told.rounds > 0
        assert told.tokens == told.accepted + told.rounds
        assert (told.bias > 0) == (name in RELAXED)
        assert told.bias >= sum(sum(answers[one.id].bias) for one in mine) - 1e-6
    for answer in answers.values():
        assert len(answer.bias) == len(answer.tokens) and all(0 <= bias <= 1 for bias in answer.bias)
