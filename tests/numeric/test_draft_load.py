"""Draft control under simulated load: it never costs much, and where drafting pays most of the gain is had.

The margins' estimator, the choice of lengths and the scheduler's control are the real ones; time comes from a table.
"""

from __future__ import annotations

import random

import pytest

from engine.types import Sequence
from tests.draft_load import Load, Rate

SIZES = {1: 1500, 4: 700, 8: 400, 32: 150}  # streams: plain steps


def constant(rate: float) -> Rate:
    return lambda _load, _seq: rate


@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["blind", "telling"])
@pytest.mark.parametrize("streams", SIZES)
def test_control_costs_little_where_drafts_fail_and_gains_where_they_stand(streams: int, spread: float) -> None:
    for rate in (1e-6, 0.3, 0.6, 0.8, 0.95):
        ours = Load(streams, constant(rate), spread).run(SIZES[streams])
        assert ours.seconds < 1.03 * ours.plain, rate
        fixed = max(1.0, Load(streams, constant(rate), spread, always=True).run(SIZES[streams]).speed)
        assert ours.speed > 0.9 * fixed, (rate, ours.speed, fixed)


@pytest.mark.parametrize("streams", SIZES)
@pytest.mark.parametrize("period", [7, 30, 200])
def test_no_change_of_survival_over_time_makes_it_dear(streams: int, period: int) -> None:
    for low, high in ((1e-6, 0.9), (1e-6, 0.5), (0.3, 0.98)):
        ours = Load(streams, lambda load, _: (low, high)[load.steps // period % 2]).run(SIZES[streams])  # noqa: B023
        assert ours.seconds < 1.03 * ours.plain, (low, high)


@pytest.mark.parametrize("streams", SIZES)
def test_an_enemy_who_knows_when_drafts_are_made_gains_little(streams: int) -> None:
    """Drafts stand while few are made, and fall as soon as they are made in every step."""

    def spiteful(load: Load, _: Sequence) -> float:
        return 0.97 if load.passes < 0.1 * load.steps else 1e-6

    ours = Load(streams, spiteful).run(SIZES[streams])
    assert ours.seconds < 1.03 * ours.plain


def test_good_drafts_amid_bad_ones_are_found() -> None:
    def half(_: Load, seq: Sequence) -> float:
        return 0.93 if int(seq.request.id) % 2 else 0.1

    assert Load(1, half).run(1500).speed > 1.3
    assert Load(2, half).run(1000).speed > 1.15


def test_load_that_comes_and_goes_is_followed() -> None:
    """Where it pays alone it does not pay in a crowd, and what was learned serves both."""
    alone = Load(1, constant(0.8)).run(400)
    crowd = Load(32, constant(0.8))
    crowd.control = alone.control
    crowd.run(60)
    assert crowd.speed > 0.97 and crowd.passes < 0.3 * crowd.steps
    again = Load(1, constant(0.8), rng=random.Random(2))
    again.control = crowd.control
    assert again.run(200).speed > 0.85 * alone.speed
