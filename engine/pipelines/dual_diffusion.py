"""DualDiffusion: some steps of a fast drafter, then one step of a rigorous verifier (arXiv 2604.05250).

In one form a model drafts for itself: denoise steps over its dual cache are cheap, and one exact pass over the whole
canvas verifies, whose KV is the next cache. In the other the drafter is a model of its own with the same tokens,
block-causal or not, over the same block table; the served model then keeps no cache. What a verify step lets stand is
final, and what it commits of the masks is, too; each of them makes at least one token final, so a block of b tokens
takes b of them at most. Tokens leave in closed blocks, for those of the open one may still change; earlier only where
an end token is final, and all before it.

All requests of a step share one pass of each model, whatever they are at; masked copies, which need masks of their
own, take another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from engine.diffusion import DiffusionSpec
from engine.errors import ConfigError
from engine.pipelines.commits import choose, commit, parts, report
from engine.pipelines.denoise import Denoiser
from engine.pipelines.masked_diffusion import FULL
from engine.pipelines.opinions import Reviewer, report_placed
from engine.pipelines.readings import CanvasReader
from engine.pipelines.states import FAILED, first_rows
from engine.pipelines.turns import Drafting, Kind, Models, Turn
from engine.pipelines.verifying import Opinion, judge
from engine.protocols import ForwardRunner, UnmaskRule
from engine.runtime.batch import AttentionMode
from engine.types import DecodeTraits, ScheduledSeq, SeqResult, StepOutput, StepPlan


class DualDiffusionPipeline:
    """See `protocols.Pipeline`."""

    def __init__(
        self,
        runner: ForwardRunner,
        spec: DiffusionSpec,
        rules: Mapping[str, UnmaskRule],
        drafter: ForwardRunner | None = None,
        drafter_spec: DiffusionSpec | None = None,
    ) -> None:
        """`drafter`: a model of its own, with the token ids of the served one, and a pool of the same block ids.

        Raises ConfigError where the two don't fit, or the served model has nothing to verify with.
        """
        assert (drafter is None) == (drafter_spec is None)
        _check(runner, spec, drafter, drafter_spec)
        self._models = Models(spec, drafter_spec, runner.block_size)
        self._runner = runner
        self._drafter = drafter
        self._rules = rules
        sizes = [runner.vocab_size, *([drafter.vocab_size] if drafter is not None else [])]
        self._vocab_size = min(sizes)  # one of them may be padded
        self._denoiser = Denoiser(self._vocab_size, spec)
        self._draft_denoiser = Denoiser(self._vocab_size, drafter_spec or spec)
        self._reviewer = Reviewer(self._vocab_size, spec)
        self._reader = CanvasReader(runner, spec, self._vocab_size)
        self._states: dict[str, Drafting] = {}

    @property
    def traits(self) -> DecodeTraits:
        spec = self._models.drafting
        unit = spec.block_length if spec.block_causal else 1
        return DecodeTraits(
            lookahead=spec.block_length,
            chunkable=False,
            prefix_cacheable=False,
            denoises=True,
            unit=unit,
            canvas=True,
        )

    def num_states(self) -> int:
        return len(self._states) + len(self._reader)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        self._enter(plan)
        turns, results = [], []
        read, items = self._reader.execute(plan)
        for item in items:
            state = self._states[item.request_id]
            block = state.canvas.block
            if block.start < block.stop:
                turns.append(state.turn(item))
            else:
                results.append(_full(state, item))
        for together in _shared(turns):
            self._run(together)
        return StepOutput(plan.step, (*read, *results, *map(_result, turns)))

    def _enter(self, plan: StepPlan) -> None:
        for request_id in plan.dropped:
            self._states.pop(request_id, None)
        self._reader.enter(plan)
        for admission in plan.admitted:
            request = admission.request
            if request.reading is not None:
                continue  # it has nothing to fill
            rule = self._rules[request.diffusion.rule or self._models.drafting.rule]
            self._states[request.id] = Drafting(request, admission.output_ids, self._models, rule)

    def _run(self, turns: Sequence[Turn]) -> None:
        """One pass for all of them, and what comes of it."""
        served, mode = turns[0].served, turns[0].mode
        inputs = [turn.input for turn in turns]
        first = first_rows(inputs)
        rows = [row + start for turn, start in zip(turns, first, strict=True) for row in turn.rows]
        asked = [row + start for turn, start in zip(turns, first, strict=True) for row in turn.asked_rows]
        runner = self._runner if served or self._drafter is None else self._drafter
        logits = runner.forward(inputs, [*rows, *asked], mode, self._models.drafting.block_length)
        logits = logits[:, : self._vocab_size]
        logits[:, self._models.served.mask_id] = float("-inf")
        sizes = torch.tensor([len(turn.rows) for turn in turns])
        self._verify([turn for turn in turns if turn.kind is Kind.VERIFY], logits[len(rows) :])
        scored = logits[: len(rows)]
        going_on = torch.tensor([bool(turn.rows) for turn in turns])
        if not bool((going_on | (sizes == 0)).all()):  # some were to begin a block that has not come yet
            scored = scored[going_on.repeat_interleave(sizes).to(logits.device)]
        self._denoise([turn for turn in turns if turn.rows], scored, self._denoiser if served else self._draft_denoiser)
        for turn in turns:
            if not turn.failed:
                turn.state.settle(turn)

    def _verify(self, turns: Sequence[Turn], logits: Tensor) -> None:
        """`logits`: of what the turns ask about."""
        placed: list[list[Opinion]] = []
        for turn, opinions in zip(turns, self._reviewer.opinions(turns, logits), strict=True):
            if turn.failed:
                turn.rows = []
                placed.append([])
                continue
            state, progress = turn.state, bool(turn.rows) and not turn.ahead
            again = state.never_again()
            verdict = judge(state.verify, state.least, opinions, progress=progress, never_again=again)
            placed.append(state.judged(turn, verdict, opinions))
        report_placed(turns, placed, logits)

    def _denoise(self, turns: Sequence[Turn], logits: Tensor, denoiser: Denoiser) -> None:
        """`logits`: of the turns' candidates."""
        if not turns:
            return
        feeds = [turn.feed for turn in turns]
        steps = [feed.canvas.block.step for feed in feeds]
        scores = denoiser.score(logits, feeds)
        taken = choose(feeds, scores)
        report(feeds, logits, scores, taken)
        commit(feeds, scores, taken)
        for turn, step, (feed, at) in zip(turns, steps, parts(feeds), strict=True):
            turn.failed = not scores.sound(at)
            turn.state.denoised(turn, feed.candidates[taken[at]], step)


