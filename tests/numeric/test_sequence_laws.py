"""Whole sequences through the speculative pipeline, by their law: drafts of every kind, cut short in every fair way.

3 tokens, segments of 4, rounds of up to 3 drafted tokens that lie across them as they fall: all 81 segments are counted
against their exact law. N is 1,500 segments of each case, 24,000 under `--full`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from engine.pipelines.autoregressive import AutoregressivePipeline
from engine.pipelines.speculative import SpeculativePipeline
from engine.protocols import Dense, DraftAsk, DraftProposal, TargetRows, Verdict, Verifier
from engine.types import FinishReason, Request, SamplingParams, SeqResult
from engine.verification import VerifierCard
from engine.verifiers.block import BlockVerifier
from engine.verifiers.rejection import RejectionVerifier
from engine.verifiers.strict import StrictVerifier
from tests.laws import REFUSED, p_value, rate_p_value
from tests.numeric.sampler_reference import law, processed
from tests.numeric.test_speculative_pipeline import GuessingDrafter, ScriptedRunner, run
from tests.numeric.test_speculative_pipeline import requests as scripted_requests
from tests.sequences import SegmentDrafter, SegmentRunner, Segments, decode, requests, segment_counts

SEGMENTS = Segments(1)
LAW = SEGMENTS.law()


@pytest.fixture
def n(full: bool) -> int:
    """Requests; each writes 6 segments."""
    return 4000 if full else 250


def pipeline(
    drafter: SegmentDrafter, sample: bool = True, trimmed: bool = False, verifier: Verifier | None = None
) -> SpeculativePipeline:
    """`trimmed`: rows of the target cost so much that the pipeline itself leaves out unlikely tokens."""
    verifiers = [verifier or RejectionVerifier()]
    made = SpeculativePipeline(SegmentRunner(SEGMENTS), drafter, verifiers, drafter.most, sample=sample)
    if trimmed:
        made.set_costs(((1, 1e-3), (10_000, 2.0)), ((1, 1e-3), (10_000, 0.2)))
    return made


def accepted_share(results: list[SeqResult]) -> float:
    return sum(result.accepted for result in results) / sum(result.drafted for result in results)


@dataclass(frozen=True)
class Case:
    """A way to draft; drafts should stand this often, at least."""

    kind: str
    sample: bool = True
    cut: str = ""
    trimmed: bool = False
    lookahead: tuple[int, ...] = (3,)
    sampling: dict[str, object] = field(default_factory=dict)
    stands: float = 0.35


CASES = {
    "drawn one after another": Case("chain", stands=0.55),
    "drawn each alone": Case("marginals", stands=0.55),
    "chosen one after another": Case("chain", sample=False),
    "chosen each alone": Case("marginals", sample=False),
    "tempered": Case("chain", sampling={"temperature": 0.6}),
    "truncated": Case("chain", sampling={"top_k": 2}),
    "biased target": Case("chain", sampling={"logit_bias": ((0, 1.0), (2, -1.0))}, stands=0.2),
    "cut by margins": Case("chain", cut="margin", stands=0.7),
    "trimmed by the pipeline": Case("chain", trimmed=True, stands=0.6),
    "stopped early": Case("marginals", lookahead=(3, 1, 0, 2, 0, 0, 3), stands=0.55),
}


# Chosen tokens are the same to both.
RUNS = [("rejection", name) for name in CASES] + [("block", name) for name, case in CASES.items() if case.sample]


def shaped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The target's probabilities, by the sampling parameters that the cases use."""
    logits = logits.clone()
    for token, bias in params.logit_bias:
        logits[:, token] += bias
    if params.top_k:
        logits[logits < logits.topk(params.top_k).values[:, -1:]] = float("-inf")
    return (logits / params.temperature).softmax(1)


@pytest.mark.parametrize(("verifier", "name"), RUNS)
def test_sequences_have_the_targets_law(verifier: str, name: str, n: int) -> None:
    case, weighs = CASES[name], BlockVerifier() if verifier == "block" else RejectionVerifier()
    made = pipeline(SegmentDrafter(SEGMENTS, case.kind, case.cut), case.sample, case.trimmed, weighs)
    outputs, results = decode(made, requests(n, **case.sampling), case.lookahead)  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=1, **case.sampling)  # type: ignore[arg-type]
    counts = segment_counts(outputs)
    assert sum(counts) == 6 * n
    assert p_value(counts, SEGMENTS.law(lambda logits: shaped(logits, params))) > REFUSED
    assert accepted_share(results) > case.stands
    if case.cut or case.trimmed:
        assert len({result.drafted for result in results}) >= 3


@pytest.mark.parametrize("kind", ["chain", "marginals"])
def test_drafts_that_are_cut_by_the_drawn_tokens_probability_bend_the_law(kind: str) -> None:
    """The test above would tell. What was chosen may be cut by anything: nothing about it is random."""
    outputs, _ = decode(pipeline(SegmentDrafter(SEGMENTS, kind, "own")), requests(250))
    assert p_value(segment_counts(outputs), LAW) < REFUSED
    outputs, _ = decode(pipeline(SegmentDrafter(SEGMENTS, kind, "own"), sample=False), requests(250))
    assert p_value(segment_counts(outputs), LAW) > REFUSED


