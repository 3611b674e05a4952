"""Masked diffusion: one denoise step of every request's open block per engine step.

Cache and rule are choices of the request, independent of each other. With full attention the caches are Fast-dLLM's:
a block begins with a whole pass, and later ones see the KV of what they don't feed as it was then ("none" is exact and
has whole passes only). Block-causal models have an exact KV by nature: a closed block's becomes final in the very pass
that denoises the next block for the first time.

Requests at different blocks, in different phases, with any cache and rule share one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine.diffusion import DiffusionSpec
from engine.pipelines.canvas import CanvasTable
from engine.pipelines.commits import choose, commit, parts, report
from engine.pipelines.denoise import Denoiser
from engine.pipelines.feeds import Feed, feed, mode_of, wanted_rows
from engine.pipelines.readings import CanvasReader
from engine.pipelines.states import FAILED
from engine.protocols import ForwardRunner, UnmaskRule
from engine.types import DecodeTraits, Passes, SeqResult, StepOutput, StepPlan

FULL = "the canvas of this request is full, but its answer has not ended"


class MaskedDiffusionPipeline:
    """See `protocols.Pipeline`."""

    def __init__(self, runner: ForwardRunner, spec: DiffusionSpec, rules: Mapping[str, UnmaskRule]) -> None:
        self._runner = runner
        self._spec = spec
        self._denoiser = Denoiser(runner.vocab_size, spec)
        self._rules = dict(rules)
        self._table = CanvasTable(spec, self._rules)
        self._reader = CanvasReader(runner, spec, runner.vocab_size)

    @property
    def traits(self) -> DecodeTraits:
        grows = self._spec.block_causal
        return DecodeTraits(
            lookahead=self._spec.block_length,
            chunkable=grows,
            prefix_cacheable=grows,
            denoises=True,
            unit=self._spec.block_length if grows else 1,
            canvas=not grows,
        )

    def num_states(self) -> int:
        return len(self._table) + len(self._reader)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        self._table.enter(plan)
        self._reader.enter(plan)
        read, items = self._reader.execute(plan)
        feeds = [feed(self._table[item.request_id], item) for item in items]
        return StepOutput(plan.step, (*read, *self._denoise(feeds)) if feeds else read)

    def _denoise(self, feeds: Sequence[Feed]) -> list[SeqResult]:
        """One pass for all of them, and what it commits."""
        inputs = [part.input() for part in feeds]
        mode = mode_of(self._spec.block_causal)
        logits = self._runner.forward(inputs, wanted_rows(feeds), mode, self._spec.block_length)
        scored = [part for part in feeds if len(part.candidates)]
        if not scored:
            return [*map(idle_result, feeds)]
        scores = self._denoiser.score(logits, scored)
        taken = choose(scored, scores)
        report(scored, logits, scores, taken)
        commit(scored, scores, taken)
        results = [_result(part) if scores.sound(at) else failed_result(part) for part, at in parts(scored)]
        return [*results, *(idle_result(part) for part in feeds if not len(part.candidates))]


def _result(part: Feed) -> SeqResult:
    """After a step that committed something, and opens the next block where it closed one."""
    canvas = part.canvas
    start, closed = canvas.block.start, not canvas.block.left
    new, logprobs = canvas.hand_over()
    if closed:
        canvas.advance()
    if not canvas.spec.block_causal and (closed or canvas.cache == "none"):
        start = 0  # goes on with a whole pass
    return SeqResult(part.item.request_id, new, start, logprobs, passes=passes(part), canvas=canvas.take_changes())


def idle_result(part: Feed) -> SeqResult:
    """Of a feed in which nothing can be denoised: tokens of closed blocks, or a canvas without room for an answer."""
    done = part.canvas.spec.block_causal or part.canvas.request.sampling.max_tokens == 0
    return SeqResult(part.item.request_id, (), part.stop, passes=passes(part), error=None if done else FULL)


def failed_result(part: Feed) -> SeqResult:
    return SeqResult(part.item.request_id, (), part.item.start, passes=passes(part), error=FAILED)


def passes(part: Feed) -> Passes:
    return Passes(forwards=1, positions=part.stop - part.start)
