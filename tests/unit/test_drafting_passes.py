"""Who is drafted for where every draft costs a pass: sets, probes, and a purse that bounds what wrong beliefs cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.scheduling.drafting import DraftControl
from engine.scheduling.passes import LOAN, PURSE, SHARE
from engine.types import ScheduledSeq, SeqResult, Sequence, SpeculationParams, StepOutput
from tests.draft_load import CAPACITY, DRAFTS, LONGEST, STEPS, Load
from tests.unit.fakes import make_request, make_scheduler

PLAIN = dict(STEPS)


def sequences(count: int, **wish: object) -> list[Sequence]:
    wishes = SpeculationParams(**wish)  # type: ignore[arg-type]
    return [Sequence(make_request(f"{i}", 4, 500, speculation=wishes), limit=504) for i in range(count)]


def grants(control: DraftControl, seqs: list[Sequence]) -> list[int]:
    return control.grants([(seq, 1) for seq in seqs], len(seqs))


def tell(control: DraftControl, seqs: list[Sequence], accepted: list[int], granted: list[int] | None = None) -> None:
    """A step in which drafts of those with grants, all by default, were verified whole and stood so far."""
    granted = [LONGEST] * len(seqs) if granted is None else granted
    items = [ScheduledSeq(seq.request.id, 0, (1,), grant, ()) for seq, grant in zip(seqs, granted, strict=True)]
    results = [
        SeqResult(seq.request.id, (1,), 1, drafted=grant, accepted=min(stood, grant))
        for seq, grant, stood in zip(seqs, granted, accepted, strict=True)
    ]
    control.settle(items, StepOutput(0, tuple(results)))
    for seq, item, result in zip(seqs, items, results, strict=True):
        control.observe(seq, item, result)


def believe(control: DraftControl, seqs: list[Sequence], accepted: list[int], rounds: int = 30) -> None:
    """Such rounds were seen, and nobody asks what they cost."""
    for _ in range(rounds):
        for seq, stood in zip(seqs, accepted, strict=True):
            item = ScheduledSeq(seq.request.id, 0, (1,), LONGEST, ())
            control.observe(seq, item, SeqResult(seq.request.id, (1,), 1, drafted=LONGEST, accepted=stood))


def rests(control: DraftControl, seqs: list[Sequence]) -> int:
    """Plain steps until somebody is drafted for again."""
    steps = 0
    while not any(grants(control, seqs)):
        tell(control, seqs, [0] * len(seqs), [0] * len(seqs))
        steps += 1
    return steps


def test_one_stream_drafts_from_the_start_and_as_long_as_it_pays() -> None:
    control, (seq,) = DraftControl(CAPACITY), sequences(1)
    assert grants(control, [seq]) == [LONGEST], "the pipeline decides what of it is verified"
    for _ in range(20):
        tell(control, [seq], [4])
        assert grants(control, [seq]) == [LONGEST]
    lost = 0
    while grants(control, [seq]) == [LONGEST] and lost < 50:
        tell(control, [seq], [0])
        lost += 1
    assert lost * (DRAFTS[0][1] + PLAIN[8] - PLAIN[1]) <= (PURSE + 1) * PLAIN[1], "no more than the purse holds"
    assert grants(control, [seq]) == [0]


def test_thirty_two_streams_draft_only_if_nearly_everything_stands() -> None:
    control, seqs = DraftControl(CAPACITY), sequences(32)
    assert grants(control, seqs) == [0] * 32
    for stood, pays in ((2, False), (4, False), (LONGEST, True)):
        believe(control, seqs, [stood] * 32)
        assert any(grants(control, seqs)) is pays, stood


def test_of_a_mixed_crowd_the_promising_are_drafted_for() -> None:
    control, seqs = DraftControl(CAPACITY), sequences(8)
    believe(control, seqs, [LONGEST, 0, 0, LONGEST, 0, 0, 0, 0])
    assert grants(control, seqs) == [LONGEST, 0, 0, LONGEST, 0, 0, 0, 0]


def test_nobody_is_drafted_for_before_the_prompt_is_computed_or_for_a_last_token() -> None:
    control, (seq, other) = DraftControl(CAPACITY), sequences(2)
    assert control.grants([(seq, 40), (other, 1)], 41) == [0, LONGEST]
    seq.limit = seq.num_tokens + 3
    other.limit = other.num_tokens + 1
    assert grants(control, [seq, other]) == [2, 0]
    scheduler = make_scheduler(CAPACITY.traits, blocks=64, costs=STEPS, draft_costs=DRAFTS)
    scheduler.add(make_request("a", 9, 30))
    (item,) = scheduler.schedule().items
    assert (len(item.tokens), item.lookahead) == (9, 0)
    scheduler.update(StepOutput(0, (SeqResult("a", (5,), 9),)))
    assert scheduler.schedule().items[0].lookahead == LONGEST


@pytest.mark.parametrize(("wish", "most"), [({"max_draft": 3}, 3), ({"max_draft": 0}, 0), ({"enabled": False}, 0)])
def test_a_request_sets_its_own_bound(wish: dict[str, object], most: int) -> None:
    assert grants(DraftControl(CAPACITY), sequences(1, **wish)) == [most]


def test_a_new_sequence_is_believed_to_be_like_those_before_it() -> None:
    control = DraftControl(CAPACITY)
    for seq in sequences(6):
        for _ in range(3):
            tell(control, [seq], [0])
            tell(control, [seq], [0], [0])
    assert grants(control, sequences(1)) == [0]


def test_what_was_only_foreseen_counts_as_if_it_had_been_seen() -> None:
    control, seqs = DraftControl(CAPACITY), sequences(2)
    item = ScheduledSeq("0", 0, (1,), LONGEST, ())
    for _ in range(20):
        control.observe(seqs[0], item, SeqResult("0", (1,), 1, drafted=2, accepted=2, foreseen=(0.2, 0.8)))
        control.observe(seqs[1], item, SeqResult("0", (1,), 1, drafted=3, accepted=2))
    ours, theirs = (seq.survival for seq in seqs)
    assert ours.stood == pytest.approx(theirs.stood * 1.1) and ours.fell == pytest.approx(theirs.fell * 0.8)


@pytest.mark.parametrize("streams", [1, 8, 32])
def test_probes_that_fail_cost_no_more_than_their_share(streams: int) -> None:
    control, seqs = DraftControl(CAPACITY), sequences(streams)
    believe(control, seqs, [0] * streams)
    rests(control, seqs)
    lost, steps = 0.0, 0
    seen = set()
    for _ in range(8):
        granted = grants(control, seqs)
        probed = [i for i, grant in enumerate(granted) if grant]
        seen.update(probed)
        assert len(probed) == min(streams, 8), "a pass for eight costs twice one for one: they probe together"
        tell(control, seqs, [0] * streams, [min(grant, 1) for grant in granted])
        lost += _price(streams, len(probed))
        steps += rests(control, seqs)
    assert lost / (steps * PLAIN[streams]) == pytest.approx(SHARE, rel=0.15)
    assert len(seen) == streams, "those that rested longest are asked first"


def _price(streams: int, width: int) -> float:
    costs = DraftControl(CAPACITY)._costs
    drafts = dict(DRAFTS)[width]
    return drafts + costs.seconds(streams + width) - costs.seconds(streams)


def test_a_probe_that_succeeds_is_followed_up_at_once() -> None:
    control, (seq,) = DraftControl(CAPACITY), sequences(1)
    believe(control, [seq], [0])
    assert rests(control, [seq]) > 10
    for _ in range(6):
        assert grants(control, [seq]) == [LONGEST]
        tell(control, [seq], [LONGEST])


def test_beliefs_that_never_come_true_cost_what_the_purse_holds() -> None:
    """Whatever the pipeline foresees: what counts is what was accepted."""
    control, (seq,) = DraftControl(CAPACITY), sequences(1)
    lost = 0.0
    for _ in range(2000):
        (grant,) = grants(control, [seq])
        item = ScheduledSeq("0", 0, (1,), grant, ())
        seen = SeqResult("0", (1,), 1, drafted=min(grant, 1), accepted=0, foreseen=(6.0, 0.1) if grant else (0.0, 0.0))
        control.settle([item], StepOutput(0, (seen,)))
        control.observe(seq, item, seen)
        lost += DRAFTS[0][1] if grant else 0.0  # the second row is free
    assert lost <= (LOAN + 2000 * SHARE) * PLAIN[1] + DRAFTS[0][1]


def test_reservations_are_modest_where_they_would_be_many() -> None:
    flat = tuple((tokens, 0.05 if tokens <= 48 else 0.05 + (tokens - 48) * 0.01) for tokens in (1, 32, 48, 64))
    control, seqs = DraftControl(replace(CAPACITY, step_costs=flat)), sequences(24)
    believe(control, seqs, [2] * 24)
    granted = grants(control, seqs)
    assert sum(granted) > 0 and max(granted) == 4, "one token each is nearly free, the others are not"
    assert grants(control, seqs[:4]) == [LONGEST] * 4


def test_drafting_that_costs_next_to_nothing_is_granted_token_by_token() -> None:
    control = DraftControl(replace(CAPACITY, draft_costs=((1, 1e-5), (32, 1e-4))))
    assert 0 < max(grants(control, sequences(2))) < LONGEST
    assert control.first(sequences(1)[0]) == LONGEST


@pytest.mark.parametrize("streams", [1, 32])
def test_a_hopeless_draft_costs_a_percent(streams: int) -> None:
    load = Load(streams, lambda *_: 1e-6).run(300 if streams == 1 else 120)
    assert load.speed > 0.97
