"""The speculative pipeline over a scripted model: equal to the plain one, at failures too."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from engine.config import EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.pipelines.autoregressive import AutoregressivePipeline
from engine.pipelines.speculative import SpeculativePipeline
from engine.protocols import DraftAsk, Drafter, DraftProposal, Pipeline, Scalar, TargetRows, Verdict
from engine.registry import VERIFIERS
from engine.runtime.batch import AttentionMode, SeqInput
from engine.types import (
    Capacity,
    FinishReason,
    Request,
    SamplingParams,
    SpeculationParams,
    StepOutput,
    StepPlan,
    TokenLogprob,
)
from engine.verification import VerifierCard
from engine.verifiers.strict import StrictVerifier
from tests.relaxed import verifiers

VOCAB = 11


@dataclass
class ScriptedRunner:
    """Logits are a function of the position and the token there; some rows are no numbers."""

    broken: frozenset[tuple[int, int]] = frozenset()  # (position, token)
    vocab_size: int = VOCAB
    block_size: int = 4
    fed: int = 0
    modes: set[AttentionMode] = field(default_factory=set)

    def compact(self, source: torch.Tensor, target: torch.Tensor) -> None:
        assert AttentionMode.TREE in self.modes, "chains need no compaction"

    def forward(
        self,
        inputs: Sequence[SeqInput],
        rows: Sequence[int],
        mode: AttentionMode = AttentionMode.CAUSAL,
        block_length: int = 1,
    ) -> torch.Tensor:
        self.modes.add(mode)
        cells: list[tuple[int, int]] = []
        for item in inputs:
            positions = range(item.start, item.kv_len) if item.tree is None else item.tree.positions
            cells += zip(positions, item.ids, strict=True)
        self.fed += len(cells)
        return torch.stack([self._row(*cells[row]) for row in rows]) if len(rows) else torch.empty(0, VOCAB)

    def forward_with_states(
        self,
        inputs: Sequence[SeqInput],
        rows: Sequence[int],
        mode: AttentionMode = AttentionMode.CAUSAL,
        block_length: int = 1,
        *,
        read: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.forward(inputs, rows, mode)
        return logits, logits

    def _row(self, position: int, token: int) -> torch.Tensor:
        if (position, token) in self.broken:
            return torch.full((VOCAB,), float("nan"))
        return torch.randn(VOCAB, generator=torch.Generator().manual_seed(position * 31 + token))


@dataclass
class GuessingDrafter:
    """Guesses with one eye on the answer: tokens of the scripted model, some of them changed."""

    runner: ScriptedRunner
    rng: random.Random
    most: int = 8
    scores: bool = False
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def admit(self, request_id: str, tokens: Sequence[int]) -> None:
        self.tokens[request_id] = list(tokens)

    def drop(self, request_id: str) -> None:
        self.tokens.pop(request_id, None)

    def commit(self, request_id: str, tokens: Sequence[int]) -> None:
        self.tokens[request_id] += tokens

    def propose(self, asks: Sequence[DraftAsk], sampler: object = None, width: int = 0) -> DraftProposal:
        drafts = []
        for ask in asks:
            known = list(self.tokens[ask.request_id])
            for _ in range(self.rng.randint(0, ask.limit)):
                best = int(self.runner._row(len(known) - 1, known[-1]).nan_to_num(0.0).argmax())
                known.append(best if self.rng.random() < 0.8 else self.rng.randrange(VOCAB))
            drafts.append(known[len(self.tokens[ask.request_id]) :])
        width = max(map(len, drafts), default=0)
        rows = [[*draft, *([-1] * (width - len(draft)))] for draft in drafts]
        return DraftProposal(torch.tensor(rows).view(len(asks), width), tuple(map(len, drafts)))


@dataclass(frozen=True)
class Done:
    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


@dataclass
class PipelineWorker:
    pipeline: Pipeline

    def capacity(self) -> Capacity:
        return Capacity(64, 4, 128, VOCAB, self.pipeline.traits)

    def prepare(self, request: Request) -> None:
        """Nothing that takes time."""

    def submit(self, plan: StepPlan) -> Done:
        return Done(self.pipeline.execute(plan))

    def num_states(self) -> int:
        return self.pipeline.num_states()

    def close(self) -> None:
        pass


Outcome = tuple[list[int], list[TokenLogprob], FinishReason | None]


def run(pipeline: Pipeline, requests: list[Request], lag: int = 0) -> dict[str, Outcome]:
    core = EngineCore(PipelineWorker(pipeline), EngineConfig(scheduler=SchedulerConfig(lag=lag, max_batched_tokens=40)))
    found: dict[str, Outcome] = {request.id: ([], [], None) for request in requests}
    for request in requests:
        core.add(request)
    while core.has_work():
        for update in core.step().updates:
            tokens, logprobs, _ = found[update.request_id]
            tokens, logprobs = [*tokens, *update.token_ids], [*logprobs, *(update.logprobs or ())]
            found[update.request_id] = (tokens, logprobs, update.finish)
        core.check_integrity()
    core.settle()
    assert pipeline.num_states() == 0
    return found


def requests(seed: int) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            f"r{i}",
            tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))),
            SamplingParams(max_tokens=rng.randint(1, 24), temperature=rng.choice((0.0, 0.5)), seed=i, logprobs=2),
        )
        for i in range(6)
    ]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("seed", range(8))
def test_tokens_and_failures_are_those_of_plain_decoding(seed: int, lag: int) -> None:
    """A row that is no number ends a request at the very token where plain decoding ends it."""
    rng = random.Random(seed)
    broken = frozenset((rng.randrange(4, 30), rng.randrange(VOCAB)) for _ in range(12))
    plain = run(AutoregressivePipeline(ScriptedRunner(broken)), requests(seed))
    runner = ScriptedRunner(broken)
    drafter: Drafter = GuessingDrafter(runner, rng)
    got = run(SpeculativePipeline(runner, drafter, [StrictVerifier()], 5), requests(seed), lag)
    assert got == plain
    assert any(finish is FinishReason.LENGTH for *_, finish in plain.values())


@pytest.mark.parametrize("lag", [0, 1])
def test_steps_without_drafts_are_plain_decoding(lag: int) -> None:
    off = [replace(request, speculation=SpeculationParams(enabled=False)) for request in requests(3)]
    runner = ScriptedRunner()
    pipeline = SpeculativePipeline(runner, GuessingDrafter(runner, random.Random(1)), [StrictVerifier()], 5)
    assert run(pipeline, off, lag) == run(AutoregressivePipeline(ScriptedRunner()), off)


def test_failures_are_met_inside_drafts() -> None:
    """The seeds above would prove little if no broken row ever stood behind an accepted draft."""
    met = 0
    for seed in range(8):
        rng = random.Random(seed)
        broken = frozenset((rng.randrange(4, 30), rng.randrange(VOCAB)) for _ in range(12))
        met += sum(finish is FinishReason.ERROR for *_, finish in run(_pipeline(broken, rng), requests(seed)).values())
    assert met >= 5


def _pipeline(broken: frozenset[tuple[int, int]], rng: random.Random) -> Pipeline:
    runner = ScriptedRunner(broken)
    return SpeculativePipeline(runner, GuessingDrafter(runner, rng), [StrictVerifier()], 5)


class LawReader:
    """A verifier that wants laws: it checks how they are laid out, then verifies strictly."""

    card = VerifierCard("reader", True, "reads laws")
    needs_laws = True
    needs_marginal = needs_states = trees = False

    def __init__(self) -> None:
        self.rows = 0

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        assert target.log_probs is not None
        assert target.log_probs.shape == (*target.draws.shape, VOCAB)
        for i, length in enumerate(proposal.lengths):
            used = target.log_probs[i, : length + 1]
            assert torch.allclose(used.exp().sum(-1), torch.ones(length + 1))
            assert (target.draws[i, length + 1 :] == -1).all()
            likely = used.gather(1, target.draws[i, : length + 1, None])
            assert likely.isfinite().all(), "a draw that its own law excludes"
            self.rows += length + 1
        return StrictVerifier().verify(proposal, target)


def test_verifiers_that_need_them_get_the_laws_of_all_rows() -> None:
    reader, runner = LawReader(), ScriptedRunner()
    pipeline = SpeculativePipeline(runner, GuessingDrafter(runner, random.Random(1)), [reader], 5)
    assert run(pipeline, requests(1)) == run(AutoregressivePipeline(ScriptedRunner()), requests(1))
    assert reader.rows > 60


class ScoringDrafter(GuessingDrafter):
    """It also thinks something of its tokens, whatever: sometimes that is no number, either."""

    scores = True

    def propose(self, asks: Sequence[DraftAsk], sampler: object = None, width: int = 0) -> DraftProposal:
        proposal = super().propose(asks, sampler, width)
        thoughts = torch.rand(proposal.tokens.shape, generator=torch.Generator().manual_seed(self.rng.randrange(99)))
        hidden = torch.where(thoughts > 0.9, float("nan"), thoughts).unsqueeze(2).expand(-1, -1, VOCAB)
        return replace(proposal, marginal=Scalar(hidden[:, :, 0]), hidden=hidden)


@pytest.mark.parametrize("name", VERIFIERS)
def test_no_verifier_writes_behind_a_row_that_is_no_number(name: str) -> None:
    """Such a row ends its request, and no other, where it is reached, whatever was drafted across it."""
    met = 0
    for seed in range(6):
        rng = random.Random(seed)
        broken = frozenset((rng.randrange(4, 30), rng.randrange(VOCAB)) for _ in range(12))
        runner = ScriptedRunner(broken)
        pipeline = SpeculativePipeline(runner, ScoringDrafter(runner, rng), verifiers(name), 5)
        asked = {request.id: request for request in requests(seed)}
        for request_id, (tokens, logprobs, finish) in run(pipeline, list(asked.values()), seed % 2).items():
            text = [*asked[request_id].prompt_ids, *tokens]
            fed = set(enumerate(text[:-1] if finish is FinishReason.LENGTH else text)) - set(
                enumerate(asked[request_id].prompt_ids[:-1])
            )
            assert len(logprobs) == len(tokens) and all(0 <= token < VOCAB for token in tokens)
            if finish is FinishReason.LENGTH:
                assert not fed & broken
            else:
                assert finish is FinishReason.ERROR and fed & broken == {(len(text) - 1, text[-1])}
                met += 1
    assert met >= 3
