"""What every verifier of the registry must keep: those without loss the target's law and greedy tokens, and all of them
their requests' log-probabilities, stops and lengths.

`strict` promises more: the tokens of plain decoding under any seed. Those that weigh laws promise the same tokens
wherever a request's rounds fall alike: alone, in a batch, in another order, and here after a preemption too. What only
relaxed ones must keep stands in `test_relaxed_verifiers.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import DraftConfig, VerifierConfig
from engine.pipelines.autoregressive import AutoregressivePipeline
from engine.pipelines.speculative import SpeculativePipeline
from engine.protocols import Verifier
from engine.registry import DRAFTERS, VERIFIERS
from engine.types import FinishReason, Request
from tests.contract import oracle
from tests.contract.ladder import Ladder, assert_same, load_worker
from tests.contract.test_ladder import alone, workload
from tests.laws import REFUSED, p_value
from tests.relaxed import KNOBS, NEUTRAL, SEGMENTS, made, served_by
from tests.sequences import Answer, SegmentRunner, context, decode, requests, segment_counts, serve
from tests.tiny import save_tiny

LOSSLESS = [name for name in VERIFIERS if made(name).card.lossless]


@pytest.fixture(params=VERIFIERS)
def verifier(request: pytest.FixtureRequest) -> Verifier:
    return made(request.param)


def speculative(verifier: Verifier, kind: str = "chain") -> SpeculativePipeline:
    return served_by(verifier, kind, KNOBS.get(verifier.card.name))


def plain(asked: list[Request]) -> dict[str, Answer]:
    return serve(AutoregressivePipeline(SegmentRunner(SEGMENTS)), asked)


def tokens(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.tokens for name, answer in answers.items()}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_verifiers_keep_the_law_of_sequences(name: str) -> None:
    """900 segments of 4 out of 3 tokens, all 81 kinds counted, with rounds of changing lengths."""
    outputs, results = decode(speculative(made(name)), requests(150), lookahead=(3, 2, 0, 1, 3))
    assert not any(result.bias for result in results)
    counts = segment_counts(outputs)
    assert sum(counts) == 900 and p_value(counts, SEGMENTS.law()) > REFUSED


@pytest.mark.parametrize("name", LOSSLESS)
def test_greedy_answers_are_those_of_plain_decoding(name: str) -> None:
    verifier = made(name)
    asked = requests(6, temperature=0.0)
    mixed = asked[:3] + [replace(one, id=f"s{one.id}") for one in requests(3, temperature=1.0)]
    want = plain(asked)
    for kind in ("chain", "marginals"):
        got = serve(speculative(verifier, kind), mixed)
        assert all(got[one.id].tokens == want[one.id].tokens for one in asked[:3])
        assert sum(answer.accepted for answer in got.values()) > 20


def test_seeded_answers_do_not_hang_on_the_company(verifier: Verifier) -> None:
    asked = [replace(one, id=f"{one.id}{i}") for i in range(2) for one in requests(6, temperature=0.9 - 0.3 * i)]
    by_itself = {one.id: serve(speculative(verifier), [one])[one.id].tokens for one in asked}
    assert len({tuple(answer) for answer in by_itself.values()}) > 8
    if verifier.card.exact:
        assert by_itself == tokens(plain(asked))
        assert by_itself == tokens(serve(speculative(verifier), asked, lag=1))  # shorter drafts near the end
    assert tokens(serve(speculative(verifier), asked)) == by_itself
    assert tokens(serve(speculative(verifier), asked[::-1])) == by_itself
    scarce = serve(speculative(verifier), asked, num_blocks=26)
    assert sum(answer.preemptions for answer in scarce.values()) > 0
    assert tokens(scarce) == by_itself


def test_reported_log_probabilities_are_the_targets(verifier: Verifier) -> None:
    """Of accepted tokens, of those that correct a draft and of those after a whole one: raw, by the tokens before."""
    asked = requests(12, temperature=0.7, logprobs=1)
    kinds = {"accepted": 0, "corrected": 0, "bonus": 0}
    outputs, results = decode(speculative(verifier), asked)
    text = {request.id: list(request.prompt_ids) for request in asked}
    for result in results:
        assert result.logprobs is not None and len(result.logprobs) == len(result.new_tokens)
        for token, told in zip(result.new_tokens, result.logprobs, strict=True):
            row = SEGMENTS.target[context(text[result.request_id])].log_softmax(0)
            assert told.token_id == token and told.logprob == pytest.approx(float(row[token]), abs=1e-6)
            assert told.rank == 1 + int((row > row[token]).sum()) and told.top[0][0] == int(row.argmax())
            text[result.request_id].append(token)
        kinds["accepted"] += result.accepted
        kinds["corrected" if result.accepted < result.drafted else "bonus"] += 1
    assert min(kinds.values()) > 5
    assert all(text[name][4:] == tokens for name, tokens in outputs.items())


@pytest.mark.parametrize("lag", [0, 1])
def test_stops_inside_a_round_end_the_answer_there(verifier: Verifier, lag: int) -> None:
    """End-of-sequence and stop ids wherever they fall in a round; what was accepted behind them is not told."""
    asked = requests(20, temperature=0.8)
    whole = tokens(serve(speculative(verifier), asked, lag=lag))
    stopping = [replace(one, sampling=replace(one.sampling, stop_token_ids=(2,))) for one in asked[:10]]
    stopping += [replace(one, eos_ids=(2,)) for one in asked[10:]]
    places = set()
    for name, answer in serve(speculative(verifier), stopping, lag=lag).items():
        end = whole[name].index(2) + 1 if 2 in whole[name] else len(whole[name])
        assert answer.tokens == whole[name][:end]
        assert answer.finish == (FinishReason.STOP if 2 in whole[name] else FinishReason.LENGTH)
        places.add(end)
    assert len(places) >= 4


def test_answers_are_as_long_as_they_may_be(verifier: Verifier) -> None:
    asked = [replace(requests(1, length=most, temperature=0.8)[0], id=f"m{most}") for most in range(1, 17)]
    for most, answer in enumerate(serve(speculative(verifier), asked).values(), start=1):
        assert len(answer.tokens) == most and answer.finish is FinishReason.LENGTH


@pytest.mark.parametrize("name", ["strict", "rejection", "lenient"])
def test_a_real_model_answers_greedily_as_without_drafts(name: str, tmp_path: Path) -> None:
    """A worker with this verifier in its configuration, the relaxed one with a neutral knob; drafts mostly right."""
    folder = save_tiny("llama", tmp_path)
    asked = workload("greedy")
    want = alone(load_worker(folder, memory="8MiB", threads=1), asked)
    oracle.ANSWERS.clear()
    oracle.ANSWERS.update({one.id: [*one.prompt_ids, *want[one.id].tokens] for one in asked})
    DRAFTERS["oracle"] = "tests.contract.oracle:OracleDrafter"
    try:
        configured = VerifierConfig(name, NEUTRAL.get(name, {}))
        options = {"draft": DraftConfig("oracle", max_draft=6, adaptive=False), "verifier": configured}
        worker = load_worker(folder, memory="8MiB", threads=1, **options)  # type: ignore[arg-type]
    finally:
        del DRAFTERS["oracle"]
    # The first is the configured one, and the oracle does not say what it thinks of its tokens.
    cards = worker.capacity().verifiers
    offered = {other for other in VERIFIERS if not made(other).needs_marginal}
    assert cards[0].name == name and {card.name for card in cards} == offered
    ladder = Ladder(worker)
    assert assert_same(want, ladder.run(asked)) == 0
    assert ladder.stats.spec_accepted > 60
    (told,) = ladder.stats.verifiers
    assert (told.name, told.drafted, told.accepted) == (name, ladder.stats.spec_drafted, ladder.stats.spec_accepted)
    assert told.bias == 0 and told.tokens == told.accepted + told.rounds
