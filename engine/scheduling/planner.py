"""Chooses what the next step runs: running sequences by rank, then the head of the queue."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import SchedulerConfig
from engine.scheduling.budget import Share, StepBudget, awaits_tokens, backlog
from engine.scheduling.drafting import DraftControl
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.roster import Roster
from engine.scheduling.spans import SpanBudget
from engine.types import Admission, Capacity, ScheduledSeq, Sequence, SequenceStatus

RUNNING = SequenceStatus.RUNNING  # an enumeration looks its members up by name every time


class Planner:
    """Order: by priority (lower first), then arrival; running sequences before waiting ones.

    When memory is short, the last running sequence in that order loses its blocks to the prefix cache and waits
    again, keeping its tokens (preemption by recompute). A waiting request may push out running ones of a lower
    priority, at the end of their step, only if that gives it enough memory; it never pushes out anyone for a
    place among `max_num_seqs`.

    Denoised sequences run whole spans, so that a step may have no room for one: those that were left out come first
    in the next step, the longest waiting one before the others.
    """

    def __init__(
        self, capacity: Capacity, config: SchedulerConfig, kv: KVManager, roster: Roster, clock: Callable[[], float]
    ) -> None:
        self._traits = capacity.traits
        self._total = config.max_batched_tokens
        self._max_running = min(config.max_num_seqs, config.max_batched_tokens)  # each must get its token
        self._watermark = capacity.num_blocks // 100  # blocks that an admission leaves to those that run
        self._kv = kv
        self._roster = roster
        self._clock = clock
        self._late: dict[Sequence, None] = {}  # left out of the last step for want of room, in the order of their turn
        self.drafting = DraftControl(capacity)
        self.fed = 0  # tokens of the last plan, drafts aside
        self.prefix_queries = 0
        self.prefix_hits = 0

    def plan(self) -> tuple[tuple[ScheduledSeq, ...], tuple[Admission, ...]]:
        """The items and admissions of the next step; `num_reserved` and `in_flight` count them from now on."""
        items: list[ScheduledSeq] = []
        admitted: list[Admission] = []
        late, self._late = self._late, {}
        ready = self._wants(late)
        budget = self._budget([want for _, want in ready], late)
        enough = True
        if late:
            turns = sum(seq in late for seq, _ in ready)
            enough = self._plan_running(ready[:turns], budget, items)
            # A canvas that waits to start takes its turn with those that run: it needs no more memory later, and they
            # need none. Else a few denoise steps could keep a large one out for as long as they go on.
            if enough and self._traits.canvas and self._roster.waiting.head() in late:
                self._admit_head(budget, items, admitted)
            ready = ready[turns:]
        enough = self._plan_running(ready, budget, items) and enough
        while enough and self._admit_head(budget, items, admitted):
            pass
        self.fed = self._total - budget.left
        if self._traits.drafts:
            self.fed -= sum([item.lookahead for item in items])
        return tuple(items), tuple(admitted)

    def _budget(self, wants: list[Share], late: dict[Sequence, None]) -> StepBudget | SpanBudget:
        if self._traits.denoises:
            return SpanBudget(self._total, self._traits, wants, late)
        queued = len(self._roster.running) < self._max_running and self._roster.waiting.head() is not None
        return StepBudget(self._total, self._traits, wants, queued=queued)

    def _wants(self, late: dict[Sequence, None]) -> list[tuple[Sequence, Share]]:
        """What each running sequence would like of this step, late ones first; those that have to wait are left out."""
        running = self._roster.running
        if late:
            turns = [seq for seq in late if seq.status is RUNNING]
            running = turns + [seq for seq in running if seq not in late]
        traits = self._traits
        todos = [(seq, todo) for seq in running if (todo := backlog(seq, traits)) is not None]
        if not traits.lookahead and not traits.denoises:
            return [(seq, Share(seq.num_reserved, todo, 0)) for seq, todo in todos]
        fed = min(self._total, sum([todo for _, todo in todos]))
        grants = self.drafting.grants(todos, fed)
        return [(seq, Share(seq.num_reserved, todo, grant)) for (seq, todo), grant in zip(todos, grants, strict=True)]

    def _plan_running(
        self, ready: list[tuple[Sequence, Share]], budget: StepBudget | SpanBudget, items: list[ScheduledSeq]
    ) -> bool:
        """Plan those that run already. False if memory was short: then nobody may be admitted in this step."""
        enough = True
        for seq, want in ready:
            if seq.status is not RUNNING:  # preempted for one before it
                budget.pass_over(want)
                continue
            share = budget.turn(seq, want)
            if share is not None and not self._kv.grow(seq, share.start + share.feed + share.lookahead):
                enough = False
                if not self._make_room(seq, share, items):
                    share = None
            if share is not None:
                items.append(_item(seq, share, budget))
            elif self._traits.denoises and seq.status is RUNNING:
                self._late[seq] = None
        return enough

    def _make_room(self, seq: Sequence, share: Share, items: list[ScheduledSeq]) -> bool:
        """Preempt from the end of the order until `seq` can grow. False if it must wait, or was the last itself.

        Everyone before `seq` in the order is planned already and everyone after it is not, so no plan is undone;
        only late ones are planned out of order, and `seq` waits for those: in the next step it comes before them.
        If blocks are on their way back from steps in flight, they are awaited rather than more taken.
        """
        end = share.start + share.feed + share.lookahead
        while not self._kv.grow(seq, end):
            victim = self._roster.running[-1]
            if self._roster.leaving or any(item.request_id == victim.request.id for item in items):
                return False
            self._roster.preempt(victim)
            if victim is seq:
                return False
        return True

    def _admit_head(
        self, budget: StepBudget | SpanBudget, items: list[ScheduledSeq], admitted: list[Admission]
    ) -> bool:
        """Start the head of the queue, with blocks for all its tokens at once. False if it has to wait.

        Nobody overtakes the head: a long prompt gets its turn as soon as enough memory is free.
        """
        seq = self._roster.waiting.head()
        if seq is None or len(self._roster.running) >= self._max_running or budget.left <= 0:
            return False
        found = self._kv.match(seq)
        start = len(found) * self._kv.block_size
        lookahead = self.drafting.first(seq)
        share = budget.offer(seq, Share(start, seq.num_tokens - start, lookahead))
        if share is None:
            if self._traits.canvas:
                self._late[seq] = None
            return False
        end = seq.num_tokens + lookahead
        end = end if self._traits.denoises else min(end, seq.limit)
        missing = self._kv.shortage(found, end) + (self._watermark if self._roster.running else 0)
        if missing > 0:
            self._push_out(seq, missing)
            return False
        self._roster.start(found, end)
        if seq.preemptions == 0:
            self._count_first(seq, start)
        items.append(_item(seq, share, budget))
        admitted.append(Admission(seq.request, tuple(seq.output_ids)))
        return True

    def _push_out(self, seq: Sequence, missing: int) -> None:
        """Preempt running sequences of a lower priority, the last first, if that may free `missing` blocks."""
        lower = [other for other in reversed(self._roster.running) if other.request.priority > seq.request.priority]
        if self._roster.leaving or sum(len(other.block_ids) for other in lower) < missing:
            return
        for other in lower:
            if missing <= 0:
                break
            missing -= len(other.block_ids)
            self._roster.preempt(other)

    def _count_first(self, seq: Sequence, cached: int) -> None:
        """Admissions after a preemption are not counted: they would find the sequence's own blocks."""
        seq.scheduled_at = self._clock()
        seq.cached_tokens = cached
        reads_all = seq.request.reading is not None and not seq.request.reading.first_needed(seq.num_tokens)
        if self._kv.prefix_cache and seq.request.sampling.prompt_logprobs is None and not reads_all:
            self.prefix_queries += len(seq.request.prompt_ids)
            self.prefix_hits += cached


def _item(seq: Sequence, share: Share, budget: StepBudget | SpanBudget) -> ScheduledSeq:
    """Put a share, whose blocks are there, into the step."""
    start, end = share.start, share.start + share.feed
    pending = bool(seq.in_flight) and awaits_tokens(seq)
    tokens = () if pending else seq.ids(start, end)
    item = ScheduledSeq(seq.request.id, start, tokens, share.lookahead, seq.block_table, pending)
    seq.in_flight.append(item)
    seq.num_reserved = end + share.lookahead
    budget.left -= share.feed + share.lookahead
    return item
