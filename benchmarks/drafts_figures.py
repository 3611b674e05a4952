"""Arithmetic of the draft benchmarks: rounds to acceptance, paired runs to ratios, differences to near-ties."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Distance of the two best log-probabilities below which another order of summation may swap the two tokens.
NEAR_TIE = {"none": 1e-4, "fp16": 0.05}


@dataclass(frozen=True, slots=True)
class Round:
    """One decode step of one request: tokens drafted and accepted, and those that joined the answer."""

    drafted: int
    accepted: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What came of many rounds.

    `offered[j]` rounds verified a token at position j of their draft, and in `stood[j]` of them it stood.
    `histogram[a]` rounds accepted a tokens, those without a draft among them.
    """

    rounds: int
    tokens: int
    drafted: int
    accepted: int
    offered: tuple[int, ...]
    stood: tuple[int, ...]
    histogram: tuple[int, ...]

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a decode step adds to an answer: 1 without drafts. Also called acceptance length."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def by_position(self) -> tuple[float, ...]:
        """Share of the tokens drafted at each position that stood."""
        return tuple(stood / offered for stood, offered in zip(self.stood, self.offered, strict=True))

    @property
    def given_those_before(self) -> tuple[float, ...]:
        """The same among rounds in which all earlier positions stood, that is the draft's own quality there.

        Position j can only be judged where it was offered; drafts that were all equally long make this exact.
        """
        before = (self.offered[0], *self.stood) if self.offered else ()
        chances = zip(self.stood, self.offered, before, strict=False)
        return tuple(stood / min(offered, earlier) if earlier else 0.0 for stood, offered, earlier in chances)


def acceptance(rounds: Iterable[Round]) -> Acceptance:
    """Sum up decode steps of any number of requests."""
    rounds = list(rounds)
    longest = max((one.drafted for one in rounds), default=0)
    most = max((one.accepted for one in rounds), default=0)
    return Acceptance(
        rounds=len(rounds),
        tokens=sum(one.tokens for one in rounds),
        drafted=sum(one.drafted for one in rounds),
        accepted=sum(one.accepted for one in rounds),
        offered=tuple(sum(one.drafted > j for one in rounds) for j in range(longest)),
        stood=tuple(sum(one.accepted > j for one in rounds) for j in range(longest)),
        histogram=tuple(sum(one.accepted == a for one in rounds) for a in range(most + 1)),
    )


def whole_rounds(rounds: Sequence[Round], limit: int) -> list[Round]:
    """The rounds that began while fewer than `limit` tokens had been decoded.

    Requests are allowed a block more than that, so that no counted draft is cut short by the end of its answer.
    """
    kept, so_far = [], 0
    for one in rounds:
        if so_far >= limit:
            break
        kept.append(one)
        so_far += one.tokens
    return kept


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of ratios that were made within pairs, and their range."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ours over theirs, pair by pair. Raises ValueError where there are none, or not as many of one as of the other."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    if not ratios:
        raise ValueError("no pairs")
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def first_difference(want: Sequence[int], have: Sequence[int]) -> int | None:
    """The first index at which two answers part, or at which one of them ends early; None where they are equal."""
    for i, (a, b) in enumerate(zip(want, have, strict=False)):
        if a != b:
            return i
    return None if len(want) == len(have) else min(len(want), len(have))


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer that is not the reference's: where it parts from it, and the reference's gap there.

    `gap` is the distance of the two best log-probabilities: None where both answers agree and one of them goes on.
    """

    name: str
    token: int
    gap: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many of so many answers are the reference's, token for token."""

    equal: int
    of: int
    differences: tuple[Difference, ...] = ()

    def near_ties(self, quant: str) -> int:
        """Differences that rounding explains."""
        bound = NEAR_TIE.get(quant, NEAR_TIE["fp16"])
        return sum(one.gap is not None and one.gap < bound for one in self.differences)

    def words(self, quant: str) -> str:
        ties = self.near_ties(quant)
        told = f"{self.equal} of {self.of} equal"
        if not self.differences:
            return told
        return f"{told}, {ties} part at near-ties, {len(self.differences) - ties} elsewhere"


def agreement(
    want: Sequence[Sequence[int]], have: Sequence[Sequence[int]], names: Sequence[str], gaps: Sequence[Sequence[float]]
) -> Agreement:
    """Compare answers. `gaps[i][t]`: distance of the two best log-probabilities at token t of reference i."""
    differences = []
    for expected, got, name, margin in zip(want, have, names, gaps, strict=True):
        at = first_difference(expected, got)
        if at is not None:
            differences.append(Difference(name, at, margin[at] if at < min(len(margin), len(got)) else None))
    return Agreement(len(want) - len(differences), len(want), tuple(differences))
