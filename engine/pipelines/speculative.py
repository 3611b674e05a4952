"""Speculative decoding: draft some tokens, score them all in one target pass, keep those that the verifier lets stand.

Any drafter with any verifier, which each request may choose for itself. All requests of a step share one pass: prompts
in chunks, plain decodes, drafts of different lengths. Rejected positions hold stale KV that the next step overwrites;
nothing is rolled back. With `a` of `k` drafted tokens accepted, a round commits a + 1 tokens and makes the KV of the
first a of them final (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023). The nodes
of a draft tree lie in consecutive slots, siblings too; those on the accepted path are moved to the places of their
positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine.pipelines.choices import Menu, ThinkingSpan
from engine.pipelines.coins import RequestSampler
from engine.pipelines.readings import Wanted, forward, wanted_of
from engine.pipelines.referee import Referee, choice_of
from engine.pipelines.rounds import Round, commit
from engine.pipelines.shaping import Shape, Shaper
from engine.pipelines.states import SeqState, Share, StateTable, first_rows, prompt_scores
from engine.pipelines.trees import moves
from engine.protocols import DraftAsk, Drafter, ForwardRunner, Verifier
from engine.runtime.batch import AttentionMode, SeqInput
from engine.structured.grammars import Grammars
from engine.types import DecodeTraits, StepOutput, StepPlan


class SpeculativePipeline:
    """See `protocols.Pipeline`. One target pass a step, and 1 to max_draft + 1 tokens for every decoding sequence."""

    def __init__(
        self,
        runner: ForwardRunner,
        drafter: Drafter,
        verifiers: Sequence[Verifier],
        max_draft: int,
        *,
        knobs: Mapping[str, float] | None = None,
        tree: int = 0,
        sample: bool = False,
        grammars: Grammars | None = None,
    ) -> None:
        """Requests may name any of the `verifiers`, told apart by the names on their cards.

        The first one, with these `knobs`, is for those that name none; where one is relaxed, an exact one is needed,
        too. `tree`: most nodes of a draft tree; `sample`: draw the drafts of requests with a temperature.
        Raises ConfigError where the first verifier has no use for these.
        """
        self._menu = Menu(verifiers, knobs or {}, sample=sample, tree=tree > 0)
        self.traits = DecodeTraits(lookahead=max(max_draft, tree), drafts=True, depth=max_draft)
        self._max_draft = max_draft
        self._runner = runner
        self._drafter = drafter
        self._referee = Referee(runner.vocab_size)
        self._shaper = Shaper(tree, max_draft)
        self._states = StateTable(grammars)

    def num_states(self) -> int:
        return len(self._states)

    @property
    def states(self) -> StateTable:
        return self._states

    def heard(self, request_id: str, tokens: Sequence[int]) -> None:
        """See `uniform.Decoder`, and so are `leaves` and `enter`."""
        self._drafter.commit(request_id, tokens)

    def leaves(self, state: SeqState) -> bool:
        choice = state.choice
        return choice is not None and choice.verifier.card.exact and not choice.drawn

    def set_costs(
        self,
        step_costs: tuple[tuple[int, float], ...],
        draft_costs: tuple[tuple[int, float], ...] = (),
        tree_costs: tuple[tuple[int, float], ...] = (),
    ) -> None:
        """(tokens fed, seconds) of plain passes and of those with trees; (requests, seconds) of draft passes."""
        self._shaper.set_costs(step_costs, draft_costs, tree_costs)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        self.enter(plan)
        shares, void = self._states.shares(plan)
        if not shares:
            return StepOutput(plan.step, void)
        drawing = [share for share in shares if share.samples]
        shape = self._draft(shares, drawing)
        trees = shape is not None and shape.proposal.parents is not None
        inputs = [share.input() for share in shares]
        first = first_rows(inputs)
        rows = [
            row + len(share.ids) - 1 + step
            for row, share in zip(first, shares, strict=True)
            if share.samples
            for step in range(len(share.drafts) + 1)
        ]
        scored = [row + offset for row, share in zip(first, shares, strict=True) for offset in share.scored]
        mode = AttentionMode.TREE if trees else AttentionMode.CAUSAL
        logits, states = self._forward(drawing, inputs, [*rows, *scored], mode, wanted_of(shares, first))
        prompts = prompt_scores(shares, logits[len(rows) :])
        rounds = self._decide(drawing, shape, logits[: len(rows)], None if states is None else states[: len(rows)])
        if trees:
            self._compact(drawing, rounds, logits.device)
        output = StepOutput(plan.step, (*commit(shares, rounds, prompts), *void))
        for share, round_ in zip(drawing, rounds, strict=True):
            self._drafter.commit(share.item.request_id, round_.tokens)
        return output

    def enter(self, plan: StepPlan) -> None:
        for request_id in plan.dropped:
            self._drafter.drop(request_id)
        self._states.enter(plan)
        for admission in plan.admitted:
            request, state = admission.request, self._states[admission.request.id]
            temperature = 0.0 if state.sampling.greedy else request.sampling.temperature
            state.choice = choice = self._menu.choose(request.speculation, temperature)
            state.span = None if choice.thinking is None else ThinkingSpan(choice.thinking, state.tokens)
            self._drafter.admit(request.id, [*request.prompt_ids, *admission.output_ids])

    def _draft(self, shares: Sequence[Share], drawing: Sequence[Share]) -> Shape | None:
        """Draft for those that draw, and decide what of it is verified; None where nothing is."""
        if not any(share.item.lookahead for share in drawing):
            return None
        asks = [self._ask(share) for share in drawing]
        drawn = [ask.limit > 0 and choice_of(share).drawn for ask, share in zip(asks, drawing, strict=True)]
        sampler = RequestSampler([share.state.sampling for share in drawing], drawn) if any(drawn) else None
        proposal = self._drafter.propose(asks, sampler, self._shaper.width(shares))
        shape = self._shaper.shape(drawing, sum(len(share.ids) for share in shares), proposal)
        return shape if any(shape.proposal.lengths) else None

    def _ask(self, share: Share) -> DraftAsk:
        item = share.item
        limit, temperature = min(item.lookahead, self._max_draft), choice_of(share).temperature
        return DraftAsk(item.request_id, limit, share.end - 1, len(share.ids), item.block_ids, temperature)

    def _forward(
        self,
        drawing: Sequence[Share],
        inputs: Sequence[SeqInput],
        rows: Sequence[int],
        mode: AttentionMode,
        wanted: Wanted,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the rows, and what the output head read there if a verifier of this step's drafts needs it."""
        stated = any(share.drafts and choice_of(share).verifier.needs_states for share in drawing)
        logits, states = forward(self._runner, inputs, rows, wanted, mode, stated=stated)
        return logits[:, : self._runner.vocab_size], states

    def _decide(
        self, drawing: Sequence[Share], shape: Shape | None, logits: torch.Tensor, states: torch.Tensor | None
    ) -> list[Round]:
        """What each request that draws commits."""
        if shape is None:
            return self._referee.draw(drawing, logits)
        rounds = self._referee.verify(drawing, shape.proposal, logits, states)
        self._shaper.observe(drawing, shape, rounds)
        return rounds

    def _compact(self, drawing: Sequence[Share], rounds: Sequence[Round], device: torch.device) -> None:
        """Bring the KV of accepted nodes to the places of their positions."""
        size = self._runner.block_size
        pairs = [
            pair
            for share, round_ in zip(drawing, rounds, strict=True)
            for pair in moves(share.end, round_.path, share.item.block_ids, size)
        ]
        if pairs:
            source, target = zip(*pairs, strict=True)
            self._runner.compact(torch.tensor(source, device=device), torch.tensor(target, device=device))
