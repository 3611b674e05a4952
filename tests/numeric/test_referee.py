"""Which verifier a request has, and who pays for it: groups of a step, what they are given, what nobody else sees."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.pipelines.choices import Choice, Menu, ThinkingSpan
from engine.pipelines.referee import Group, proposal_of
from engine.pipelines.shaping import WIDTH, Shaper
from engine.pipelines.speculative import SpeculativePipeline
from engine.pipelines.states import SeqState, Share
from engine.pipelines.survival import ENOUGH, SurvivalByKind
from engine.protocols import (
    Delta,
    Dense,
    DraftAsk,
    DraftProposal,
    DraftSampler,
    Rows,
    Scalar,
    TargetRows,
    Verdict,
    Verifier,
)
from engine.runtime.batch import AttentionMode, SeqInput
from engine.runtime.sampler import Sampler, SamplingState
from engine.types import Request, SamplingParams, ScheduledSeq, SpeculationParams
from tests.relaxed import SEGMENTS, made, under
from tests.relaxed import verifiers as offered
from tests.sequences import SegmentDrafter, SegmentRunner, requests, serve


def menu(*names: str, sample: bool = False, tree: bool = False, knobs: Mapping[str, float] | None = None) -> Menu:
    return Menu(offered(*names), knobs or {}, sample=sample, tree=tree)


def wish(name: str = "", **others: object) -> SpeculationParams:
    return SpeculationParams(verifier=name, **others)  # type: ignore[arg-type]


def name_of(choice: Choice) -> str:
    return choice.verifier.card.name


def test_a_request_has_its_own_verifier_or_the_servers() -> None:
    served = menu("ensemble", knobs={"target_weight": 0.4})
    default = served.choose(wish(), 0.8)
    assert (name_of(default), default.knobs, default.temperature) == ("ensemble", {"target_weight": 0.4}, 0.8)
    named = served.choose(wish("ensemble"), 0.0)  # the server's knobs are for those that name nothing
    assert (named.knobs, named.temperature) == ({"target_weight": 0.7}, 1.0)
    typical = served.choose(wish("typical", knobs=(("posterior_alpha", 0.2),)), 0.8)
    assert typical.knobs == {"posterior_threshold": 0.3, "posterior_alpha": 0.2} and typical.temperature == 0
    assert name_of(served.choose(wish("strict"), 0.8)) == "strict"


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("ensemble", {"target_weight": 1.0}), ("bounded", {"epsilon": 0}), ("diversed", {"min_weight": 1.0})],
)
def test_a_verifier_that_may_relax_nothing_is_the_exact_one(name: str, knobs: dict[str, float]) -> None:
    by_request = menu("strict", sample=False).choose(wish(name, knobs=tuple(knobs.items()), sample=True), 0.8)
    by_default = menu(name, tree=True, knobs=knobs).choose(wish(), 0.8)  # and may then verify trees
    for choice in (by_request, by_default):
        assert (name_of(choice), choice.knobs, choice.drawn, choice.temperature) == ("strict", {}, False, 0.0)


def test_drafts_are_drawn_for_those_that_wish_it_where_it_helps() -> None:
    """With a temperature, and a verifier that weighs laws; a marginal is then of no use."""
    for server in (False, True):
        served = menu("rejection", sample=server)
        for own in (None, False, True):
            for name in ("strict", "rejection", "ensemble", "typical"):
                for temperature in (0.0, 0.7):
                    choice = served.choose(wish(name, sample=own), temperature)
                    wanted = (server if own is None else own) and temperature > 0 and name != "strict"
                    assert choice.drawn == wanted
                    assert (choice.temperature > 0) == (name == "ensemble" and not wanted)


def test_relaxation_inside_of_a_thinking_span_alone() -> None:
    served = menu("strict")
    inside = served.choose(wish("lenient", thinking_only=True, thinking=(5, 6)), 1.0)
    assert (name_of(inside), inside.thinking, inside.outside.card.name) == ("lenient", (5, 6), "strict")
    assert name_of(served.choose(wish("lenient", thinking_only=True), 1.0)) == "strict"  # there is no such span
    lossless = served.choose(wish("rejection", thinking_only=True, thinking=(5, 6)), 1.0)
    assert (name_of(lossless), lossless.thinking) == ("rejection", None)


def test_what_the_servers_verifier_has_no_use_for_is_refused() -> None:
    for name in ("rejection", "ensemble"):
        with pytest.raises(ConfigError, match=r"models\.draft\.tree.*models\.verifier\.name"):
            menu(name, tree=True)
    with pytest.raises(ConfigError, match=r"models\.draft\.sample.*models\.verifier\.name"):
        menu("strict", sample=True)
    with pytest.raises(AssertionError, match="exact"):
        Menu([made("lenient")], {}, sample=False, tree=False)


def test_thinking_spans_are_those_of_a_plain_search() -> None:
    rng = random.Random(3)
    for _ in range(300):
        text = [rng.randrange(4) for _ in range(rng.randrange(12))]
        drafts = [rng.randrange(4) for _ in range(rng.randrange(6))]
        span = ThinkingSpan((1, 2), text)
        expected = []
        for place in range(len(drafts) + 1):
            marks = [token for token in text + drafts[:place] if token in (1, 2)]
            expected.append(marks[-1:] == [1])
        assert span.ahead(drafts) == expected[:-1] and span.inside == expected[0]
        for token in drafts:
            span.push(token)
        assert span.inside == expected[-1]


# ---- proposals of groups ---------------------------------------------------------------------------------


CHOSEN = Delta()


def whole(law: Delta | Dense = CHOSEN) -> DraftProposal:
    tokens = torch.tensor([[1, 2, 3], [4, -1, -1], [5, 6, -1], [7, 8, 9]])
    marginal, hidden = Scalar(torch.rand(4, 3)), torch.rand(4, 3, 5)
    return DraftProposal(tokens, (3, 1, 2, 3), law, marginal, hidden, margins=torch.rand(4, 3))


def test_a_group_gets_what_its_verifier_reads_and_no_more() -> None:
    proposal = whole()
    part = proposal_of(proposal, Group(made("diversed"), False, [1, 2], False))
    assert part.tokens.tolist() == [[4, -1], [5, 6]] and part.lengths == (1, 2)
    assert isinstance(part.marginal, Scalar) and isinstance(proposal.marginal, Scalar) and part.hidden is not None
    assert torch.equal(part.marginal.probs, proposal.marginal.probs[1:3, :2])
    assert proposal.hidden is not None and torch.equal(part.hidden, proposal.hidden[1:3, :2])
    rows = proposal_of(
        replace(proposal, marginal=Rows(torch.rand(4, 3, 9))), Group(made("ensemble"), False, [3], False)
    )
    assert isinstance(rows.marginal, Rows) and rows.marginal.probs.shape == (1, 3, 9) and rows.hidden is None
    strict = proposal_of(proposal, Group(made("strict"), False, [0], False))
    assert strict.marginal is None and strict.hidden is None and strict.margins is None
    assert proposal_of(proposal, Group(made("diversed"), False, range(4), True)) is proposal


def test_drawn_groups_get_the_laws_of_their_drafts_and_chosen_ones_none() -> None:
    """Whatever the order that the laws come in, and whether the drafter made some for all drafts or not."""
    probs = torch.rand(4, 3, 9)
    laws = {None: Dense(probs), (3, 0, 2): Dense(probs[[3, 0, 2]], (3, 0, 2))}
    for law in laws.values():
        proposal = whole(law)
        for members in ([0, 2], [3], [0, 2, 3]):
            part = proposal_of(proposal, Group(made("rejection"), True, members, False))
            assert isinstance(part.law, Dense) and part.law.rows is None
            assert torch.equal(part.law.probs, probs[members][:, : max(part.lengths)])
            part = proposal_of(proposal, Group(made("rejection"), False, members, False))
            assert isinstance(part.law, Delta)
    assert proposal_of(whole(laws[None]), Group(made("block"), True, range(4), True)).law is laws[None]
    assert isinstance(proposal_of(whole(laws[None]), Group(made("lenient"), False, range(4), True)).law, Delta)


# ---- who pays for what -----------------------------------------------------------------------------------


@dataclass
class Spies:
    """A pipeline over the toy target that notes what its parts are asked for, in each step."""

    temperatures: list[tuple[str, float]] = field(default_factory=list)
    drawn: list[tuple[str, bool]] = field(default_factory=list)
    law_rows: list[int] = field(default_factory=list)
    states: list[bool] = field(default_factory=list)
    verified: list[tuple[str, DraftProposal, TargetRows]] = field(default_factory=list)

    def pipeline(self, monkeypatch: pytest.MonkeyPatch) -> SpeculativePipeline:
        spies, known = self, Sampler.processed_log_probs

        class Drafter(SegmentDrafter):
            def propose(
                self, asks: Sequence[DraftAsk], sampler: DraftSampler | None = None, width: int = 0
            ) -> DraftProposal:
                spies.temperatures += [(ask.request_id, ask.temperature) for ask in asks if ask.limit]
                spies.drawn += [
                    (ask.request_id, sampler is not None and sampler.draws(i)) for i, ask in enumerate(asks)
                ]
                return super().propose(asks, sampler, width)

        class Runner(SegmentRunner):
            def forward(
                self,
                inputs: Sequence[SeqInput],
                rows: Sequence[int],
                mode: AttentionMode = AttentionMode.CAUSAL,
                block_length: int = 1,
            ) -> Tensor:
                spies.states.append(False)
                return super().forward(inputs, rows, mode, block_length)

            def forward_with_states(
                self,
                inputs: Sequence[SeqInput],
                rows: Sequence[int],
                mode: AttentionMode = AttentionMode.CAUSAL,
                block_length: int = 1,
                *,
                read: Sequence[int] | None = None,
            ) -> tuple[Tensor, Tensor]:
                found = super().forward_with_states(inputs, rows, mode, block_length, read=read)
                spies.states[-1] = True
                return found

        def counted(self: Sampler, logits: Tensor, states: Sequence[SamplingState], *, soft: bool = False) -> Tensor:
            spies.law_rows.append(len(logits))
            return known(self, logits, states, soft=soft)

        monkeypatch.setattr(Sampler, "processed_log_probs", counted)
        drafter = Drafter(SEGMENTS)
        offers = [Spy(verifier, self) for verifier in offered("strict")]
        return SpeculativePipeline(Runner(SEGMENTS), drafter, offers, drafter.most)


class Spy:
    """A verifier, and what it is called with."""

    def __init__(self, inner: Verifier, spies: Spies) -> None:
        self._inner, self._spies, self.card = inner, spies, inner.card
        self.needs_laws, self.needs_marginal = inner.needs_laws, inner.needs_marginal
        self.needs_states, self.trees = inner.needs_states, inner.trees

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        self._spies.verified.append((self.card.name, proposal, target))
        return self._inner.verify(proposal, target)


def test_strict_requests_pay_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone: no laws, no marginals, no sampler, no states. Beside others: these, for the others' rows alone."""
    spies = Spies()
    asked = [under(one, "strict", sample=True) for one in requests(4, temperature=0.8)]
    serve(spies.pipeline(monkeypatch), asked)
    assert spies.verified and not spies.law_rows and not any(spies.states)
    assert not any(t for _, t in spies.temperatures) and not any(drawn for _, drawn in spies.drawn)
    for _, _, target in spies.verified:
        paid = (target.log_probs, target.chance, target.greedy, target.free, target.states)
        assert all(part is None for part in paid) and not target.knobs
    spies = Spies()
    others = [under(one, "ensemble") for one in requests(1, temperature=0.8)]
    others += [under(one, "rejection", sample=True) for one in requests(1, temperature=0.6)]
    serve(spies.pipeline(monkeypatch), [*asked, *others])
    assert {name.split()[1] for name, t in spies.temperatures if t} == {"ensemble"}
    assert {t for _, t in spies.temperatures} == {0.0, 0.8}
    assert {name.split()[1] for name, drawn in spies.drawn if drawn} == {"rejection"}
    assert max(spies.law_rows) <= 4  # a draft of three tokens
    kinds = {(name, type(proposal.law)) for name, proposal, _ in spies.verified}
    assert kinds == {("strict", Delta), ("ensemble", Delta), ("rejection", Dense)}


