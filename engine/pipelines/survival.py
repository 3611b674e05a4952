"""How many drafted tokens are worth a row of the target's pass: from the draft's own margins, and what steps cost.

A token's chance to stand, given that those before it do, is a logistic function of its margin, fitted while serving.
Chances multiply along a draft; of all drafts of a step, the likeliest tokens are verified, as many as bring the most
tokens per second. All of it is known before the target says anything, so it changes no token, only when it comes.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from math import exp
from typing import TYPE_CHECKING

from engine.types import CostTable

if TYPE_CHECKING:
    import torch

DEPTHS = 8  # positions with a curve of their own; deeper ones share the last
START = (0.4, -0.3)  # slope and intercept before anything was seen
TRUST = 20.0  # observations that the start is worth
ENOUGH = 50  # observations between two steps of the fit
MEMORY = 0.9  # weight that a step of the fit leaves to all those before it
LARGEST = 40.0  # margins beyond say no more
CURIOSITY = 16  # every so manieth time one token more than pays is verified, or low chances would never be refuted
STEEPEST = 10.0  # slope; with it, no exponential overflows
STRIDES = (0.5, 2.0)  # most that one step of the fit may change slope and intercept


class Curve:
    """One position's logistic curve: recursive Newton steps with fading memory (an online Laplace approximation)."""

    __slots__ = ("_bb", "_gb", "_gw", "_seen", "_wb", "_ww", "fitted", "intercept", "precision", "slope")

    def __init__(self) -> None:
        self.slope, self.intercept = START
        self.fitted = False
        # What is believed, as the curvature (ww, wb, bb) of the log-likelihood: at first, TRUST even chances of
        # margins 0 and 4.
        self.precision = (2.0 * TRUST, 0.5 * TRUST, 0.25 * TRUST)
        self._clear()

    def _clear(self) -> None:
        self._seen = 0
        self._gw = self._gb = self._ww = self._wb = self._bb = 0.0

    def observe(self, margin: float, stood: bool) -> None:
        """A position whose predecessors all stood was verified."""
        chance = 1.0 / (1.0 + exp(-self.slope * margin - self.intercept))
        error, weight = stood - chance, chance * (1.0 - chance)
        self._seen += 1
        self._gw += error * margin
        self._gb += error
        self._ww += weight * margin * margin
        self._wb += weight * margin
        self._bb += weight
        if self._seen >= ENOUGH:
            self._step()

    def _step(self) -> None:
        ww, wb, bb = (MEMORY * old for old in self.precision)
        ww, wb, bb = ww + self._ww, wb + self._wb, bb + self._bb
        slope, intercept = self.slope, self.intercept
        determinant = (ww + 1e-3) * (bb + 1e-3) - wb * wb
        by_slope = ((bb + 1e-3) * self._gw - wb * self._gb) / determinant
        by_intercept = ((ww + 1e-3) * self._gb - wb * self._gw) / determinant
        if slope + by_slope < 0.0:  # a larger margin can't make a token less likely: the intercept alone is fitted
            by_slope = -slope
            by_intercept = (self._gb - wb * by_slope) / (bb + 1e-3)
        self.slope = min(slope + min(max(by_slope, -STRIDES[0]), STRIDES[0]), STEEPEST)
        self.intercept = min(max(intercept + min(max(by_intercept, -STRIDES[1]), STRIDES[1]), -LARGEST), LARGEST)
        self.precision = (ww, wb, bb)
        self.fitted = True
        self._clear()

    def follow(self, shallower: Curve) -> None:
        """Not fitted yet: as far as anyone knows, this position is like the one before it."""
        self.slope, self.intercept = shallower.slope, shallower.intercept


class SurvivalEstimator:
    """Chances of drafted tokens by their margins and positions. Shared by all requests whose drafts are of a kind."""

    def __init__(self) -> None:
        self._curves = [Curve() for _ in range(DEPTHS)]

    def chances(self, margins: torch.Tensor, lengths: Sequence[int]) -> list[list[float]]:
        """The chance of each token to stand, given that those before it do.

        `margins` [n, k] as in `DraftProposal`; row i counts up to lengths[i].
        """
        deepest = max(lengths, default=0)
        curves = [(curve.slope, curve.intercept) for curve in map(self._curve, range(deepest))]
        return [
            [1.0 / (1.0 + exp(-slope * _bounded(m) - bias)) for m, (slope, bias) in zip(row[:length], curves)]  # noqa: B905
            for row, length in zip(margins.tolist(), lengths, strict=True)
        ]

    def observe(self, margins: torch.Tensor, lengths: Sequence[int], accepted: Sequence[int]) -> None:
        """Of draft i, lengths[i] tokens were verified and the first accepted[i] stood. Later ones were not reached."""
        for row, length, stood in zip(margins.tolist(), lengths, accepted, strict=True):
            for step, margin in enumerate(row[: min(stood + 1, length)]):
                self._curve(step).observe(_bounded(margin), step < stood)
        for shallower, curve in zip(self._curves, self._curves[1:], strict=False):
            if not curve.fitted:
                curve.follow(shallower)

    def _curve(self, step: int) -> Curve:
        return self._curves[min(step, DEPTHS - 1)]


