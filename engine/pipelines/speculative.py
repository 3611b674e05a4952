"""Speculative decoding: draft some tokens, score them all in one target pass, keep those that the verifier lets stand.

Any drafter with any verifier. All requests of a step share one pass: prompts in chunks, plain decodes, drafts of
different lengths. Rejected positions hold stale KV that the next step overwrites; nothing is rolled back. With
`a` of `k` drafted tokens accepted, a round commits a + 1 tokens and makes the KV of the first a of them final
(Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.pipelines.states import FAILED, Share, StateTable, first_rows, prompt_scores
from engine.protocols import DraftAsk, Drafter, DraftProposal, ForwardRunner, TargetRows, Verifier
from engine.runtime.sampler import Sampler, SamplingState, top_logprobs
from engine.types import DecodeTraits, SeqResult, StepOutput, StepPlan, TokenLogprob


@dataclass(slots=True, eq=False)
class Round:
    """What one request commits: tokens (none where not even the first can be drawn), and the rows they come from."""

    tokens: list[int]
    rows: list[int]
    logprobs: tuple[TokenLogprob, ...] | None = None


class SpeculativePipeline:
    """See `protocols.Pipeline`. One target pass a step, and 1 to max_draft + 1 tokens for every decoding sequence."""

    def __init__(self, runner: ForwardRunner, drafter: Drafter, verifier: Verifier, max_draft: int) -> None:
        self.traits = DecodeTraits(lookahead=max_draft, drafts=True)
        self._runner = runner
        self._drafter = drafter
        self._verifier = verifier
        self._sampler = Sampler(runner.vocab_size)
        self._states = StateTable()

    def num_states(self) -> int:
        return len(self._states)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        self._enter(plan)
        shares, void = self._states.shares(plan)
        if not shares:
            return StepOutput(plan.step, void)
        drawing = [share for share in shares if share.samples]
        proposal = self._drafter.propose([DraftAsk(share.item.request_id, share.item.lookahead) for share in drawing])
        for share, draft, length in zip(drawing, proposal.tokens.tolist(), proposal.lengths, strict=True):
            share.drafts = draft[:length]
        inputs = [share.input() for share in shares]
        first = first_rows(inputs)
        rows = [
            row + len(share.ids) - 1 + step
            for row, share in zip(first, shares, strict=True)
            if share.samples
            for step in range(len(share.drafts) + 1)
        ]
        scored = [row + offset for row, share in zip(first, shares, strict=True) for offset in share.scored]
        logits = self._runner.forward(inputs, [*rows, *scored])[:, : self._runner.vocab_size]
        prompts = prompt_scores(shares, logits[len(rows) :])
        verify = self._verify if any(proposal.lengths) else self._draw
        rounds = verify(drawing, proposal, logits[: len(rows)])
        results = (_commit(share, rounds.get(share.item.request_id), prompts) for share in shares)
        output = StepOutput(plan.step, (*results, *void))
        for share in drawing:
            self._drafter.commit(share.item.request_id, rounds[share.item.request_id].tokens)
        return output

    def _enter(self, plan: StepPlan) -> None:
        for request_id in plan.dropped:
            self._drafter.drop(request_id)
        self._states.enter(plan)
        for admission in plan.admitted:
            request = admission.request
            self._drafter.admit(request.id, [*request.prompt_ids, *admission.output_ids])

    def _verify(self, drawing: list[Share], proposal: DraftProposal, logits: torch.Tensor) -> dict[str, Round]:
        """What each drawing request commits.

        `logits` [rows, vocabulary]: for each request the row of its last committed token, then those of its drafts.
        """
        states = [state for share in drawing for state in share.state.sampling.ahead(share.drafts)]
        proposal = replace(proposal, tokens=proposal.tokens.to(logits.device))  # some drafters work on the host
        verdict = self._verifier.verify(proposal, self._target(proposal, logits, states))
        accepted, path, following = verdict.accepted.tolist(), verdict.path.tolist(), verdict.next_token.tolist()
        rounds: dict[str, Round] = {}
        row = 0
        for i, share in enumerate(drawing):
            taken = path[i][: accepted[i]]
            tokens = [share.drafts[index] for index in taken]
            if following[i] >= 0:
                tokens.append(following[i])
            # Where nothing can be drawn after the accepted drafts, the last of these takes the next token's place:
            # the next step comes to that row again, with nothing drafted before it, and fails there as plain decoding.
            scored = [row, *(row + 1 + index for index in taken)][: len(tokens)]
            rounds[share.item.request_id] = Round(tokens, scored)
            row += len(share.drafts) + 1
        _report(drawing, rounds, logits)
        return rounds

    def _draw(self, drawing: list[Share], _: DraftProposal, logits: torch.Tensor) -> dict[str, Round]:
        """`_verify` where nothing was drafted: plain decoding, under any verifier, without the way through tensors."""
        if not drawing:
            return {}
        sampled = self._sampler.sample(logits, [share.state.sampling for share in drawing])
        drawn = zip(drawing, sampled.tokens.tolist(), sampled.failed.tolist(), strict=True)
        rounds = {
            share.item.request_id: Round([] if failed else [token], [] if failed else [row])
            for row, (share, token, failed) in enumerate(drawn)
        }
        _report(drawing, rounds, logits)
        return rounds

    def _target(self, proposal: DraftProposal, logits: torch.Tensor, states: list[SamplingState]) -> TargetRows:
        """The target's own draws at all rows, laid out as the drafts are."""
        device, width = logits.device, proposal.tokens.shape[1] + 1
        # Lengths are known on the host, so that nothing has to be read back from a device.
        cells = [i * width + step for i, length in enumerate(proposal.lengths) for step in range(length + 1)]
        at = torch.tensor(cells, dtype=torch.int64, device=device)
        shape = (len(proposal.lengths), width)
        sampled = self._sampler.sample(logits, states)
        draws = torch.full(shape, -1, dtype=torch.int64, device=device)
        draws.view(-1)[at] = sampled.tokens.masked_fill(sampled.failed, -1)
        if not self._verifier.needs_laws:
            return TargetRows(draws)
        laws = self._sampler.processed_log_probs(logits, states)
        log_probs = laws.new_full((*shape, laws.shape[1]), float("-inf"))
        log_probs.flatten(0, 1)[at] = laws
        return TargetRows(draws, log_probs)


