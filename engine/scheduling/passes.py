"""Who is drafted for where a draft costs a pass of its own, however many tokens of it are verified.

Such a pass serves many requests for little more than one, so the choice is of a set: the most promising sequences, as
many as make the step's expected tokens per second rise. The pipeline then trims each draft by its own margins.

Beliefs may be wrong, and what was true may change. So there is a purse: drafting is paid from it, what drafts bring is
paid into it, at the price that plain decoding would have had to pay, and one percent of the time besides. An empty
purse means plain decoding. Whatever drafts do, the whole is never more than that percent slower than without them,
measured by the costs at hand, and what the purse holds.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple

from engine.types import CostTable, Sequence, Survival

SHARE = 0.01  # of plain decoding's time that may go into drafts that don't pay
PURSE = 4.0  # most that the purse holds, in plain steps: what a change for the worse may cost before drafting stops
LOAN = 1.5  # what it holds at first
FADE = 0.95  # weight that a round keeps in its sequence's estimate when the next comes
REST = 0.99  # weight that a sequence's own rounds keep over a step without a draft
COMMON_FADE = 0.98  # weight that a round keeps in the estimate for all sequences
BELIEF = 6.0  # rounds that the estimate for all is worth to one of them
START_GAIN, STAY_GAIN = 1.02, 0.97  # expected speed over plain decoding at which drafting begins, and goes on
NEARLY = 0.98  # of the best speed is enough for a larger set: its drafts' own margins say more than these averages
FINE = 8  # sets up to this size are all tried, larger ones in steps of it
WIDE = 64  # positions that may be reserved for drafts before anyone has to be modest


class Candidate(NamedTuple):
    """A sequence that decodes in this step, and the most tokens that may be drafted for it."""

    seq: Sequence
    room: int


class Choice(NamedTuple):
    """How many of the most promising to draft for, how deep to expect to verify, and the speed over plain decoding."""

    width: int
    depth: int
    gain: float


class PassControl:
    """Chooses the sequences of each draft pass, and keeps account of what the passes brought."""

    def __init__(self, steps: CostTable, drafts: CostTable, longest: int) -> None:
        """`longest`: most drafted tokens that may stand in one round."""
        self._longest = longest
        self._steps = steps
        self._drafts = drafts
        self._common = Survival(stood=1.5, fell=1.0)  # of all sequences
        self._purse = LOAN * steps.seconds(1)
        self._savings = 0.0  # for probes: their own share of the purse, or they would follow each other while it lasts
        self._drafting = False  # did the last step that could?
        self._unchanged: tuple[int, int, int] | None = None  # what the last answer was given for, where it was no
        self._rounds = 0

    def grants(self, candidates: Many[Candidate]) -> list[int]:
        """Positions for the drafts of each candidate; `candidates` are all sequences that decode in this step."""
        able = [i for i, candidate in enumerate(candidates) if candidate.room > 0]
        grants = [0] * len(candidates)
        if not able:
            return grants
        question = (len(candidates), len(able), self._rounds)
        chosen, depth = [], 0
        if self._purse > 0.0 and question != self._unchanged:
            able.sort(key=lambda i: -self.rate(candidates[i].seq.survival))
            choice = self._best([candidates[i] for i in able], len(candidates))
            if choice.gain >= (STAY_GAIN if self._drafting else START_GAIN):
                chosen, depth = able[: choice.width], choice.depth
        self._drafting = bool(chosen)
        self._unchanged = None if chosen or self._purse <= 0.0 else question
        if not chosen:
            chosen, depth = self._probe(candidates, able), 1
        reserved = sum(candidates[i].room for i in chosen)
        modest = 2 * depth + 2 if reserved > WIDE else reserved
        for i in chosen:
            grants[i] = min(candidates[i].room, modest)
        return grants

    def rate(self, survival: Survival) -> float:
        """Estimated chance that a drafted token stands, given that those before it do."""
        trust = BELIEF * self._common.stood / (self._common.stood + self._common.fell)
        return (survival.stood + trust) / (survival.stood + survival.fell + BELIEF)

    def _best(self, able: list[Candidate], decoding: int) -> Choice:
        """The best of all sets that begin `able`, which is sorted, and all depths, the same for the whole set.

        The largest set that is nearly the best.
        """
        deepest = min(max(candidate.room for candidate in able), self._longest)
        seconds = self._steps.upto(decoding + deepest * len(able))
        passes = self._drafts.upto(len(able))
        expected = [0.0] * (deepest + 1)  # tokens of the set at each depth
        rows = [0] * (deepest + 1)
        plain = decoding / seconds[decoding]
        choices = [Choice(0, 0, 0.0)]
        for width, (seq, room) in enumerate(able, start=1):
            rate = reach = self.rate(seq.survival)
            for depth in range(1, min(room, deepest) + 1):
                expected[depth] += reach
                rows[depth] += 1
                reach *= rate
            if width > FINE and width % FINE and width < len(able):
                continue
            tokens, fed = float(decoding), decoding
            best = Choice(width, 0, 0.0)
            for depth in range(1, deepest + 1):
                tokens += expected[depth]
                fed += rows[depth]
                gain = tokens / ((seconds[fed] + passes[width]) * plain)
                if gain > best.gain:
                    best = Choice(width, depth, gain)
            choices.append(best)
        enough = NEARLY * max(choice.gain for choice in choices)
        return max(choice for choice in choices if choice.gain >= enough)

    def _probe(self, candidates: Many[Candidate], able: list[int]) -> list[int]:
        """Those to ask whether times have changed: the ones that rested longest, as many as cost little more than one.

        Nobody, until the last probes are paid for.
        """
        passes = self._drafts.upto(len(able))
        width = max(width for width in range(1, len(able) + 1) if width == 1 or passes[width] <= 2.0 * passes[1])
        price = self._price(len(candidates), width, width)
        self._savings = min(self._savings, price)
        if self._savings < price or self._purse < 0.0:
            return []
        return sorted(able, key=lambda i: -candidates[i].seq.survival.resting)[:width]

    def _price(self, decoding: int, width: int, rows: int) -> float:
        """Seconds that a step takes longer for a draft pass of `width` requests and `rows` tokens to verify."""
        seconds = self._steps.upto(decoding + rows)
        return seconds[decoding + rows] - seconds[decoding] + self._drafts.seconds(width)

    def learn(self, survival: Survival, stood: float, fell: float) -> None:
        """A round of one sequence: so many tokens stood (some of them only expected to), and one fell, or did not."""
        self._rounds += 1
        survival.stood = FADE * survival.stood + stood
        survival.fell = FADE * survival.fell + fell
        self._common.stood = COMMON_FADE * self._common.stood + stood
        self._common.fell = COMMON_FADE * self._common.fell + fell

    def rest(self, survival: Survival) -> None:
        """A step went by without a draft for this sequence: what is known of it gets old."""
        survival.stood *= REST
        survival.fell *= REST

    def settle(self, decoding: int, width: int, verified: int, accepted: int) -> None:
        """Pay for a step in which `decoding` sequences decoded, `width` of them with drafts."""
        if not decoding:
            return
        plain = self._steps.upto(decoding)[decoding]
        balance = SHARE * plain
        if width:
            balance += accepted * plain / decoding - self._price(decoding, width, verified)
        self._purse = min(self._purse + balance, PURSE * plain)
        self._savings += balance