def test_drafts_weighed_by_another_law_than_their_own_bend_the_sequences() -> None:
    @dataclass
    class Boasting(SegmentDrafter):
        def propose(self, *args: object, **options: object) -> DraftProposal:
            proposal = super().propose(*args, **options)  # type: ignore[arg-type]
            assert isinstance(proposal.law, Dense)
            squared = proposal.law.probs.square()
            return DraftProposal(proposal.tokens, proposal.lengths, Dense(squared / squared.sum(-1, keepdim=True)))

    outputs, _ = decode(pipeline(Boasting(SEGMENTS)), requests(250))
    assert p_value(segment_counts(outputs), LAW) < REFUSED


def test_rejection_accepts_what_theory_allows_and_strict_less_of_drawn_drafts() -> None:
    """First drafted tokens of answers that start a segment: 1 - TV(p, q) and, compared with a draw, sum of p q."""
    p, q = SEGMENTS.target[0].softmax(0), SEGMENTS.draft[0].softmax(0)
    made = pipeline(SegmentDrafter(SEGMENTS, most=1))
    _, results = decode(made, requests(3000, length=1))
    rate = float(torch.minimum(p, q).sum())
    assert rate_p_value(sum(result.accepted for result in results), 3000, rate) > REFUSED
    assert rate > float((p * q).sum()) + 0.1


# ---- rows see the drafted tokens before them -------------------------------------------------------------

PROCESSED: dict[str, dict[str, object]] = {
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    "bad words": {"bad_words": ((3,), (1, 2), (4, 5, 6), (7, 7))},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (2, 5)},
    "all": {
        **{"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8, "min_tokens": 5},
        **{"bad_words": ((1, 2), (4,)), "stop_token_ids": (9,), "logit_bias": ((0, 1.5),)},
    },
}


def processed_requests(name: str, seed: int) -> list[Request]:
    options = {"temperature": 1.0, "logprobs": None, **PROCESSED[name]}
    return [replace(one, sampling=replace(one.sampling, **options)) for one in scripted_requests(seed)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PROCESSED)
def test_under_strict_processors_see_what_they_see_in_plain_decoding(name: str) -> None:
    """Token for token: row j's penalties, bad words and bans count the drafted tokens before it."""
    for seed in range(4):
        asked = processed_requests(name, seed)
        plain = run(AutoregressivePipeline(ScriptedRunner()), asked)
        runner = ScriptedRunner()
        drafter = GuessingDrafter(runner, random.Random(seed))
        assert run(SpeculativePipeline(runner, drafter, [StrictVerifier()], 5), asked) == plain


class LawChecker:
    """The verifier under it, and for each of its rows a plain loop's law of what follows all tokens before the row."""

    card = VerifierCard("checker", True, "checks laws")
    needs_laws = True
    needs_marginal = needs_states = trees = False

    def __init__(self, inner: Verifier, drafter: AskedDrafter, asked: Sequence[Request]) -> None:
        self._inner = inner
        self._drafter = drafter
        self._asked = {request.id: request for request in asked}
        self.rows = 0

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        assert target.log_probs is not None
        for i, request_id in enumerate(self._drafter.asked):
            request, known = self._asked[request_id], self._drafter.tokens[request_id]
            prompt = list(request.prompt_ids)
            for step in range(proposal.lengths[i] + 1):
                text = [*known, *proposal.tokens[i, :step].tolist()]
                logits = self._drafter.runner._row(len(text) - 1, text[-1]).tolist()
                params = request.sampling
                scores = processed(logits, params, prompt, text[len(prompt) :], request.eos_ids)
                got = target.log_probs[i, step].exp().tolist()
                assert got == pytest.approx(law(scores, params), abs=1e-5), (request_id, step)
                self.rows += 1
        return self._inner.verify(proposal, target)


class AskedDrafter(GuessingDrafter):
    """Remembers whom it was asked for."""

    asked: tuple[str, ...] = ()

    def propose(self, asks: Sequence[DraftAsk], sampler: object = None, width: int = 0) -> DraftProposal:
        self.asked = tuple(ask.request_id for ask in asks)
        return super().propose(asks, sampler, width)


@pytest.mark.parametrize("name", PROCESSED)
def test_laws_are_those_of_step_by_step_decoding(name: str) -> None:
    asked, runner = processed_requests(name, 1), ScriptedRunner()
    drafter = AskedDrafter(runner, random.Random(1))
    checker = LawChecker(RejectionVerifier(), drafter, asked)
    outcomes = run(SpeculativePipeline(runner, drafter, [checker], 5), asked)
    assert checker.rows > 60 and all(finish is not FinishReason.ERROR for *_, finish in outcomes.values())
