"""What of a proposal is verified: chains cut by their margins, trees where they promise more, and what is learned."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from engine.errors import ConfigError
from engine.pipelines.autoregressive import AutoregressivePipeline
from engine.pipelines.rounds import Round, commit
from engine.pipelines.shaping import BARREN, RETRY, WIDTH, Shaper, as_proposal, cut
from engine.pipelines.speculative import SpeculativePipeline
from engine.pipelines.states import SeqState, Share
from engine.pipelines.trees import grow
from engine.protocols import Delta, Dense, DraftAsk, DraftProposal, DraftSampler, Options, Scalar
from engine.runtime.batch import AttentionMode
from engine.runtime.sampler import SamplingState
from engine.types import FinishReason, Request, SamplingParams, ScheduledSeq
from engine.verifiers.rejection import RejectionVerifier
from engine.verifiers.strict import StrictVerifier
from tests.numeric.test_speculative_pipeline import VOCAB, ScriptedRunner, requests, run

FLAT = ((1, 1.0), (64, 1.0001))  # tokens are free
STEEP = ((1, 1.0), (64, 64.0))  # a pass costs what it feeds


def shares(count: int, lookahead: int = 8, fed: int = 1) -> list[Share]:
    made = []
    for i in range(count):
        request = Request(f"r{i}", (1,) * 5, SamplingParams(max_tokens=20))
        item = ScheduledSeq(request.id, 5 - fed, (1,) * fed, lookahead, tuple(range(8)))
        state = SeqState([1] * 5, 5, SamplingState(request), 5 - fed)
        made.append(Share(item, state, 5 - fed, item.tokens, samples=True))
    return made


def proposal(
    margins: list[list[float]] | None, lengths: tuple[int, ...], options: Options | None = None
) -> DraftProposal:
    width = max(lengths)
    tokens = torch.tensor([[*range(10, 10 + n), *([-1] * (width - n))] for n in lengths])
    return DraftProposal(tokens, lengths, margins=None if margins is None else torch.tensor(margins), options=options)


def choices(probs: Sequence[Sequence[float]], count: int) -> Options:
    """The same options for every request: token 10 + d is the best of position d, then 20 + d, ..."""
    tokens = torch.tensor([[10 * (rank + 1) + d for rank in range(len(row))] for d, row in enumerate(probs)])
    log_probs = torch.tensor(probs).log()
    return Options(tokens.expand(count, -1, -1), log_probs.expand(count, -1, -1))


def test_without_costs_or_margins_everything_is_verified() -> None:
    for margins, costs in ((None, STEEP), ([[9.0] * 3, [-9.0] * 3], ())):
        shaper, drawing = Shaper(), shares(2)
        shaper.set_costs(costs, (), ())
        whole = proposal(margins, (3, 2))
        assert shaper.shape(drawing, 2, whole).proposal is whole
        assert [share.drafts for share in drawing] == [[10, 11, 12], [10, 11]]


def test_costs_cut_what_is_unlikely() -> None:
    shaper, drawing = Shaper(), shares(3)
    shaper.set_costs(((1, 1.0), (64, 20.0)), (), ())
    law = Dense(torch.rand(3, 3, VOCAB))
    margins = [[40.0, 40.0, -40.0], [-40.0, 40.0, 40.0], [40.0, 40.0, 40.0]]
    whole = replace(
        proposal(margins, (3, 3, 2)), law=law, marginal=Scalar(torch.rand(3, 3)), hidden=torch.rand(3, 3, 5)
    )
    sure = shaper.shape(drawing, 3, replace(whole, law=Delta())).proposal  # not drawn: all margins may be looked at
    assert sure.lengths == (2, 0, 2)
    shaped = shaper.shape(drawing, 3, whole).proposal
    assert shaped.lengths == (2, 0, 2) == tuple(len(share.drafts) for share in drawing)
    assert shaped.tokens.tolist() == [[10, 11], [-1, -1], [10, 11]]
    assert isinstance(shaped.law, Dense) and isinstance(shaped.marginal, Scalar)
    assert torch.equal(shaped.law.probs, law.probs[:, :2]) and shaped.marginal.probs.shape == (3, 2)
    assert shaped.hidden is not None and shaped.hidden.shape == (3, 2, 5)
    nothing = cut(whole, [0, 0, 0])
    assert nothing.lengths == (0, 0, 0) and nothing.tokens.shape == (3, 0)


def test_a_drawn_token_is_kept_whatever_the_margins_behind_it_say() -> None:
    """Those may tell of the token itself. Where nothing is drawn, a sure token makes one before it worth its row."""
    probs = torch.full((2, 2, VOCAB), 1 / VOCAB)
    laws: dict[str, Delta | Dense] = {"none": Delta(), "all": Dense(probs)}
    laws |= {"the other": Dense(probs[:1], (0,)), "it": Dense(probs[:1], (1,))}
    kept: dict[str, list[int]] = {name: [] for name in laws}
    for drawn, kinds in kept.items():
        for behind in (40.0, -40.0):
            shaper = Shaper()
            shaper.set_costs(((1, 1.0), (3, 1.0), (4, 1.15), (5, 1.15), (64, 30.0)), (), ())
            for margins in ([1.0, 1.0], [-1.37, behind]):
                whole = replace(proposal([[40.0, 0.0], margins], (1, 2)), law=laws[drawn])
                shape = shaper.shape(shares(2), 2, whole)
            kinds.append(min(1, shape.proposal.lengths[1]))
    assert kept["none"] == kept["the other"] == [1, 0]
    assert kept["all"] == kept["it"] and kept["it"] in ([0, 0], [1, 1])


def test_trees_where_they_promise_more() -> None:
    probs = [[0.5, 0.4], [0.5, 0.4]]
    for trees, wanted in ((FLAT, True), (STEEP, False)):
        shaper, drawing = Shaper(tree=6), shares(2, lookahead=5)
        shaper.set_costs(FLAT, (), trees)
        shape = shaper.shape(drawing, 2, proposal(None, (2, 2), choices(probs, 2)))
        assert (shape.proposal.parents is not None) == wanted
        if not wanted:
            assert [share.drafts for share in drawing] == [[10, 11]] * 2
            continue
        best = grow([[10, 20], [11, 21]], torch.tensor(probs).log().tolist(), 5)
        assert [share.tree for share in drawing] == [best, best]  # five slots were granted
        assert shape.proposal.lengths == (5, 5)


def test_a_tree_that_is_a_chain_needs_no_mask() -> None:
    shaper, drawing = Shaper(tree=2), shares(1)
    shape = shaper.shape(drawing, 1, proposal(None, (2,), choices([[0.9, 0.1], [0.9, 0.1]], 1)))
    assert shape.proposal.parents is None and drawing[0].tree is None and drawing[0].drafts == [10, 11]


def test_options_are_asked_for_where_trees_can_grow_and_lately_paid() -> None:
    assert Shaper().width(shares(1)) == 0
    shaper = Shaper(tree=4)
    assert shaper.width([*shares(1), *shares(1, fed=2)]) == 0
    assert [shaper.width(shares(2)) for _ in range(20)] == [WIDTH] * 20  # nothing is known of costs
    shaper.set_costs(FLAT, (), STEEP)
    asked = [shaper.width(shares(2)) > 0 for _ in range(2 * RETRY)]
    assert asked == [turn < BARREN or turn % RETRY == 0 for turn in range(2 * RETRY)]
    shaper.set_costs(FLAT, (), FLAT)
    for _ in range(RETRY):
        shaper.width(shares(2))
    assert shaper.width(shares(8))  # another size of steps
    shaper.shape(shares(2), 2, proposal(None, (2, 2), choices([[0.5, 0.4], [0.5, 0.4]], 2)))
    assert shaper.width(shares(2))  # a tree paid


def test_lengths_follow_what_came_of_margins() -> None:
    """At first both kinds of margins are believed; then those that always fail are no longer verified."""
    shaper = Shaper()
    shaper.set_costs(((1, 1.0), (64, 10.0)), (), ())
    for _ in range(300):
        drawing = shares(2)
        shape = shaper.shape(drawing, 2, proposal([[3.0, 3.0], [1.0, 1.0]], (2, 2)))
        lengths = shape.proposal.lengths
        stood = [lengths[0], 0]
        shaper.observe(drawing, shape, [Round([1] * (n + 1), [], range(n)) for n in stood])
    assert lengths == (2, 0)


def test_a_tree_teaches_of_its_spine() -> None:
    """A path that leaves the spine says that the likeliest token fell."""

    @dataclass
    class Seen:
        found: list[tuple[list[int], list[int]]] = field(default_factory=list)

        def chances(self, kinds: Sequence[object], margins: torch.Tensor, lengths: Sequence[int]) -> list[list[float]]:
            return [[0.5] * length for length in lengths]

        def observe(
            self, kinds: Sequence[object], margins: torch.Tensor, lengths: list[int], accepted: list[int]
        ) -> None:
            self.found.append((lengths, accepted))

    shaper, seen = Shaper(tree=4), Seen()
    shaper._survival = seen  # type: ignore[assignment]
    probs = [[0.5, 0.4], [0.5, 0.4]]
    for path, stood in (([0, 2], 2), ([0, 3], 1), ([1], 0), ([], 0)):
        drawing = shares(1)
        shape = shaper.shape(drawing, 1, proposal([[1.0, 1.0]], (2,), choices(probs, 1)))
        assert drawing[0].tree is not None and drawing[0].tree.spine() == [0, 2]
        shaper.observe(drawing, shape, [Round([1] * (len(path) + 1), [], path)])
        assert seen.found[-1] == ([2], [stood])


def test_a_path_that_ends_at_a_leaf_was_not_cut_short() -> None:
    probs = [[0.5, 0.4], [0.5, 0.4]]  # nodes: 10, 20; below 10: 11, 21
    for path, leaf in (([0, 2], True), ([0], False), ([1], True), ([], False)):
        drawing = shares(1)
        Shaper(tree=4).shape(drawing, 1, proposal(None, (2,), choices(probs, 1)))
        assert drawing[0].tree is not None and drawing[0].tree.parents == (-1, -1, 0, 0)
        (result,) = commit(drawing, [Round([*(drawing[0].drafts[node] for node in path), 9], [], path)], {})
        assert (result.drafted, result.accepted, result.leaf) == (4, len(path), leaf)


def test_proposals_of_trees_are_padded() -> None:
    trees = [grow([[1, 2]], [[-0.5, -1.0]], 2), grow([[3]], [[-0.1]], 1), grow([], [], 1)]
    shaped = as_proposal(trees)
    assert shaped.lengths == (2, 1, 0)
    assert shaped.tokens.tolist() == [[1, 2], [3, -1], [-1, -1]]
    assert shaped.parents is not None and shaped.parents.tolist() == [[-1, -1], [-1, -1], [-1, -1]]


@dataclass
class OpenDrafter:
    """Guesses at a scripted model: options with margins, or tokens that its sampler draws. Checks what it is asked."""

    runner: ScriptedRunner
    rng: random.Random
    most: int = 4
    scores: bool = False
    tokens: dict[str, list[int]] = field(default_factory=dict)
    drawn: int = 0

    def admit(self, request_id: str, tokens: Sequence[int]) -> None:
        self.tokens[request_id] = list(tokens)

    def drop(self, request_id: str) -> None:
        self.tokens.pop(request_id, None)

    def commit(self, request_id: str, tokens: Sequence[int]) -> None:
        self.tokens[request_id] += tokens

    def propose(self, asks: Sequence[DraftAsk], sampler: DraftSampler | None = None, width: int = 0) -> DraftProposal:
        logits = torch.stack([self._logits(ask) for ask in asks])
        lengths = tuple(ask.limit for ask in asks)
        past = torch.arange(self.most) >= torch.tensor(lengths).unsqueeze(1)
        best, tokens = logits.topk(3)
        law = None
        if sampler is not None:
            rows = [i for i in range(len(asks)) for _ in range(self.most)]
            drawn, laws = sampler.draw(logits.flatten(0, 1), rows, list(range(self.most)) * len(asks))
            tokens, law = drawn.view(len(asks), self.most, 1), Dense(laws.view(logits.shape))
            self.drawn += sum(lengths)
        made = DraftProposal(tokens[:, :, 0].masked_fill(past, -1), lengths, margins=best[:, :, 0] - best[:, :, 1])
        if law is not None:
            return replace(made, law=law)
        return replace(made, options=Options(tokens, best - logits.logsumexp(-1, keepdim=True))) if width else made

    def _logits(self, ask: DraftAsk) -> torch.Tensor:
        """Those of the model along its greedy path, and some noise."""
        known = list(self.tokens[ask.request_id])
        assert (ask.position, ask.limit <= self.most) == (len(known) - 1, True)
        assert len(ask.block_ids) * self.runner.block_size > ask.position + ask.limit
        assert ask.fed >= 1
        rows = []
        for _ in range(self.most):
            rows.append(self.runner._row(len(known) - 1, known[-1]).nan_to_num(0.0) + 0.3 * torch.randn(VOCAB))
            known.append(int(rows[-1].argmax()))
        return torch.stack(rows)


BROKEN = frozenset((position, token) for position in range(9, 30, 3) for token in (1, 4, 7))


@pytest.mark.parametrize("costs", [(), ((1, 1.0), (64, 3.0))])
@pytest.mark.parametrize("lag", [0, 1])
def test_trees_and_cuts_give_the_tokens_and_failures_of_plain_decoding(
    lag: int, costs: tuple[tuple[int, float], ...]
) -> None:
    torch.manual_seed(1)
    modes: set[AttentionMode] = set()
    met = 0
    for seed in range(4):
        plain = run(AutoregressivePipeline(ScriptedRunner(BROKEN)), requests(seed))
        runner = ScriptedRunner(BROKEN)
        pipeline = SpeculativePipeline(runner, OpenDrafter(runner, random.Random(1)), [StrictVerifier()], 4, tree=9)
        pipeline.set_costs(costs)
        assert (pipeline.traits.lookahead, pipeline.traits.max_draft) == (9, 4)
        assert run(pipeline, requests(seed), lag) == plain
        modes |= runner.modes
        met += sum(finish is FinishReason.ERROR for *_, finish in plain.values())
    assert met > 3 and modes == {AttentionMode.TREE, AttentionMode.CAUSAL}


def test_sampled_drafts_reach_the_verifier_with_their_laws() -> None:
    """Greedy requests keep their tokens beside those that are drawn, and any answer comes again."""
    torch.manual_seed(1)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        runner = ScriptedRunner()
        drafter = OpenDrafter(runner, random.Random(1))
        pipeline = SpeculativePipeline(runner, drafter, [RejectionVerifier()], 4, sample=True)
        found.append(run(pipeline, requests(2)))
        assert drafter.drawn > 50
    plain = run(AutoregressivePipeline(ScriptedRunner()), requests(2))
    assert found[0] == found[1]
    greedy = [one.id for one in requests(2) if one.sampling.temperature == 0.0]
    assert greedy and all(found[0][name] == plain[name] for name in greedy)


def test_what_the_verifier_cannot_do_is_refused() -> None:
    runner = ScriptedRunner()
    drafter = OpenDrafter(runner, random.Random(1))
    with pytest.raises(ConfigError, match=r"draft\.tree"):
        SpeculativePipeline(runner, drafter, [RejectionVerifier()], 4, tree=8)
    with pytest.raises(ConfigError, match=r"draft\.sample"):
        SpeculativePipeline(runner, drafter, [StrictVerifier()], 4, sample=True)
