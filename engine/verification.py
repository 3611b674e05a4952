"""What a verifier is, as every process may know it: its name, its knobs and how far it may leave the target's law.

Standard library only. Cards are declared by the verifiers themselves, travel from the worker to the front process, and
are what requests are checked against.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Knob:
    """A number that a verifier takes, in [low, high].

    `neutral`: the value at which the verifier is lossless; at any other, no token's law moves further from the target's
    than the distance from it, in total variation. None: this knob bounds nothing.
    """

    name: str
    default: float
    low: float
    high: float
    text: str
    neutral: float | None = None
    whole: bool = False  # only integers

    def problem(self, value: object) -> str | None:
        """What is wrong with a value; None where nothing is."""
        kinds = (int,) if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not self.low <= value <= self.high:
            kind = "an integer" if self.whole else "a number"
            return f"must be {kind} between {self.low:g} and {self.high:g}"
        return None


def settle_knobs(knobs: Iterable[Knob], given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """All knobs with their values, in declared order; `given` holds only names that are declared."""
    values = ((knob, given.get(knob.name, knob.default)) for knob in knobs)
    return tuple((knob.name, int(value) if knob.whole else float(value)) for knob, value in values)


def knob_names(knobs: Iterable[Knob]) -> str:
    """Their names, for messages."""
    return ", ".join(knob.name for knob in knobs) or "none"


@dataclass(frozen=True, slots=True)
class VerifierCard:
    """`lossless` ones keep the target's law whatever is drafted; `exact` ones its very tokens under a seed, too."""

    name: str
    lossless: bool
    text: str
    knobs: tuple[Knob, ...] = ()
    exact: bool = False
    drawn: bool = False  # weighs laws, so that drafts may be drawn (`sample`)

    def settle(self, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """All knobs with their values, in declared order; `given` holds only names that are declared."""
        return settle_knobs(self.knobs, given)

    def bound(self, values: Mapping[str, float]) -> float:
        """How far a token's law may be from the target's at most, in total variation; 0 is lossless."""
        if self.lossless:
            return 0.0
        bounds = (abs(values.get(k.name, k.default) - k.neutral) for k in self.knobs if k.neutral is not None)
        return min(bounds, default=1.0)

    def reachable(self, ceiling: float) -> bool:
        """Is there a setting that keeps within this distance?"""
        return self.lossless or ceiling >= 1 or any(knob.neutral is not None for knob in self.knobs)
