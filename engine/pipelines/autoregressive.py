"""Plain autoregressive decoding: feed what is not computed, draw one token where a sequence's end was reached."""

from __future__ import annotations

import torch

from engine.pipelines.states import FAILED, Share, StateTable, first_rows, prompt_scores
from engine.protocols import ForwardRunner
from engine.runtime.sampler import Sampler
from engine.types import DecodeTraits, SeqResult, StepOutput, StepPlan, TokenLogprob


class AutoregressivePipeline:
    """See `protocols.Pipeline`. One target pass and one token a step for every sequence that is not prefilling."""

    traits = DecodeTraits(lookahead=0, chunkable=True, prefix_cacheable=True)

    def __init__(self, runner: ForwardRunner) -> None:
        self._runner = runner
        self._sampler = Sampler(runner.vocab_size)
        self._states = StateTable()

    def num_states(self) -> int:
        return len(self._states)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        self._states.enter(plan)
        shares, void = self._states.shares(plan)
        if not shares:
            return StepOutput(plan.step, void)
        inputs = [share.input() for share in shares]
        first = first_rows(inputs)
        last = [row + len(share.ids) - 1 for row, share in zip(first, shares, strict=True) if share.samples]
        scored = [row + offset for row, share in zip(first, shares, strict=True) for offset in share.scored]
        logits = self._runner.forward(inputs, [*last, *scored])
        prompts = prompt_scores(shares, logits[len(last) :])
        return StepOutput(plan.step, (*self._sample(shares, logits[: len(last)], prompts), *void))

    def _sample(
        self, shares: list[Share], logits: torch.Tensor, prompts: dict[str, tuple[TokenLogprob, ...]]
    ) -> list[SeqResult]:
        states = [share.state.sampling for share in shares if share.samples]
        tokens: list[int] = []
        failed: list[bool] = []
        logprobs: list[TokenLogprob | None] = []
        if states:
            sampled = self._sampler.sample(logits, states, [state.sampling.logprobs for state in states])
            tokens, failed, logprobs = sampled.tokens.tolist(), sampled.failed.tolist(), list(sampled.logprobs)
        results, drawn = [], 0
        for share in shares:
            state, end = share.state, share.end
            request_id, prompt = share.item.request_id, prompts.get(share.item.request_id)
            if not share.samples:
                state.commit((), end)
                results.append(SeqResult(request_id, (), end, prompt_logprobs=prompt))
                continue
            token, bad, logprob = tokens[drawn], failed[drawn], logprobs[drawn]
            drawn += 1
            state.commit(() if bad else (token,), end)
            if bad:
                results.append(SeqResult(request_id, (), end, error=FAILED))
                continue
            results.append(
                SeqResult(request_id, (token,), end, None if logprob is None else (logprob,), prompt_logprobs=prompt)
            )
        return results
