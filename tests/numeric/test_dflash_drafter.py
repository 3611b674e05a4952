"""What the block-diffusion drafter makes of a network's logits: tokens, margins, options, drawn tokens, laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from engine.drafters.dflash import DFlashDrafter, best_two
from engine.protocols import Delta, Dense, DraftAsk, Scalar
from engine.runtime.batch import DeviceBatch

DRAFT_VOCAB, VOCAB, MOST, WIDTH = 70, 100, 4, 3


@dataclass
class FakeModel:
    """Logits are a function of the anchor's position; `refined` adds one of the token before."""

    sequential: bool = False
    confident: bool = False
    most: int = MOST
    block_length: int = MOST + 1
    scratch: tuple[int, int] = (0, 0)
    asked: list[tuple[int, DraftAsk]] = field(default_factory=list)

    def blocks(self, anchors: Sequence[int], asks: Sequence[DraftAsk]) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += zip(anchors, asks, strict=True)
        size = min(max(ask.limit for ask in asks), MOST)
        rows = [torch.randn(MOST, DRAFT_VOCAB, generator=seeded(ask.position)) for ask in asks]
        hidden = [torch.randn(MOST, WIDTH, generator=seeded(ask.position + 1000)) for ask in asks]
        return torch.stack(rows)[:, :size].clone(), torch.stack(hidden)[:, :size].clone()

    def blocks_of(self, batch: DeviceBatch, scored: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the drafter asks for blocks of its own asks")

    def refine(self, logits: torch.Tensor, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        return logits + self.added(previous) + hidden[:, :1]

    def added(self, previous: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.randn(DRAFT_VOCAB, generator=seeded(5000 + int(token))) for token in previous])

    def confidence(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor | None:
        return hidden.sum(-1) + previous if self.confident else None

    def target_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return ids + 20

    def widen(self, logits: torch.Tensor) -> torch.Tensor:
        wide = logits.new_full((*logits.shape[:-1], VOCAB), float("-inf"))
        wide[..., 20 : 20 + DRAFT_VOCAB] = logits
        return wide


@dataclass
class SecondBest:
    """A sampler that takes the second best token of each row, and says so; for some of the asks."""

    wanted: frozenset[int] = frozenset(range(4))
    calls: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def draws(self, ask: int) -> bool:
        return ask in self.wanted

    def draw(
        self, logits: torch.Tensor, asks: Sequence[int], steps: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append((list(asks), list(steps)))
        return logits.topk(2).indices[:, 1], logits.softmax(-1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drafter_of(model: FakeModel, *names: str) -> DFlashDrafter:
    drafter = DFlashDrafter(model)
    for place, name in enumerate(names):
        drafter.admit(name, [1, 2, 50 + place])
    return drafter


ASKS = [
    DraftAsk("a", 2, 10),
    DraftAsk("b", 0, 11),
    DraftAsk("c", 9, 12, fed=3),
    DraftAsk("d", 9, 13, block_ids=(4, 5)),
]


def test_drafts_only_behind_one_fed_token_and_for_those_that_may() -> None:
    model = FakeModel()
    drafter = drafter_of(model, "a", "b", "c", "d")
    proposal = drafter.propose(ASKS)
    assert model.asked == [(50, ASKS[0]), (53, ASKS[3])]
    assert proposal.lengths == (2, 0, 0, MOST)
    best = model.blocks([0, 0], [ASKS[0], ASKS[3]])[0].argmax(-1) + 20
    assert proposal.tokens.tolist() == [[*best[0, :2].tolist(), -1, -1], [-1] * 4, [-1] * 4, best[1].tolist()]
    assert isinstance(proposal.law, Delta) and proposal.options is None and proposal.marginal is None
    assert proposal.margins is not None and bool((proposal.margins[[0, 3]] > 0).all())
    assert bool((proposal.margins[1:3] == float("-inf")).all())
    assert proposal.hidden is not None and proposal.hidden.shape == (4, MOST, WIDTH)


def test_nobody_to_draft_for_asks_nothing_of_the_network() -> None:
    model = FakeModel()
    proposal = drafter_of(model, "b", "c").propose(ASKS[1:3])
    assert model.asked == [] and proposal.lengths == (0, 0) and proposal.tokens.shape == (2, 0)
    assert drafter_of(model).propose([]).lengths == ()


def test_the_anchor_is_the_last_committed_token() -> None:
    model = FakeModel()
    drafter = drafter_of(model, "a")
    drafter.commit("a", [])
    drafter.propose(ASKS[:1])
    drafter.commit("a", [7, 9])
    drafter.propose(ASKS[:1])
    drafter.drop("a")
    drafter.admit("a", [3])
    drafter.propose(ASKS[:1])
    assert [anchor for anchor, _ in model.asked] == [50, 9, 3]


def test_each_token_sees_the_one_before_it() -> None:
    model = FakeModel(sequential=True)
    proposal = drafter_of(model, "a", "d").propose([ASKS[0], ASKS[3]])
    logits, hidden = model.blocks([0, 0], [ASKS[0], ASKS[3]])
    for row, anchor in enumerate((50, 51)):
        previous = anchor
        for step in range(proposal.lengths[row]):
            scores = logits[row, step] + model.added(torch.tensor([previous]))[0] + hidden[row, step, 0]
            previous = int(scores.argmax()) + 20
            assert proposal.tokens[row, step] == previous
            two = scores.topk(2).values
            assert proposal.margins is not None
            assert float(proposal.margins[row, step]) == pytest.approx(float(two[0] - two[1]), abs=1e-6)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_confidence_head_gives_the_margins(sequential: bool) -> None:
    model = FakeModel(sequential=sequential, confident=True)
    proposal = drafter_of(model, "d").propose(ASKS[3:])
    _, hidden = model.blocks([0], ASKS[3:])
    before = [50, *proposal.tokens[0, :-1].tolist()]
    expected = [float(hidden[0, step].sum() + token) for step, token in enumerate(before)]
    assert proposal.margins is not None and proposal.margins[0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sequential", [False, True])
def test_drawn_tokens_come_with_their_laws_over_the_target_vocabulary(sequential: bool) -> None:
    model, sampler = FakeModel(sequential=sequential), SecondBest()
    proposal = drafter_of(model, "a", "b", "c", "d").propose(ASKS, sampler)
    assert isinstance(proposal.law, Dense) and proposal.law.probs.shape == (2, MOST, VOCAB)
    assert proposal.law.rows == (0, 3)
    drawn = [pair for asks, steps in sampler.calls for pair in zip(asks, steps, strict=True)]
    assert sorted(drawn) == [(ask, step) for ask in (0, 3) for step in range(MOST)]
    for place, row in enumerate(proposal.law.rows):
        for step in range(proposal.lengths[row]):
            law = proposal.law.probs[place, step]
            assert float(law.sum()) == pytest.approx(1, abs=1e-5) and bool((law[:20] == 0).all())
            assert int(law.topk(2).indices[1]) == proposal.tokens[row, step]
    if sequential:  # the second token was drawn from what the first one, as drawn, made of its logits
        logits, hidden = model.blocks([0], ASKS[3:])
        scores = logits[0, 1] + model.added(proposal.tokens[3, :1])[0] + hidden[0, 1, 0]
        torch.testing.assert_close(proposal.law.probs[1, 1, 20:90], scores.softmax(-1))


@pytest.mark.parametrize("sequential", [False, True])
def test_only_those_that_draw_are_drawn_for(sequential: bool) -> None:
    """The others have the very tokens of a call without a sampler, and no laws are made for them."""
    model, sampler = FakeModel(sequential=sequential), SecondBest(frozenset((3,)))
    drafter = drafter_of(model, "a", "b", "c", "d")
    proposal, chosen, drawn = (drafter.propose(ASKS, each) for each in (sampler, None, SecondBest()))
    assert {ask for asks, _ in sampler.calls for ask in asks} == {3}
    assert proposal.tokens[0].tolist() == chosen.tokens[0].tolist() != drawn.tokens[0].tolist()
    assert proposal.tokens[3].tolist() == drawn.tokens[3].tolist()
    assert isinstance(proposal.law, Dense) and isinstance(drawn.law, Dense) and proposal.law.rows == (3,)
    assert torch.equal(proposal.law.probs, drawn.law.probs[1:])
    assert isinstance(drafter.propose(ASKS, SecondBest(frozenset())).law, Delta)


@pytest.mark.parametrize("sequential", [False, True])
def test_marginals_are_those_of_the_refined_logits_at_the_asked_temperature(sequential: bool) -> None:
    model = FakeModel(sequential=sequential)
    drafter = drafter_of(model, "a", "b", "c", "d")
    assert drafter.scores
    for temperatures in ((0.0, 2.0), (0.5, 0.0), (1.0, 0.7)):
        asks = [replace(ask, temperature=t) for ask, t in zip((ASKS[0], ASKS[3]), temperatures, strict=True)]
        proposal = drafter.propose([ASKS[1], *asks])
        assert isinstance(proposal.marginal, Scalar) and proposal.marginal.probs.dtype == torch.float32
        assert not proposal.marginal.probs[0].any()
        logits, hidden = model.blocks([0, 0], asks)
        for row, (anchor, temperature) in enumerate(zip((50, 53), temperatures, strict=True)):
            for step in range(min(asks[row].limit, MOST)):
                scores, token = logits[row, step], int(proposal.tokens[row + 1, step])
                if sequential:
                    before = anchor if step == 0 else int(proposal.tokens[row + 1, step - 1])
                    scores = scores + model.added(torch.tensor([before]))[0] + hidden[row, step, 0]
                want = float((scores / temperature).softmax(0)[token - 20]) if temperature else 0.0
                assert float(proposal.marginal.probs[row + 1, step]) == pytest.approx(want, abs=1e-6)


def test_a_marginal_that_is_no_number_is_0() -> None:
    class Broken(FakeModel):
        def blocks(self, anchors: Sequence[int], asks: Sequence[DraftAsk]) -> tuple[torch.Tensor, torch.Tensor]:
            logits, hidden = super().blocks(anchors, asks)
            logits[0, 1, 7] = float("nan")
            return logits, hidden

    proposal = drafter_of(Broken(), "d").propose([replace(ASKS[3], temperature=1.0)])
    assert isinstance(proposal.marginal, Scalar)
    assert (proposal.marginal.probs[0] > 0).tolist() == [True, False, True, True]


def test_options_are_the_best_tokens_of_each_position() -> None:
    model = FakeModel()
    proposal = drafter_of(model, "b", "d").propose([ASKS[1], ASKS[3]], width=5)
    logits, _ = model.blocks([0], ASKS[3:])
    best = logits[0].log_softmax(-1).topk(5)
    assert proposal.options is not None
    assert proposal.options.tokens[1].tolist() == (best.indices + 20).tolist()
    torch.testing.assert_close(proposal.options.log_probs[1], best.values)
    assert proposal.options.tokens[1, :, 0].tolist() == proposal.tokens[1].tolist()
    assert bool((proposal.options.log_probs[0] == float("-inf")).all())


@pytest.mark.parametrize("size", [2, 63, 64, 65, 200, 256])
def test_best_two(size: int) -> None:
    logits = torch.randn(3, 5, size, generator=seeded(size))
    best, distance = best_two(logits)
    two = logits.topk(2).values
    assert torch.equal(best, logits.argmax(-1)) and torch.equal(distance, two[..., 0] - two[..., 1])


def test_best_two_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(4, 300)
    logits[1, [80, 90, 299]] = 5.0
    logits[2, [63, 64]] = 2.0
    logits[3, 7] = float("nan")
    best, distance = best_two(logits)
    assert best[:3].tolist() == [0, 80, 63] and distance.tolist() == [0.0] * 4
    assert 0 <= int(best[3]) < 300
    alone = torch.full((1, 70), float("-inf"))
    alone[0, 5] = 1.0
    assert best_two(alone)[0].item() == 5 and best_two(alone)[1].item() > 1e30
