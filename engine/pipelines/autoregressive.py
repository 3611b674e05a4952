"""Plain autoregressive decoding: feed what is not computed, draw one token where a sequence's end was reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

import torch

from engine.pipelines.readings import forward, readout_of, wanted_of
from engine.pipelines.states import SeqState, Share, StateTable, first_rows, prompt_scores
from engine.protocols import ForwardRunner
from engine.runtime.sampler import Sampler
from engine.structured.grammars import Grammars
from engine.types import DecodeTraits, SeqResult, StepOutput, StepPlan, TokenLogprob

Drawn = tuple[int, bool, TokenLogprob | None]  # a token, whether it is none, and its log-probability if it is wanted


class AutoregressivePipeline:
    """See `protocols.Pipeline`. One target pass and one token a step for every sequence that is not prefilling."""

    traits = DecodeTraits(lookahead=0, chunkable=True, prefix_cacheable=True)

    def __init__(self, runner: ForwardRunner, *, grammars: Grammars | None = None) -> None:
        self._runner = runner
        self._sampler = Sampler(runner.vocab_size)
        self._states = StateTable(grammars)

    def num_states(self) -> int:
        return len(self._states)

    @property
    def states(self) -> StateTable:
        return self._states

    def enter(self, plan: StepPlan) -> None:
        """See `uniform.Decoder`, and so are the next two."""
        self._states.enter(plan)

    def heard(self, request_id: str, tokens: Sequence[int]) -> None:
        """Nobody else keeps count of them."""

    def leaves(self, _: SeqState) -> bool:
        return True

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
        logits, _ = forward(self._runner, inputs, [*last, *scored], wanted_of(shares, first))
        prompts = prompt_scores(shares, logits[len(last) :])
        results = [*map(self._result, shares, self._draw(shares, logits[: len(last)]), repeat(prompts))]
        return StepOutput(plan.step, (*results, *void))

    def _draw(self, shares: Sequence[Share], logits: torch.Tensor) -> Iterator[Drawn | None]:
        """What each request's next token is, where it gets one."""
        states = [share.state.sampling for share in shares if share.samples]
        if not states:
            return repeat(None, len(shares))
        wanted = [state.sampling.alternatives for state in states]
        reported = any(count is not None for count in wanted)
        sampled = self._sampler.sample(logits, states, wanted if reported else None)
        drawn = zip(sampled.tokens.tolist(), sampled.failed.tolist(), sampled.logprobs or repeat(None), strict=False)
        if len(states) == len(shares):
            return drawn
        return iter([next(drawn) if share.samples else None for share in shares])

    @staticmethod
    def _result(share: Share, drawn: Drawn | None, prompts: dict[str, tuple[TokenLogprob, ...]]) -> SeqResult:
        """Move a request on, and say so."""
        state, request_id, end = share.state, share.item.request_id, share.end
        prompt = prompts.get(request_id) if prompts else None
        if drawn is None:
            state.commit((), end)
            found, error = readout_of(share)
            return SeqResult(request_id, (), end, prompt_logprobs=prompt, error=error, reading=found)
        token, failed, logprob = drawn
        if failed:
            state.commit((), end)
            return SeqResult(request_id, (), end, error=state.failure)
        state.commit((token,), end)
        return SeqResult(request_id, (token,), end, None if logprob is None else (logprob,), prompt)
