"""How much a sequence may draft: its own wish, what its drafts were worth lately, and what a step costs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.scheduling.drafting import PATIENCE, PROBE, DraftControl, survival_rate
from engine.types import (
    Capacity,
    CostTable,
    DecodeTraits,
    ScheduledSeq,
    SeqResult,
    Sequence,
    SpeculationParams,
    VerifierStats,
)
from engine.verification import VerifierCard
from tests.unit.fakes import VOCAB, Driver, SpeculativeDevice, make_request, make_scheduler

FLAT = ((1, 1.0), (64, 1.0))  # the width is free
STEEP = ((1, 1.0), (64, 64.0))  # every token costs as much as the first


def control(costs: tuple[tuple[int, float], ...] = (), *, drafts: bool = True) -> DraftControl:
    return DraftControl(Capacity(64, 4, 256, VOCAB, DecodeTraits(lookahead=5, drafts=drafts), costs))


def sequence(**wish: object) -> Sequence:
    return Sequence(make_request("a", speculation=SpeculationParams(**wish)))  # type: ignore[arg-type]


def grants(drafting: DraftControl, *seqs: Sequence) -> list[int]:
    """In a step that feeds one token of each."""
    return drafting.grants([(seq, 1) for seq in seqs], len(seqs))


def tell(drafting: DraftControl, seq: Sequence, drafted: int, accepted: int, lookahead: int = 5) -> None:
    item = ScheduledSeq("a", 0, (1,), lookahead, (0,))
    drafting.observe(seq, item, SeqResult("a", (1,), 1, drafted=drafted, accepted=accepted))


def test_costs_lie_on_lines_through_the_measured_points() -> None:
    costs = CostTable(((1, 10.0), (4, 16.0), (8, 40.0)))
    expected = [8.0, 10.0, 12.0, 14.0, 16.0, 22.0, 28.0, 34.0, 40.0, 46.0, 52.0]
    assert [costs.seconds(tokens) for tokens in range(11)] == costs.upto(10) == expected
    assert costs.upto(3)[:4] == expected[:4] and costs.upto(12)[12] == 64.0
    assert not CostTable(()) and not CostTable(((1, 1.0),))


@pytest.mark.parametrize(
    ("wish", "most"),
    [({}, 5), ({"max_draft": 3}, 3), ({"max_draft": 50}, 5), ({"max_draft": 0}, 0), ({"enabled": False}, 0)],
)
def test_a_request_sets_its_own_bound(wish: dict[str, object], most: int) -> None:
    assert grants(control(), sequence(**wish)) == [most]
    assert grants(control(FLAT), sequence(**wish)) == [most]


def test_lookahead_that_is_no_draft_is_nobodys_choice() -> None:
    drafting = control(STEEP, drafts=False)
    assert grants(drafting, sequence(enabled=False)) == [5]


def test_drafts_are_granted_while_they_pay() -> None:
    assert grants(control(FLAT), sequence()) == [5]
    assert grants(control(STEEP), sequence()) == [0]
    # A second token costs a fifth of the first: it must stand with a better chance than that.
    cheap = control(((1, 1.0), (2, 1.2), (64, 13.6)))
    good, bad = sequence(), sequence()
    for _ in range(20):
        tell(cheap, good, 5, 5)
        tell(cheap, bad, 5, 0)
    assert grants(cheap, good) == [5] and grants(cheap, bad) == [0]
    assert grants(cheap, bad, good)[0] == 0


def test_the_most_promising_come_first() -> None:
    drafting = control(((1, 1.0), (6, 1.1), (12, 4.0)))
    good, fair = sequence(), sequence()
    for _ in range(20):
        tell(drafting, good, 5, 5)
        tell(drafting, fair, 2, 1)
    assert grants(drafting, fair, good) == [0, 4], "four more are nearly free, and the best should have them"


def test_an_offer_that_was_not_made_says_nothing() -> None:
    drafting = control(STEEP)
    seq = sequence()
    before = survival_rate(seq.survival)
    tell(drafting, seq, 0, 0)
    assert survival_rate(seq.survival) == before and seq.survival.resting == 0 and drafting.rounds == 0


def test_a_resting_sequence_is_probed_now_and_then_and_less_often_when_probes_fail() -> None:
    drafting = control(STEEP)
    seq = sequence()
    waits = []
    for accepted in (0, 0, 0, 0, 0, 0, PROBE):
        steps = 0
        while grants(drafting, seq) == [0]:
            tell(drafting, seq, 0, 0, lookahead=0)
            steps += 1
        assert grants(drafting, seq) == [PROBE]
        tell(drafting, seq, 0, 0, lookahead=PROBE)  # nothing was found to draft: the probe stays due
        assert grants(drafting, seq) == [PROBE]
        tell(drafting, seq, PROBE, accepted, lookahead=PROBE)
        waits.append(steps)
    assert waits == [32, 64, 128, 256, 512, 512, 512]
    assert seq.survival.patience == PATIENCE[0], "a probe that was right: times have changed"


def test_totals_are_kept_by_position() -> None:
    drafting = control()
    seq = sequence()
    for drafted, accepted in ((5, 3), (2, 2), (4, 0), (0, 0)):
        tell(drafting, seq, drafted, accepted)
    assert (drafting.rounds, drafting.drafted, drafting.accepted) == (3, 11, 5)
    assert drafting.accepted_at == [2, 2, 1, 0, 0]


def test_the_scheduler_reports_totals_and_each_rounds_share() -> None:
    scheduler = make_scheduler(SpeculativeDevice.traits, blocks=32)
    driver = Driver(scheduler, SpeculativeDevice(32, random.Random(1)))
    scheduler.add(make_request("a", 4, 40))
    driver.drain()
    stats = scheduler.stats()
    updates = driver.updates["a"]
    assert stats.spec_drafted == sum(update.drafted for update in updates) > 20
    assert stats.spec_accepted == sum(update.accepted for update in updates) == sum(stats.spec_accepted_at) > 10
    assert stats.spec_rounds == sum(update.drafted > 0 for update in updates)


@pytest.mark.parametrize(("max_tokens", "lookahead"), [(1, 0), (2, 1), (4, 3), (9, 5)])
def test_no_draft_is_longer_than_what_is_left_to_say(max_tokens: int, lookahead: int) -> None:
    """A round commits one token more than it drafts."""
    scheduler = make_scheduler(SpeculativeDevice.traits, blocks=32)
    scheduler.add(make_request("a", 4, max_tokens))
    assert scheduler.schedule().items[0].lookahead == lookahead


def test_rounds_are_told_by_verifier() -> None:
    """Of what requests name; those that name nothing have the server's own, which comes first on the list."""
    card = VerifierCard("own", True, "The server's.")
    traits = DecodeTraits(lookahead=5, drafts=True)
    drafting = DraftControl(Capacity(64, 4, 256, VOCAB, traits, verifiers=(card, replace(card, name="other"))))
    item = ScheduledSeq("a", 0, (1,), 5, (0,))
    rounds = [("", 3, 1, (0.25, 0.0)), ("other", 2, 2, ()), ("own", 4, 0, (0.5,)), ("other", 0, 0, ())]
    for name, drafted, accepted, bias in rounds:
        new = (1,) * (accepted + 1)
        drafting.observe(
            sequence(verifier=name), item, SeqResult("a", new, 1, drafted=drafted, accepted=accepted, bias=bias)
        )
    own, other = drafting.by_verifier()
    assert own == VerifierStats("own", rounds=2, drafted=7, accepted=1, tokens=3, bias=0.75)
    assert other == VerifierStats("other", rounds=1, drafted=2, accepted=2, tokens=3)
