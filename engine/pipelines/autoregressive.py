"""Plain autoregressive decoding: feed what is not computed, draw one token where a sequence's end was reached."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.protocols import ForwardRunner
from engine.runtime.batch import SeqInput
from engine.runtime.sampler import Sampler, SamplingState, prompt_logprobs
from engine.types import Admission, DecodeTraits, ScheduledSeq, SeqResult, StepOutput, StepPlan, TokenLogprob

FAILED = "the model's output for this request is not a number, or every token is banned"


@dataclass(slots=True, eq=False)
class SeqState:
    """Device-side truth of one request: it may be a step ahead of what the scheduler knows."""

    admission: Admission
    tokens: list[int]  # prompt and output
    sampling: SamplingState
    num_computed: int = 0

    @property
    def prompt_len(self) -> int:
        return len(self.admission.request.prompt_ids)


@dataclass(slots=True, eq=False)
class Share:
    """One sequence's part of the running step."""

    item: ScheduledSeq
    state: SeqState
    input: SeqInput
    first_row: int  # of its packed rows
    samples: bool  # the step reaches the end of its tokens
    scored: range = field(default_factory=lambda: range(0))  # its rows whose successor is a prompt token to report


class AutoregressivePipeline:
    """See `protocols.Pipeline`. One target pass and one token a step for every sequence that is not prefilling."""

    traits = DecodeTraits(lookahead=0, chunkable=True, prefix_cacheable=True)

    def __init__(self, runner: ForwardRunner) -> None:
        self._runner = runner
        self._sampler = Sampler(runner.vocab_size)
        self._states: dict[str, SeqState] = {}

    def num_states(self) -> int:
        return len(self._states)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        for request_id in plan.dropped:
            self._states.pop(request_id, None)
        for admission in plan.admitted:
            request = admission.request
            tokens = [*request.prompt_ids, *admission.output_ids]
            self._states[request.id] = SeqState(admission, tokens, SamplingState(request, admission.output_ids))
        shares = self._shares(plan)
        # With results a step late, a sequence whose draw failed is planned once more: it has nothing to feed.
        fed = {share.item.request_id for share in shares}
        idle = [item for item in plan.items if item.request_id not in fed]
        void = tuple(SeqResult(item.request_id, (), item.start, error=FAILED) for item in idle)
        if not shares:
            return StepOutput(plan.step, void)
        last = [share.first_row + len(share.input.ids) - 1 for share in shares if share.samples]
        scored = [share.first_row + row for share in shares for row in share.scored]
        logits = self._runner.forward([share.input for share in shares], [*last, *scored])
        prompts = self._prompt_logprobs(shares, logits[len(last) :])
        return StepOutput(plan.step, (*self._sample(shares, logits[: len(last)], prompts), *void))

    def _shares(self, plan: StepPlan) -> list[Share]:
        shares, row = [], 0
        for item in plan.items:
            state = self._states[item.request_id]
            start = state.num_computed if item.pending else item.start
            ids = state.tokens[start:] if item.pending else item.tokens
            if not ids:
                continue
            end = start + len(ids)
            share = Share(item, state, SeqInput(ids, start, item.block_ids, end), row, end == len(state.tokens))
            if state.admission.request.sampling.prompt_logprobs is not None and start < state.prompt_len - 1:
                share.scored = range(min(end, state.prompt_len - 1) - start)
            shares.append(share)
            row += len(ids)
        return shares

    def _prompt_logprobs(self, shares: list[Share], logits: torch.Tensor) -> dict[str, tuple[TokenLogprob, ...]]:
        found, row = {}, 0
        for share in shares:
            if not share.scored:
                continue
            start, size = share.input.start, len(share.scored)
            following = torch.tensor(share.state.tokens[start + 1 : start + 1 + size], device=logits.device)
            wanted = share.state.admission.request.sampling.prompt_logprobs or 0
            found[share.item.request_id] = tuple(prompt_logprobs(logits[row : row + size], following, wanted))
            row += size
        return found

    def _sample(
        self, shares: list[Share], logits: torch.Tensor, prompts: dict[str, tuple[TokenLogprob, ...]]
    ) -> list[SeqResult]:
        drawing = [share for share in shares if share.samples]
        tokens: list[int] = []
        failed: list[bool] = []
        logprobs: list[TokenLogprob | None] = []
        if drawing:
            wanted = [share.state.admission.request.sampling.logprobs for share in drawing]
            sampled = self._sampler.sample(logits, [share.state.sampling for share in drawing], wanted)
            tokens, failed, logprobs = sampled.tokens.tolist(), sampled.failed.tolist(), list(sampled.logprobs)
        results, drawn = [], 0
        for share in shares:
            state, end = share.state, share.input.kv_len
            state.num_computed = end
            request_id, prompt = share.item.request_id, prompts.get(share.item.request_id)
            if not share.samples:
                results.append(SeqResult(request_id, (), end, prompt_logprobs=prompt))
                continue
            token, bad, logprob = tokens[drawn], failed[drawn], logprobs[drawn]
            drawn += 1
            if bad:
                results.append(SeqResult(request_id, (), end, error=FAILED))
                continue
            state.tokens.append(token)
            state.sampling.push(token)
            results.append(
                SeqResult(request_id, (token,), end, None if logprob is None else (logprob,), prompt_logprobs=prompt)
            )
        return results