def test_relaxed_verifiers_get_what_the_contract_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Knobs of each request, who is greedy, where relaxing is free, and states only in steps that need them."""
    spies = Spies()
    asked = [replace(under(one, "diversed"), id=f"d{i}") for i, one in enumerate(requests(2, temperature=0.8))]
    asked[1] = replace(
        asked[1],
        sampling=replace(asked[1].sampling, temperature=0.0, max_tokens=9),
        prompt_ids=(0, 0, 0, 0),  # the toy drafts 1, 0, 1
        speculation=replace(asked[1].speculation, knobs=(("min_weight", 0.75),), thinking_only=True, thinking=(0, 1)),
    )
    late = [replace(under(one, "typical"), id="t") for one in requests(1, length=60, temperature=0.8)]
    quiet = [replace(under(one, "diversed", enabled=False), id="q") for one in requests(1, length=60, temperature=0.8)]
    serve(spies.pipeline(monkeypatch), [*asked, *late, *quiet])
    seen = [(proposal, target) for name, proposal, target in spies.verified if name == "diversed"]
    assert 0 < sum(spies.states) == len(seen) < len(spies.states)
    both = [target for _, target in seen if len(target.draws) == 2]
    assert both
    for target in both:
        assert target.knobs["min_weight"].tolist() == [0.25, 0.75] and target.knobs["min_weight"].dtype == torch.float64
        assert target.greedy is not None and target.greedy.tolist() == [False, True]
        assert target.free is not None and target.free.dtype == torch.bool and target.free[0].all()
    assert both[0].free is not None and both[0].free[1].tolist() == [True, False, True]
    for proposal, target in seen:
        width = proposal.tokens.shape[1]
        assert target.states is not None and target.log_probs is not None and proposal.hidden is not None
        assert isinstance(proposal.marginal, Scalar) and proposal.marginal.probs.shape == proposal.tokens.shape
        assert target.states.shape[:2] == target.log_probs.shape[:2] == (len(proposal.lengths), width + 1)
        for i, length in enumerate(proposal.lengths):
            # The toy's states are its logits: at temperature 1, as greedy requests have it, these are the law's own.
            temperature = 1.0 if target.greedy is not None and target.greedy[i] else 0.8
            own = (target.states[i, : length + 1] / temperature).log_softmax(1)
            torch.testing.assert_close(target.log_probs[i, : length + 1], own)


def share(speculation: SpeculationParams, served: Menu) -> Share:
    request = Request("r", (1,) * 5, SamplingParams(20), speculation=speculation)
    item = ScheduledSeq("r", 4, (1,), 3, (0, 1))
    state = SeqState([1] * 5, 5, SamplingState(request), 4, served.choose(speculation, 1.0))
    return Share(item, state, 4, item.tokens, samples=True)


def test_nobody_grows_trees_beside_a_request_whose_verifier_knows_chains_only() -> None:
    served, shaper = menu("strict"), Shaper(tree=4)
    strict = [
        share(wish(name, knobs=knobs), served) for name, knobs in (("strict", ()), ("bounded", (("epsilon", 0.0),)))
    ]
    assert shaper.width(strict) == WIDTH
    assert shaper.width([*strict, share(wish("bounded"), served)]) == 0
    assert shaper.width([*strict, share(wish("rejection"), served)]) == 0


def test_survival_is_learned_for_each_kind_of_draft() -> None:
    """What always stands under one verifier does not under another; a mixed step is what its kinds are alone."""
    both, margins = SurvivalByKind(), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    for _ in range(4 * ENOUGH):
        both.observe(["relaxed", "strict"], margins, [2, 2], [2, 0])
    (first, _), (second, _) = both.chances(["relaxed", "strict"], margins, [2, 2])
    assert first > 0.9 and second < 0.1
    assert both.chances(["strict", "new", "relaxed"], margins[[0, 0, 0]], [1, 2, 0])[0] == [second]
    assert both.chances(["strict", "new", "relaxed"], margins[[0, 0, 0]], [1, 2, 0])[2] == []
