"""What decoding pipelines keep of each request, and how a plan's items become the parts of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.errors import InvalidRequest
from engine.pipelines.choices import Choice, ThinkingSpan
from engine.pipelines.reader import Reader
from engine.pipelines.trees import Tree
from engine.runtime.batch import SeqInput
from engine.runtime.sampler import SamplingState, prompt_logprobs
from engine.structured.grammars import Grammars
from engine.structured.state import GrammarState
from engine.types import Request, ScheduledSeq, SeqResult, StepPlan, TokenLogprob

NOTHING = range(0)
FAILED = "the model's output for this request is not a number, or every token is banned"


@dataclass(slots=True, eq=False)
class SeqState:
    """Device-side truth of one request: it may be a step ahead of what the scheduler knows."""

    tokens: list[int]  # prompt and output
    prompt_len: int
    sampling: SamplingState
    num_computed: int = 0
    choice: Choice | None = None  # how its drafts are verified, where pipelines draft
    span: ThinkingSpan | None = None  # where the choice asks for it
    reader: Reader | None = None  # of a request that reads and draws nothing
    refusal: str = ""  # of its grammar, which nobody has compiled before: it can't run

    @property
    def failure(self) -> str:
        """Why no token can be drawn for it."""
        grammar = self.sampling.grammar
        if grammar is not None and grammar.failure:
            return f"this request's grammar can't be followed any further: {grammar.failure}"
        return self.refusal or FAILED

    def commit(self, tokens: Sequence[int], num_computed: int) -> None:
        """`tokens` follow the committed ones, and the KV of the first `num_computed` positions is final."""
        self.num_computed = num_computed
        self.tokens.extend(tokens)
        for token in tokens:
            self.sampling.push(token)
            if self.span is not None:
                self.span.push(token)


@dataclass(slots=True, eq=False)
class Share:
    """One sequence's part of the running step: feed `ids`, committed tokens from position `start`, then `drafts`.

    The drafts are a chain, or the nodes of a `tree` below a single committed token.
    """

    item: ScheduledSeq
    state: SeqState
    start: int
    ids: Sequence[int]
    samples: bool  # the step reaches the end of its tokens, and draws the next
    drafts: Sequence[int] = ()
    tree: Tree | None = None
    scored: range = NOTHING  # its rows whose successor is a prompt token to report

    @property
    def end(self) -> int:
        """Position after the fed committed tokens."""
        return self.start + len(self.ids)

    def input(self) -> SeqInput:
        ids = [*self.ids, *self.drafts] if self.drafts else self.ids
        rows = None if self.tree is None else self.tree.rows(self.start)
        return SeqInput(ids, self.start, self.item.block_ids, self.end + len(self.drafts), rows)

    def ahead(self) -> list[SamplingState]:
        """What the draws see after the last committed token, then after each drafted one."""
        return self.state.sampling.ahead(self.drafts, None if self.tree is None else self.tree.parents)


class StateTable:
    """The states of all requests between `admitted` and `dropped`, by id."""

    def __init__(self, grammars: Grammars | None = None) -> None:
        """`grammars`: needed where a request has one."""
        self._grammars = grammars
        self._states: dict[str, SeqState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, request_id: str) -> SeqState:
        return self._states[request_id]

    def enter(self, plan: StepPlan) -> None:
        """Forget whom the plan drops, then take in whom it admits."""
        for request_id in plan.dropped:
            self._states.pop(request_id, None)
        for admission in plan.admitted:
            request = admission.request
            tokens = [*request.prompt_ids, *admission.output_ids]
            grammar, refusal = self._grammar(request)
            sampling = SamplingState(request, admission.output_ids, grammar)
            state = SeqState(tokens, len(request.prompt_ids), sampling, refusal=refusal)
            if request.reading is not None:
                state.reader = Reader(request.reading, len(request.prompt_ids))
            self._states[request.id] = state

    def _grammar(self, request: Request) -> tuple[GrammarState | None, str]:
        """The request's, if it has one, and why it can't be followed if it can't."""
        grammar = request.sampling.grammar
        if grammar is None:
            return None, ""
        if self._grammars is None:
            return None, "structured output is not supported here"
        try:
            return self._grammars.state(grammar), ""
        except InvalidRequest as error:  # the others in the step must not feel it
            return None, error.message

    def shares(self, plan: StepPlan) -> tuple[list[Share], tuple[SeqResult, ...]]:
        """The plan's items that have something to feed, and the results of those that have not.

        With results a step late, a sequence whose draw failed is planned once more: it has nothing to feed. Neither
        has one whose grammar was refused.
        """
        shares, void = [], []
        for item in plan.items:
            state = self._states[item.request_id]
            start = state.num_computed if item.pending else item.start
            ids = state.tokens[start:] if item.pending else item.tokens
            if not ids or state.refusal:
                void.append(SeqResult(item.request_id, (), item.start, error=state.failure))
                continue
            share = Share(item, state, start, ids, state.reader is None and start + len(ids) == len(state.tokens))
            if state.sampling.sampling.prompt_logprobs is not None and start < state.prompt_len - 1:
                share.scored = range(min(share.end, state.prompt_len - 1) - start)
            shares.append(share)
        return shares, tuple(void)


def first_rows(inputs: Sequence[SeqInput]) -> list[int]:
    """Where each input begins among the packed tokens."""
    rows, row = [], 0
    for item in inputs:
        rows.append(row)
        row += len(item.ids)
    return rows


def prompt_scores(shares: Sequence[Share], logits: torch.Tensor) -> dict[str, tuple[TokenLogprob, ...]]:
    """Prompt log-probabilities by request; `logits` [rows, vocabulary] are those of all `scored` rows, in order."""
    found: dict[str, tuple[TokenLogprob, ...]] = {}
    row = 0
    for share in shares if len(logits) else ():
        if not share.scored:
            continue
        start, size = share.start, len(share.scored)
        following = torch.tensor(share.state.tokens[start + 1 : start + 1 + size], device=logits.device)
        wanted = share.state.sampling.sampling.prompt_logprobs or 0
        found[share.item.request_id] = tuple(prompt_logprobs(logits[row : row + size], following, wanted))
        row += size
    return found