def _report(drawing: list[Share], rounds: dict[str, Round], logits: torch.Tensor) -> None:
    """Fill in the log-probabilities of the committed tokens of requests that want them."""
    rows: list[int] = []
    tokens: list[int] = []
    counts: list[int] = []
    asking = []
    for share in drawing:
        wanted, round_ = share.state.sampling.sampling.logprobs, rounds[share.item.request_id]
        if wanted is not None and round_.tokens:
            asking.append(round_)
            rows += round_.rows
            tokens += round_.tokens
            counts += [wanted] * len(round_.tokens)
    if not asking:
        return
    entries = top_logprobs(logits[rows], torch.tensor(tokens, device=logits.device), counts)
    for round_ in asking:
        round_.logprobs = tuple(entries[: len(round_.tokens)])
        del entries[: len(round_.tokens)]


def _commit(share: Share, round_: Round | None, prompts: dict[str, tuple[TokenLogprob, ...]]) -> SeqResult:
    """Move the request's state on, and say so."""
    request_id, prompt = share.item.request_id, prompts.get(share.item.request_id)
    if round_ is None:
        share.state.commit((), share.end)
        return SeqResult(request_id, (), share.end, prompt_logprobs=prompt)
    if not round_.tokens:
        share.state.commit((), share.end)
        return SeqResult(request_id, (), share.end, error=FAILED)
    accepted = len(round_.tokens) - 1
    share.state.commit(round_.tokens, share.end + accepted)
    return SeqResult(
        request_id=request_id,
        new_tokens=tuple(round_.tokens),
        num_computed=share.end + accepted,
        logprobs=round_.logprobs,
        prompt_logprobs=prompt,
        drafted=len(share.drafts),
        accepted=accepted,
    )
