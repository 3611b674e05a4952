"""A target small enough to enumerate, drafts for it, and a driver: what a pipeline writes can be compared by its law.

The target writes segments of `LENGTH` tokens out of `VOCAB`; a token's law depends on all tokens of its segment, and on
nothing else. So a long answer is a row of independent segments, however its rounds lie across them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.protocols import Delta, Dense, DraftAsk, DraftProposal, DraftSampler, Pipeline, Scalar
from engine.runtime.batch import AttentionMode, SeqInput
from engine.types import (
    Admission,
    Capacity,
    FinishReason,
    Request,
    SamplingParams,
    ScheduledSeq,
    SeqResult,
    StepOutput,
    StepPlan,
    TokenLogprob,
    VerifierStats,
)

VOCAB = 3
LENGTH = 4
STARTS = [sum(VOCAB**i for i in range(length)) for length in range(LENGTH + 1)]  # of the contexts of each length
BLOCK = 4


def context(tokens: Sequence[int]) -> int:
    """Which row of the tables follows these tokens, from the first of the sequence on."""
    code, open_ = 0, tokens[len(tokens) - len(tokens) % LENGTH :]
    for token in open_:
        code = code * VOCAB + token
    return STARTS[len(open_)] + code


def _following() -> Tensor:
    """[contexts, VOCAB]: the context after each token."""
    table = torch.zeros(STARTS[LENGTH], VOCAB, dtype=torch.int64)
    for length in range(LENGTH - 1):
        for tokens in itertools.product(range(VOCAB), repeat=length + 1):
            table[context(tokens[:-1]), tokens[-1]] = context(tokens)
    return table


@dataclass
class Segments:
    """Logits [contexts, VOCAB] of the target, and of a draft that is somewhat like it."""

    seed: int = 0
    target: Tensor = field(init=False)
    draft: Tensor = field(init=False)
    following: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        laws = rng.dirichlet(np.full(VOCAB, 0.7), STARTS[LENGTH]) + 1e-3
        other = 0.4 * laws + 0.6 * rng.dirichlet(np.full(VOCAB, 0.7), STARTS[LENGTH])
        self.target = torch.tensor(laws).log().float()
        self.draft = torch.tensor(other).log().float()
        self.following = _following()

    def law(self, shaped: Callable[[Tensor], Tensor] = lambda logits: logits.softmax(-1)) -> list[float]:
        """Of all segments in lexical order; `shaped` gives the probabilities of rows of logits."""
        rows = shaped(self.target.double())
        found = []
        for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
            chance = 1.0
            for place, token in enumerate(tokens):
                chance *= float(rows[context(tokens[:place]), token])
            found.append(chance)
        return found

    @cached_property
    def marginals(self) -> Tensor:
        """[LENGTH, VOCAB] logits of the target's token at each place of a segment, whatever comes before it."""
        law = torch.tensor(self.law()).view((VOCAB,) * LENGTH)
        sums = [law.sum([axis for axis in range(LENGTH) if axis != place]) for place in range(LENGTH)]
        return torch.stack(sums).log().float()


