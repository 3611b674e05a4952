"""What `slipstream bench diffusion` compares: unmask rules with values of one of their knobs, by cache and verify.

On the command line a rule is NAME[:KNOB][=VALUE,VALUE ...]: the first knob where none is named, its default where no
value is given. Rules that have no knob go by a schedule: there, the values are tokens per denoise step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.stream import BenchmarkError
from engine.diffusion import DiffusionInfo, DiffusionParams, RuleCard

PLAIN = "quota 1"  # one token per step
STEPS = "tokens"  # the knob of a schedule
SWEEP = (
    "quota=1,2,3,4",
    "threshold=.99,.95,.9,.8,.7,.6,.5,.4",
    "factor=.1,.25,.5,.75,1,2,4",
    "factor_compat=.75,1",
    "frechet=.9,.75,.5,.25,0,-1,-3",  # 1 - factor: at each of them it is to commit no less
)
TIMED = ("threshold=.9", "factor=.75", "frechet=.25")
VERIFIES = ("confidence=.5,.9", "exact", "masked_copy=.5")


@dataclass(frozen=True, slots=True)
class Wish:
    """One word of the command line."""

    name: str
    knob: str = ""
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Variant:
    """One rule with its knobs, and what it is called in tables. `value`: of the knob that is swept."""

    name: str
    rule: str
    value: float | None
    params: DiffusionParams

    @property
    def title(self) -> str:
        """With its cache."""
        return f"{self.name}, {self.params.cache}" if self.params.cache else self.name

    def at(self, cache: str) -> Variant:
        """The same with another cache."""
        return replace(self, params=replace(self.params, cache=cache))


def wish(text: str) -> Wish:
    """Read one word. Raises argparse.ArgumentTypeError."""
    named, equals, listed = text.partition("=")
    name, colon, knob = named.partition(":")
    try:
        values = tuple(map(float, listed.split(","))) if equals else ()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {listed!r} are not numbers between commas") from error
    if not name or (colon and not knob):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME[:KNOB][=VALUE,VALUE ...]")
    return Wish(name, knob, values)


def variants(wishes: Iterable[Wish], info: DiffusionInfo, tokens: int, base: DiffusionParams) -> list[Variant]:
    """All values of all words, each once. Steps are counted in the room of answers of so many tokens, in whole blocks.

    Raises BenchmarkError for a rule or knob that the model does not offer.
    """
    cards = {card.name: card for card in info.rules}
    block = base.block_length or info.defaults.block_length
    canvas = -(-tokens // block) * block
    found: dict[str, Variant] = {}
    for one in wishes:
        if one.name not in cards:
            raise BenchmarkError(f"--rules {one.name}: this model offers {', '.join(cards)}")
        for value in one.values or (None,):
            made = _variant(one, value, cards[one.name], canvas, base)
            found[made.name] = made
    return list(found.values())


def matching(found: Iterable[Variant]) -> list[tuple[Variant, Variant]]:
    """Frechet's rule at each margin with the factor rule at 1 - margin, where both are there."""
    swept = {(one.rule, round(one.value, 6)): one for one in found if one.value is not None}
    pairs = (
        (one, swept.get(("factor", round(1 - value, 6)))) for (rule, value), one in swept.items() if rule == "frechet"
    )
    return [(ours, theirs) for ours, theirs in pairs if theirs is not None]


def _variant(one: Wish, value: float | None, card: RuleCard, canvas: int, base: DiffusionParams) -> Variant:
    names = [knob.name for knob in card.knobs]
    knob = one.knob or (names[0] if names else STEPS)
    if knob not in (*names, *([STEPS] if card.scheduled else [])):
        raise BenchmarkError(f"--rules {one.name}:{knob}: its knobs are {', '.join(names) or STEPS}")
    name = one.name + (f" {knob}" if one.knob else "") + ("" if value is None else f" {value:g}")
    if knob == STEPS:
        if value is not None and not 1 <= value <= canvas:
            raise BenchmarkError(f"--rules {one.name}={value:g}: tokens per step are at least 1, and at most {canvas}")
        params = replace(base, rule=one.name, steps=0 if value in (None, 1) else round(canvas / value))
    else:
        params = replace(base, rule=one.name, knobs=() if value is None else ((knob, value),))
    return Variant(name, one.name, value, params)