def _check(
    runner: ForwardRunner, spec: DiffusionSpec, drafter: ForwardRunner | None, drafter_spec: DiffusionSpec | None
) -> None:
    """Raises ConfigError where dual_diffusion can't be had with these models."""
    if spec.block_causal:
        raise ConfigError(
            "dual_diffusion verifies with a full-attention model, which sees what follows a token; this one is "
            "block-causal: its cache is exact, so that a verify pass would tell nothing new (it may be the drafter)"
        )
    if drafter is None or drafter_spec is None:
        return
    if drafter_spec.mask_id != spec.mask_id:
        raise ConfigError(
            f"diffusion.drafter: its mask is token {drafter_spec.mask_id}, the served model's is {spec.mask_id}; "
            "the two must share their tokenizer"
        )
    if drafter.block_size != runner.block_size:
        raise ConfigError(
            f"diffusion.drafter: its KV blocks hold {drafter.block_size} tokens, the served model's "
            f"{runner.block_size}; the two share their block table"
        )


def _shared(turns: Sequence[Turn]) -> Iterable[list[Turn]]:
    """Those that can share a pass: of one model, in one mode."""
    groups: dict[tuple[bool, AttentionMode], list[Turn]] = {}
    for turn in turns:
        groups.setdefault((turn.served, turn.mode), []).append(turn)
    return groups.values()


def _result(turn: Turn) -> SeqResult:
    request_id, passes = turn.feed.item.request_id, turn.passes()
    if turn.failed:
        return SeqResult(request_id, (), turn.feed.item.start, passes=passes, error=FAILED)
    new = tuple(chain.from_iterable(tokens for tokens, _ in turn.closed))
    logprobs = None
    if turn.state.canvas.request.sampling.logprobs is not None:
        logprobs = tuple(chain.from_iterable(entries or () for _, entries in turn.closed))
    changes = turn.state.canvas.take_changes()
    return SeqResult(request_id, new, turn.state.start(), logprobs, passes=passes, canvas=changes)


def _full(state: Drafting, item: ScheduledSeq) -> SeqResult:
    """Nothing can be denoised: no answer is asked for, or it has not ended with its canvas."""
    error = None if state.canvas.request.sampling.max_tokens == 0 else FULL
    return SeqResult(item.request_id, (), item.start + len(item.tokens), error=error)