class SurvivalByKind:
    """An estimator for each kind of draft: what a relaxed verifier lets stand says little of what a strict one will.

    A new kind starts from nothing. `kinds[i]` is that of draft i; there are only so many of them.
    """

    def __init__(self) -> None:
        self._estimators: dict[Hashable, SurvivalEstimator] = {}

    def chances(self, kinds: Sequence[Hashable], margins: torch.Tensor, lengths: Sequence[int]) -> list[list[float]]:
        """See `SurvivalEstimator`."""
        found: list[list[float]] = [[]] * len(lengths)
        for kind, rows in _rows_of(kinds):
            part = margins if len(rows) == len(lengths) else margins[rows]
            table = self._estimator(kind).chances(part, [lengths[row] for row in rows])
            for row, line in zip(rows, table, strict=True):
                found[row] = line
        return found

    def observe(
        self, kinds: Sequence[Hashable], margins: torch.Tensor, lengths: Sequence[int], accepted: Sequence[int]
    ) -> None:
        """See `SurvivalEstimator`."""
        for kind, rows in _rows_of(kinds):
            part = margins if len(rows) == len(lengths) else margins[rows]
            self._estimator(kind).observe(part, [lengths[row] for row in rows], [accepted[row] for row in rows])

    def _estimator(self, kind: Hashable) -> SurvivalEstimator:
        found = self._estimators.get(kind)
        if found is None:
            found = self._estimators[kind] = SurvivalEstimator()
        return found


def _rows_of(kinds: Sequence[Hashable]) -> Iterable[tuple[Hashable, list[int]]]:
    found: dict[Hashable, list[int]] = {}
    for row, kind in enumerate(kinds):
        found.setdefault(kind, []).append(row)
    return found.items()


def foreseen(chances: Sequence[float], length: int, accepted: int) -> tuple[float, float]:
    """What verification past `length` would have shown of a draft of which `accepted` of `length` tokens stood.

    The expected number of further tokens that stand, and the chance that one of them does not. With what was seen,
    this makes the record of a draft that was cut equal, on average, to that of one verified whole.
    """
    if accepted < length:
        return 0.0, 0.0
    stood, reach = 0.0, 1.0
    for chance in chances[length:]:
        reach *= chance
        stood += reach
    return stood, 1.0 - reach


class LengthChoice:
    """Chooses how many tokens of each draft are verified. Without measured costs, all of them."""

    def __init__(
        self, step_costs: tuple[tuple[int, float], ...] = (), draft_costs: tuple[tuple[int, float], ...] = ()
    ) -> None:
        """See `Capacity`: (tokens fed, seconds) of target passes, (requests drafted for, seconds) of draft passes."""
        self._steps = CostTable(step_costs)
        self._drafts = CostTable(draft_costs)
        self._bar = 0.0  # chance of the least likely token that was last worth verifying
        self._turn = 0

    def choose(self, chances: Sequence[Sequence[float]], fed: int, least: int = 1) -> list[int]:
        """Tokens to verify of each draft; `chances` has a row for each request that draws, empty where undrafted.

        `fed`: tokens that the step feeds besides, prompts included. The likeliest prefix of all tokens is taken that
        has the most expected tokens per second; the draft's time is spent already, but sets the rate to be beaten.
        All prefixes are tried, since the cost of a step jumps at some widths. At least the `least` likeliest tokens
        are taken: without labels nobody would notice that the chances are wrong.
        """
        if not self._steps:
            return [len(row) for row in chances]
        offers = []
        for i, row in enumerate(chances):
            reach = 1.0
            for chance in row:
                reach *= chance
                offers.append((reach, i))
        if not offers:
            return [0] * len(chances)
        offers.sort(key=lambda offer: -offer[0])  # stable, and a draft's own chances fall: always prefixes
        kept = self._prefix([reach for reach, _ in offers], len(chances), sum(map(bool, chances)), fed)
        self._bar = offers[max(kept, 1) - 1][0]
        self._turn += 1
        kept = min(max(kept + (self._turn % CURIOSITY == 0), least), len(offers))
        lengths = [0] * len(chances)
        for _, i in offers[:kept]:
            lengths[i] += 1
        return lengths

    def choose_in_turn(self, chances: Sequence[Sequence[float]], fed: int, drawn: Collection[int]) -> list[int]:
        """As `choose`, but in the drafts `drawn` no token's fate depends on the margins behind it.

        For drafts that are drawn one token after another: there a later margin tells of the tokens drawn before it,
        and a choice that knew it would bend the law of what is accepted. The bar is that of the steps before.
        """
        bar = self._bar * (0.5 if self._turn % CURIOSITY == 0 else 1.0)
        lengths = self.choose(chances, fed)
        for i in drawn:
            reach, length = 1.0, 0
            for chance in chances[i]:
                reach *= chance
                if reach < bar:
                    break
                length += 1
            lengths[i] = length
        return lengths

    def _prefix(self, reaches: list[float], drawing: int, drafted: int, fed: int) -> int:
        """How many of `reaches`, falling, are worth their rows."""
        spent = self._drafts.seconds(drafted) if self._drafts else 0.0
        alone = self._steps.upto(drawing + len(reaches))
        tokens = float(drawing)
        rate = tokens / alone[drawing]  # of plain decoding
        for width, reach in enumerate(reaches, start=drawing + 1):
            tokens += reach
            rate = max(rate, tokens / (alone[width] + spent))
        seconds = self._steps.upto(fed + len(reaches))
        best, kept, tokens = -rate * seconds[fed], 0, 0.0
        for count, reach in enumerate(reaches, start=1):
            tokens += reach
            gain = tokens - rate * seconds[fed + count]
            if gain > best:
                best, kept = gain, count
        return kept


def _bounded(margin: float) -> float:
    if -LARGEST < margin < LARGEST:
        return margin
    return LARGEST if margin > 0 else -LARGEST  # where it is no number, the target's own row will say what is wrong