@dataclass
class SegmentRunner:
    """See `protocols.ForwardRunner`. It knows of earlier tokens only what it finds in its slots."""

    segments: Segments
    vocab_size: int = VOCAB
    block_size: int = BLOCK
    slots: dict[tuple[int, int], int] = field(default_factory=dict)

    def compact(self, source: Tensor, target: Tensor) -> None:
        raise AssertionError("chains need no compaction")

    def forward(
        self,
        inputs: Sequence[SeqInput],
        rows: Sequence[int],
        mode: AttentionMode = AttentionMode.CAUSAL,
        block_length: int = 1,
    ) -> Tensor:
        contexts: list[int] = []
        for item in inputs:
            first = item.start - item.start % LENGTH
            places = [(item.block_ids[at // BLOCK], at % BLOCK) for at in range(first, item.start + len(item.ids))]
            self.slots.update(zip(places[item.start - first :], item.ids, strict=True))
            seen = [self.slots[place] for place in places]
            contexts += [context(seen[: at + 1]) for at in range(item.start - first, len(seen))]
        return self.segments.target[torch.tensor(contexts)[list(rows)]]

    def forward_with_states(
        self,
        inputs: Sequence[SeqInput],
        rows: Sequence[int],
        mode: AttentionMode = AttentionMode.CAUSAL,
        block_length: int = 1,
        *,
        read: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The states are the logits."""
        logits = self.forward(inputs, rows, mode)
        return logits, logits


@dataclass
class SegmentDrafter:
    """See `protocols.Drafter`. `kind`: one after another by the tokens before (chain), or each alone (marginals).

    Hidden states are the logits. `cut` shortens drafts: by margins, which is fair, or by the probability of the token
    that was drawn, which is not.
    """

    segments: Segments
    kind: str = "chain"
    cut: str = ""
    most: int = 3
    scores: bool = True
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def admit(self, request_id: str, tokens: Sequence[int]) -> None:
        self.tokens[request_id] = list(tokens)

    def drop(self, request_id: str) -> None:
        self.tokens.pop(request_id, None)

    def commit(self, request_id: str, tokens: Sequence[int]) -> None:
        self.tokens[request_id] += tokens

    def propose(self, asks: Sequence[DraftAsk], sampler: DraftSampler | None = None, width: int = 0) -> DraftProposal:
        most, n = max(ask.limit for ask in asks), len(asks)
        known = [self.tokens[ask.request_id] for ask in asks]
        at = torch.tensor([context(tokens) for tokens in known])
        place, marginals = torch.tensor([len(tokens) for tokens in known]), self.segments.marginals
        warmth = torch.tensor([[ask.temperature] for ask in asks])
        drawn: list[Tensor] = []
        laws: list[Tensor] = []
        rows: list[Tensor] = []
        for step in range(most):
            logits = self.segments.draft[at] if self.kind == "chain" else marginals[(place + step) % LENGTH]
            tokens, law = logits.argmax(1), logits.softmax(1)
            if sampler is not None:
                tokens, law = sampler.draw(logits, range(n), (step,) * n)
            drawn, laws, rows = [*drawn, tokens], [*laws, law], [*rows, logits]
            at = self.segments.following[at, tokens]
        chains, probs, hidden = torch.stack(drawn, 1), torch.stack(laws, 1), torch.stack(rows, 1)
        best = hidden.topk(2, dim=2).values
        gaps = best[:, :, 0] - best[:, :, 1]
        own = (hidden / warmth.unsqueeze(2)).softmax(2).gather(2, chains.unsqueeze(2)).squeeze(2)
        marginal = Scalar(own.where(warmth > 0, 0.0)) if warmth.any() else None
        limits = torch.tensor([ask.limit for ask in asks])
        keep = torch.arange(most) < limits.unsqueeze(1)
        if self.cut:
            drawn_with = probs.gather(2, chains.unsqueeze(2)).squeeze(2)
            keep &= gaps > 0.7 if self.cut == "margin" else drawn_with > 0.4
        lengths = keep.long().cumprod(1).sum(1)
        chains = chains.masked_fill(torch.arange(most) >= lengths.unsqueeze(1), -1)
        law_of = Delta() if sampler is None else Dense(probs)
        return DraftProposal(chains, tuple(lengths.tolist()), law_of, marginal, hidden, margins=gaps)


def requests(n: int, length: int = 24, prompt: int = LENGTH, **sampling: object) -> list[Request]:
    """n requests of different seeds."""
    return [
        Request(f"r{i}", (0,) * prompt, SamplingParams(max_tokens=length, seed=i, **sampling))  # type: ignore[arg-type]
        for i in range(n)
    ]


def decode(
    pipeline: Pipeline, asked: Sequence[Request], lookahead: Sequence[int] = (3,)
) -> tuple[dict[str, list[int]], list[SeqResult]]:
    """Outputs of at least max_tokens, and all results, with no scheduler between: every request is in every step.

    `lookahead`: granted in turn, to all.
    """
    written = {request.id: list(request.prompt_ids) for request in asked}
    computed = dict.fromkeys(written, 0)
    wanted = {request.id: len(request.prompt_ids) + request.sampling.max_tokens for request in asked}
    blocks = (max(wanted.values()) + 8) // BLOCK + 1
    table = {name: tuple(range(i * blocks, (i + 1) * blocks)) for i, name in enumerate(written)}
    admitted, step = tuple(Admission(request, ()) for request in asked), 0
    results: list[SeqResult] = []
    while any(len(written[name]) < wanted[name] for name in written):
        granted = lookahead[step % len(lookahead)]
        items = tuple(
            ScheduledSeq(name, computed[name], tuple(tokens[computed[name] :]), granted, table[name])
            for name, tokens in written.items()
            if len(tokens) < wanted[name]
        )
        output = pipeline.execute(StepPlan(step, items, admitted))
        for result in output.results:
            assert result.error is None
            written[result.request_id] += result.new_tokens
            computed[result.request_id] = result.num_computed
        admitted, results, step = (), [*results, *output.results], step + 1
    return {request.id: written[request.id][len(request.prompt_ids) :] for request in asked}, results


@dataclass(frozen=True)
class Done:
    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


@dataclass
class PipelineWorker:
    """See `protocols.Worker`: a pipeline over a pool of so many blocks."""

    pipeline: Pipeline
    num_blocks: int = 512

    def capacity(self) -> Capacity:
        return Capacity(self.num_blocks, BLOCK, 128, VOCAB, self.pipeline.traits)

    def prepare(self, request: Request) -> None:
        """Nothing that takes time."""

    def submit(self, plan: StepPlan) -> Done:
        return Done(self.pipeline.execute(plan))

    def num_states(self) -> int:
        return self.pipeline.num_states()

    def close(self) -> None:
        pass


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    drafted: int = 0
    accepted: int = 0
    bias: list[float] = field(default_factory=list)
    preemptions: int = 0


def serve(
    pipeline: Pipeline,
    asked: Sequence[Request],
    num_blocks: int = 512,
    lag: int = 0,
    stats: dict[str, VerifierStats] | None = None,
) -> dict[str, Answer]:
    """The requests' answers through the engine's core; every block and state is given back.

    `stats` gains what was told of each verifier's rounds.
    """
    config = EngineConfig(scheduler=SchedulerConfig(lag=lag))
    core = EngineCore(PipelineWorker(pipeline, num_blocks), config)
    found = {request.id: Answer() for request in asked}
    for request in asked:
        core.add(request)
    while core.has_work():
        for update in core.step().updates:
            answer = found[update.request_id]
            assert update.error is None and answer.finish is None
            answer.tokens += update.token_ids
            answer.logprobs += update.logprobs or ()
            answer.finish = update.finish
            answer.drafted += update.drafted
            answer.accepted += update.accepted
            answer.bias += update.bias or (0.0,) * len(update.token_ids)
            answer.preemptions = update.preemptions
        core.check_integrity()
    core.settle()
    assert pipeline.num_states() == 0
    if stats is not None:
        stats.update({each.name: each for each in core.stats().verifiers})
    return found


def segment_counts(outputs: dict[str, list[int]], prompt: int = LENGTH) -> list[int]:
    """How often each whole segment was written, in lexical order."""
    counts = [0] * VOCAB**LENGTH
    skipped = -prompt % LENGTH
    for tokens in outputs.values():
        for start in range(skipped, len(tokens) - LENGTH + 1, LENGTH):
            code = 0
            for token in tokens[start : start + LENGTH]:
                code = code * VOCAB + token
            counts[code] += 1
    return counts
