"""What `slipstream bench verifiers` sweeps: verifiers with values of one of their knobs.

On the command line each is NAME[:KNOB][=VALUE,VALUE ...][+drawn]: the first knob where none is named, its default where
no value is given, drafts that are drawn instead of chosen with `+drawn`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.stream import BenchmarkError
from engine.errors import InvalidRequest
from engine.speculation import settle
from engine.types import ModelInfo, SpeculationParams

STRICT = "strict"  # what everything is compared with
DEFAULTS = (
    "strict",
    "rejection",
    "rejection+drawn",
    "block+drawn",
    "ensemble=.9,.7,.5,.3",
    "ensemble=.9,.7,.5,.3+drawn",
    "bounded=.05,.1,.2,.4",
    "lenient=.8,.5,.25",
    "typical:posterior_alpha=.3,.09,.03",
    "top_k_gap:relaxed_delta=.5,1,2",
    "diversed=.9,.7,.5,0",
)


@dataclass(frozen=True, slots=True)
class Wish:
    """One word of the command line."""

    name: str
    knob: str = ""
    values: tuple[float, ...] = ()
    drawn: bool = False


@dataclass(frozen=True, slots=True)
class Variant:
    """One verifier with all of its knobs, and what it is called in tables. `value`: of the knob that is swept."""

    name: str
    wish: SpeculationParams
    value: float | None = None
    lossless: bool = True

    @property
    def verifier(self) -> str:
        return self.wish.verifier

    @property
    def drawn(self) -> bool:
        return bool(self.wish.sample)

    def at(self, temperature: float) -> bool:
        """Is it anything of its own there? Of greedy requests drafts are chosen, and lossless answers are strict's."""
        return temperature > 0 or self.verifier == STRICT or not (self.lossless or self.drawn)


def wish(text: str) -> Wish:
    """Read one word. Raises argparse.ArgumentTypeError."""
    given, plus, how = text.partition("+")
    named, equals, listed = given.partition("=")
    name, colon, knob = named.partition(":")
    try:
        values = tuple(map(float, listed.split(","))) if equals else ()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {listed!r} are not numbers between commas") from error
    if not name or (plus and how != "drawn") or (colon and not knob):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME[:KNOB][=VALUE,VALUE ...][+drawn]")
    return Wish(name, knob, values, bool(plus))


def variants(wishes: Iterable[Wish], info: ModelInfo) -> list[Variant]:
    """Strict first, then what was asked for, each once. Raises BenchmarkError for what can't be asked of this model."""
    found = [variant for one in (Wish(STRICT), *wishes) for variant in _variants(one, info)]
    return list({variant.name: variant for variant in found}.values())


def offered(wishes: Iterable[Wish], info: ModelInfo) -> tuple[list[Wish], list[str]]:
    """Those of the wishes that this model can grant, and the names of the other verifiers."""
    wishes, known = list(wishes), {card.name for card in info.verifiers}
    return [one for one in wishes if one.name in known], sorted({one.name for one in wishes} - known)


def _variants(one: Wish, info: ModelInfo) -> list[Variant]:
    first = next((card.knobs[0].name for card in info.verifiers if card.name == one.name and card.knobs), "")
    knob = one.knob or first
    values = one.values or (None,)
    return [_variant(one, info, knob, value, "" if knob == first else f" {knob}") for value in values]


def _variant(one: Wish, info: ModelInfo, knob: str, value: float | None, shown: str) -> Variant:
    """Settled as every request is."""
    number = int(value) if value is not None and value.is_integer() else value
    given = () if number is None else ((knob, number),)
    asked = SpeculationParams(verifier=one.name, knobs=given, sample=one.drawn)
    try:
        settled = settle(asked, info)
    except InvalidRequest as error:
        raise BenchmarkError(f"--verifiers {one.name}: {error.message}") from error
    name = one.name + (shown if one.knob or value is not None else "") + ("" if value is None else f" {value:g}")
    lossless = next(card.lossless for card in info.verifiers if card.name == one.name)
    return Variant(name + " drawn" * one.drawn, settled, value, lossless)
