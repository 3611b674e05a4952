"""Who gets drafts, and how many: an upper bound for each sequence, from last-step statistics and measured costs.

A drafted token is worth the chance that it stands; a step with it takes a little longer. Drafts are granted, the most
promising first, as long as the step's expected tokens per second rise. Under a lossless verifier this never changes a
token, only when it comes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from engine.types import Capacity, ScheduledSeq, SeqResult, Sequence, Survival

FADE = 0.85  # weight that a round keeps in the next one's estimate
PROBE = 2  # tokens of a draft that only asks whether drafting pays again
PATIENCE = (32, 512)  # steps without a draft before such a probe: at first, and after many that failed


class StepCosts:
    """Seconds of a decode step by the tokens it feeds: measured points, straight lines between and beyond them."""

    def __init__(self, points: tuple[tuple[int, float], ...]) -> None:
        self._tokens = [tokens for tokens, _ in points]
        self._seconds = [seconds for _, seconds in points]

    def __bool__(self) -> bool:
        return len(self._tokens) > 1

    def seconds(self, tokens: int) -> float:
        right = min(max(bisect_left(self._tokens, tokens), 1), len(self._tokens) - 1)
        (x0, x1), (y0, y1) = self._tokens[right - 1 : right + 1], self._seconds[right - 1 : right + 1]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


class DraftControl:
    """Grants lookahead and keeps the totals of what came of it. Idle where the pipeline does not draft."""

    def __init__(self, capacity: Capacity) -> None:
        self._traits = capacity.traits
        self._costs = StepCosts(capacity.step_costs)
        self.rounds = 0
        self.drafted = 0
        self.accepted = 0
        self.accepted_at = [0] * (capacity.traits.lookahead if capacity.traits.drafts else 0)

    def bound(self, seq: Sequence) -> int:
        """Most positions past its last token that a step may write for this sequence."""
        most = self._traits.lookahead
        return seq.request.speculation.bound(most) if self._traits.drafts else most

    def grants(self, seqs: Iterable[Sequence], fed: int) -> list[int]:
        """Lookahead of each sequence in a step that feeds `fed` committed tokens in all."""
        seqs = list(seqs)
        bounds = [self.bound(seq) for seq in seqs]
        if not self._traits.drafts or not self._costs:
            return bounds
        grants = self._worthwhile(seqs, bounds, fed)
        for i, seq in enumerate(seqs):
            probe = min(PROBE, bounds[i])
            if grants[i] < probe and seq.survival.resting >= seq.survival.patience:
                grants[i] = probe
        return grants

    def _worthwhile(self, seqs: list[Sequence], bounds: list[int], fed: int) -> list[int]:
        """The grants with the most tokens per second, if every draft stands with its sequence's rate."""
        offers = []
        for i, seq in enumerate(seqs):
            chance = rate = seq.survival.rate
            for _ in range(bounds[i]):
                offers.append((chance, i))
                chance *= rate
        offers.sort(key=lambda offer: -offer[0])  # a sequence's own chances fall, so they stay in order
        tokens, best, kept = float(len(seqs)), len(seqs) / self._costs.seconds(fed), 0
        for count, (chance, _) in enumerate(offers, start=1):
            tokens += chance
            speed = tokens / self._costs.seconds(fed + count)
            if speed > best:
                best, kept = speed, count
        grants = [0] * len(seqs)
        for _, i in offers[:kept]:
            grants[i] += 1
        return grants

    def observe(self, seq: Sequence, item: ScheduledSeq, result: SeqResult) -> None:
        """Take in what came of a sampling step of a sequence."""
        if not self._traits.drafts:
            return
        survival = seq.survival
        if item.lookahead == 0:
            survival.resting += 1
        if result.drafted == 0:  # the drafter had nothing to offer: that says nothing about its offers
            return
        self._learn(survival, result)
        self.rounds += 1
        self.drafted += result.drafted
        self.accepted += result.accepted
        for position in range(result.accepted):
            self.accepted_at[position] += 1

    def _learn(self, survival: Survival, result: SeqResult) -> None:
        short = result.accepted < result.drafted
        if survival.resting >= survival.patience:
            survival.patience = min(2 * survival.patience, PATIENCE[1]) if short else PATIENCE[0]
        survival.resting = 0
        survival.stood = FADE * survival.stood + result.accepted
        survival.fell = FADE * survival.fell + short
