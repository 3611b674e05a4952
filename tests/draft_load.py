"""Streams that are drafted for, simulated with the real controls and costs from a table instead of a clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.pipelines.survival import LengthChoice, SurvivalEstimator, foreseen
from engine.scheduling.drafting import DraftControl
from engine.types import (
    Capacity,
    CostTable,
    DecodeTraits,
    Request,
    SamplingParams,
    ScheduledSeq,
    SeqResult,
    Sequence,
    StepOutput,
)

# Of a small model on two cores, in seconds.
STEPS = ((1, 0.014), (2, 0.014), (4, 0.016), (8, 0.020), (16, 0.032), (32, 0.054), (64, 0.098))
DRAFTS = ((1, 0.002), (8, 0.004), (32, 0.010))
LONGEST = 7
CAPACITY = Capacity(4096, 16, 4096, 100, DecodeTraits(lookahead=LONGEST, drafts=True), STEPS, "", DRAFTS)

Rate = Callable[["Load", Sequence], float]  # the mean chance of a drafted token to stand, here and now


class Rows(list[list[float]]):
    """Margins, as the estimator reads them."""

    def tolist(self) -> list[list[float]]:
        return self


@dataclass
class Load:
    """`streams` sequences, each followed by a new one when it has `length` tokens.

    `spread`: how much positions differ in their chances, which their margins tell. `always`: draft for everyone.
    """

    streams: int
    rate: Rate
    spread: float = 0.0
    always: bool = False
    length: int = 128
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    seconds: float = 0.0
    plain: float = 0.0  # seconds that the same tokens would have cost without drafts
    steps: int = 0
    passes: int = 0

    def __post_init__(self) -> None:
        self.control = DraftControl(CAPACITY)
        self._estimator, self._choice = SurvivalEstimator(), LengthChoice(STEPS, DRAFTS)
        self._costs, self._drafts = CostTable(STEPS), CostTable(DRAFTS)
        self._started = 0
        self._seqs = [self._start(self.rng.randint(1, self.length)) for _ in range(self.streams)]

    @property
    def speed(self) -> float:
        """Over plain decoding."""
        return self.plain / self.seconds

    def run(self, plain_steps: int) -> Load:
        """Until as many tokens are made as plain decoding makes in so many steps."""
        end = self.plain + plain_steps * self._costs.seconds(self.streams)
        while self.plain < end:
            self.step()
        return self

    def step(self) -> list[int]:
        """One step; what was granted."""
        count = len(self._seqs)
        grants = self.control.grants([(seq, 1) for seq in self._seqs], count)
        if self.always:
            grants = [min(LONGEST, seq.limit - seq.num_tokens - 1) for seq in self._seqs]
        drafts = [self._draft(self.rate(self, seq)) for seq in self._seqs]
        margins = Rows(row for row, _ in drafts)
        chances = self._estimator.chances(margins, grants)  # type: ignore[arg-type]
        lengths = self._choice.choose(chances, count)
        items, results = [], []
        for seq, grant, length, row, (_, truth) in zip(self._seqs, grants, lengths, chances, drafts, strict=True):
            stood = next((i for i in range(length) if self.rng.random() >= truth[i]), length)
            items.append(ScheduledSeq(seq.request.id, 0, (1,), grant, ()))
            missed = foreseen(row, length, stood)
            results.append(
                SeqResult(seq.request.id, (1,) * (stood + 1), 1, drafted=length, accepted=stood, foreseen=missed)
            )
        self._estimator.observe(margins, lengths, [result.accepted for result in results])  # type: ignore[arg-type]
        self._account(items, results)
        return grants

    def _account(self, items: list[ScheduledSeq], results: list[SeqResult]) -> None:
        self.control.settle(items, StepOutput(self.steps, tuple(results)))
        for place, (seq, item, result) in enumerate(zip(self._seqs, items, results, strict=True)):
            self.control.observe(seq, item, result)
            seq.output_ids.extend(result.new_tokens)
            if seq.num_tokens >= seq.limit:
                self._seqs[place] = self._start(self.length)
        count, width = len(items), sum(item.lookahead > 0 for item in items)
        self.seconds += self._costs.seconds(count + sum(result.drafted for result in results))
        self.seconds += self._drafts.seconds(width) if width else 0.0
        self.plain += sum(len(r.new_tokens) for r in results) * self._costs.seconds(count) / count
        self.steps += 1
        self.passes += width > 0

    def _start(self, length: int) -> Sequence:
        self._started += 1
        request = Request(f"{self._started}", (1,), SamplingParams(max_tokens=length))
        return Sequence(request, limit=1 + length)

    def _draft(self, rate: float) -> tuple[list[float], list[float]]:
        """Margins and true chances of one draft's positions."""
        odds = [self.rng.gauss(math.log(rate / (1.0 - rate)), self.spread) for _ in range(LONGEST)]
        return [2.0 + value for value in odds], [1.0 / (1.0 + math.exp(-value)) for value in odds]
