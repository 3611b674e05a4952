"""Who gets drafts, and how many: an upper bound for each sequence, from last-step statistics and measured costs.

A drafted token is worth the chance that it stands; a step with it takes a little longer. Where drafting itself costs
next to nothing, tokens are granted, the most promising first, as long as the step's expected tokens per second rise;
where it costs a pass of its own, `passes.py` chooses who takes part. Under a lossless verifier none of this ever
changes a token, only when it comes.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace

from engine.scheduling.passes import Candidate, PassControl
from engine.scheduling.spans import reach
from engine.types import Capacity, CostTable, ScheduledSeq, SeqResult, Sequence, StepOutput, Survival, VerifierStats

START = (1.5, 1.0)  # tokens that stood, rounds cut short: what is believed of a sequence before its first round
FADE = 0.85  # weight that a round keeps in the next one's estimate
PROBE = 2  # tokens of a draft that only asks whether drafting pays again
PATIENCE = (32, 512)  # steps without a draft before such a probe: at first, and after many that failed
PASS = 0.01  # of a step of one token: drafting that costs less than this share of it counts as free


class DraftControl:
    """Grants lookahead and keeps the totals of what came of it. Idle where the pipeline does not draft."""

    def __init__(self, capacity: Capacity) -> None:
        self._traits = capacity.traits
        self._costs = CostTable(capacity.step_costs)
        passes = CostTable(capacity.draft_costs)
        paid = capacity.traits.drafts and self._costs and passes and passes.seconds(1) > PASS * self._costs.seconds(1)
        self._passes = PassControl(self._costs, passes, self._traits.max_draft) if paid else None
        # A request that was not checked, as in tests, has the server's own verifier: the first one.
        self._verifier = capacity.verifiers[0].name if capacity.verifiers else ""
        self._by_verifier: dict[str, VerifierStats] = {}
        self.rounds = 0
        self.drafted = 0
        self.accepted = 0
        self.accepted_at = [0] * capacity.traits.max_draft

    def bound(self, seq: Sequence) -> int:
        """Most positions past its last token that a step may write for this sequence; all of them if it is denoised."""
        if self._traits.denoises:
            return reach(seq, self._traits) - seq.num_tokens
        most = self._traits.lookahead if seq.request.reading is None else 0
        return seq.request.speculation.bound(most) if self._traits.drafts else most

    def first(self, seq: Sequence) -> int:
        """The bound in a sequence's first step: passes of a draft network need the whole prompt's hidden states."""
        return 0 if self._passes else self.bound(seq)

    def grants(self, todos: Many[tuple[Sequence, int]], fed: int) -> list[int]:
        """Lookahead of each sequence, given the tokens it has to feed, in a step that feeds `fed` of them in all."""
        bounds = [self.bound(seq) for seq, _ in todos]
        if not self._traits.drafts or not self._costs:
            return bounds
        if self._passes:
            return self._passed(self._passes, todos, bounds)
        seqs = [seq for seq, _ in todos]
        grants = self._worthwhile(seqs, bounds, fed)
        for i, seq in enumerate(seqs):
            probe = min(PROBE, bounds[i])
            if grants[i] < probe and seq.survival.resting >= seq.survival.patience:
                grants[i] = probe
        return grants

    def _passed(self, passes: PassControl, todos: Many[tuple[Sequence, int]], bounds: list[int]) -> list[int]:
        """The grants where a draft costs a pass, which needs all but the last token computed."""
        decoding = [i for i, (_, todo) in enumerate(todos) if todo == 1]
        rooms = (min(bounds[i], todos[i][0].limit - todos[i][0].num_tokens - 1) for i in decoding)
        candidates = [Candidate(todos[i][0], max(0, room)) for i, room in zip(decoding, rooms, strict=True)]
        grants = [0] * len(todos)
        for i, grant in zip(decoding, passes.grants(candidates), strict=True):
            grants[i] = grant
        return grants

    def _worthwhile(self, seqs: list[Sequence], bounds: list[int], fed: int) -> list[int]:
        """The grants with the most tokens per second, if every draft stands with its sequence's rate."""
        offers = []
        for i, seq in enumerate(seqs):
            chance = rate = survival_rate(seq.survival)
            for _ in range(bounds[i]):
                offers.append((-chance, i))
                chance *= rate
        offers.sort()  # a sequence's own chances fall, so they stay in order
        seconds = self._costs.upto(fed + len(offers))
        tokens, best, kept = float(len(seqs)), len(seqs) / seconds[fed], 0
        for count, (chance, _) in enumerate(offers, start=1):
            tokens -= chance
            speed = tokens / seconds[fed + count]
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
        if item.lookahead == 0:
            seq.survival.resting += 1
        self._learn(seq.survival, item, result)
        if result.drafted == 0:
            return
        self.rounds += 1
        self.drafted += result.drafted
        self.accepted += result.accepted
        for position in range(result.accepted):
            self.accepted_at[position] += 1
        name = seq.request.speculation.verifier or self._verifier
        known = self._by_verifier.get(name, VerifierStats(name))
        self._by_verifier[name] = replace(
            known,
            rounds=known.rounds + 1,
            drafted=known.drafted + result.drafted,
            accepted=known.accepted + result.accepted,
            tokens=known.tokens + len(result.new_tokens),
            bias=known.bias + sum(result.bias),
        )

    def by_verifier(self) -> tuple[VerifierStats, ...]:
        return tuple(self._by_verifier.values())

    def _learn(self, survival: Survival, item: ScheduledSeq, result: SeqResult) -> None:
        stood, fell = result.foreseen
        if item.lookahead == 0 and self._passes:
            self._passes.rest(survival)
        if result.drafted == 0 and stood == fell == 0.0:  # nothing was offered: that says nothing about the offers
            return
        short = result.accepted < result.drafted and not result.leaf
        if self._passes:
            self._passes.learn(survival, result.accepted + stood, short + fell)
        else:
            if survival.resting >= survival.patience:
                survival.patience = min(2 * survival.patience, PATIENCE[1]) if short else PATIENCE[0]
            survival.stood = FADE * survival.stood + result.accepted
            survival.fell = FADE * survival.fell + short
            survival.belief *= FADE
        survival.resting = 0

    def settle(self, items: Many[ScheduledSeq], output: StepOutput) -> None:
        """Take in a step as a whole."""
        if not self._passes:
            return
        results = {result.request_id: result for result in output.results}
        decoding = [item for item in items if item.pending or len(item.tokens) == 1]
        drafts = [results[item.request_id] for item in decoding if item.lookahead and item.request_id in results]
        verified = sum(result.drafted for result in drafts)
        self._passes.settle(len(decoding), len(drafts), verified, sum(result.accepted for result in drafts))


def survival_rate(survival: Survival) -> float:
    """Estimated chance that a drafted token stands, given that those before it do."""
    stood, fell = (survival.belief * start for start in START)
    return (survival.stood + stood) / (survival.stood + stood + survival.fell + fell)
