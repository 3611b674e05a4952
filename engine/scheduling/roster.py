"""Who is where: every live sequence, and the moves between waiting, running, leaving and gone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from operator import attrgetter

from engine.errors import IntegrityError
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.waiting import WaitingQueue
from engine.types import FinishReason, ScheduledSeq, Sequence, SequenceStatus, SeqUpdate

by_rank = attrgetter("rank")


class Roster:
    """The scheduler's books. A sequence is in exactly one place:

    - `waiting`: owns no blocks and has no device state;
    - `running`: kept in the order of rank;
    - `leaving`: ended or preempted while steps of it are in flight. It owns its blocks until the last of those
      steps has ended, because they still write there; then it is gone, or waits again.
    """

    def __init__(self, kv: KVManager) -> None:
        self.sequences: dict[str, Sequence] = {}
        self.waiting = WaitingQueue(kv.share_size if kv.prefix_cache else None)
        self.running: list[Sequence] = []
        self.leaving: set[Sequence] = set()
        self.preemptions = 0
        self._kv = kv
        self._dropped: dict[str, None] = {}  # whose device state goes with the next plan, in order
        self._news: list[SeqUpdate] = []  # endings that no step caused

    def add(self, seq: Sequence) -> None:
        self.sequences[seq.request.id] = seq
        self.waiting.add(seq)

    def refuse(self, request_id: str, error: str) -> None:
        """A request that never becomes a sequence: it only gets its ending."""
        self._dropped[request_id] = None
        self._news.append(SeqUpdate(request_id, finish=FinishReason.ERROR, error=error))

    def start(self, found: list[int], end: int) -> None:
        """The head of the queue runs from now on, with blocks up to position `end`, `found` among them."""
        seq = self.waiting.pop()
        self._kv.admit(seq, found, end)
        seq.status = SequenceStatus.RUNNING
        insort(self.running, seq, key=by_rank)

    def preempt(self, seq: Sequence) -> None:
        """Stop a running sequence; it gives its blocks back and waits again once nothing of it is in flight."""
        self._stop(seq)
        seq.status = SequenceStatus.WAITING
        seq.preemptions += 1
        self.preemptions += 1
        self.leaving.add(seq)
        self.settle(seq)

    def _stop(self, seq: Sequence) -> None:
        place = bisect_left(self.running, seq.rank, key=by_rank)  # ranks differ
        assert self.running[place] is seq
        del self.running[place]

    def finish(self, seq: Sequence) -> None:
        """A sequence ends here, wherever it is; its steps in flight are surplus from now on."""
        if seq.status is SequenceStatus.RUNNING:
            self._stop(seq)
        self.waiting.discard(seq)
        seq.status = SequenceStatus.FINISHED
        self.leaving.add(seq)
        self.settle(seq)

    def abort(self, seq: Sequence) -> None:
        """End a sequence outside a step; the next results carry the news."""
        self._news.append(ending(seq, FinishReason.ABORT))
        self.finish(seq)

    def settle(self, seq: Sequence) -> None:
        """Call after a step of a sequence ended: one that leaves goes when that was its last."""
        if seq.in_flight or seq not in self.leaving:
            return
        self.leaving.remove(seq)
        self._kv.release(seq)
        self._dropped[seq.request.id] = None
        if seq.status is SequenceStatus.FINISHED:
            del self.sequences[seq.request.id]
        else:
            self.waiting.push(seq)

    def take_dropped(self) -> tuple[str, ...]:
        dropped = tuple(self._dropped)
        self._dropped.clear()
        return dropped

    def take_news(self) -> list[SeqUpdate]:
        news, self._news = self._news, []
        return news

    def is_empty(self) -> bool:
        """Nobody lives here, and there is nothing left to drop or tell."""
        return not (self.sequences or self._dropped or self._news)

    def num_waiting(self) -> int:
        return len(self.waiting) + sum(seq.status is SequenceStatus.WAITING for seq in self.leaving)

    def check(self, in_flight: Iterable[tuple[ScheduledSeq, ...]]) -> None:
        """Every sequence in one place, with what belongs there; `in_flight`: the items of each step that is under way.

        Raises IntegrityError with details.
        """
        shares = {(item.request_id, id(item)) for items in in_flight for item in items}
        known = {(name, id(item)) for name, seq in self.sequences.items() for item in seq.in_flight}
        if shares != known:
            raise IntegrityError(f"steps in flight hold {len(shares)} shares, but their sequences know {len(known)}")
        self._kv.check(self.sequences.values())
        if self.running != sorted(self.running, key=by_rank):
            raise IntegrityError("the running sequences are out of order")
        running = set(self.running)
        for request_id, seq in self.sequences.items():
            places = [seq in running, seq in self.waiting, seq in self.leaving]
            if request_id != seq.request.id or sum(places) != 1:
                raise IntegrityError(f"{request_id}: running, waiting, leaving are {places}")
            if (seq.status is SequenceStatus.RUNNING) != places[0]:
                raise IntegrityError(f"{request_id}: status {seq.status} in the wrong place {places}")
            if places[1] and (seq.block_ids or seq.in_flight or seq.num_computed):
                raise IntegrityError(f"{request_id}: waits with {len(seq.block_ids)} blocks")
            if places[2] and not seq.in_flight:
                raise IntegrityError(f"{request_id}: leaves, but nothing of it is in flight")
            if any(item.block_ids != seq.block_table[: len(item.block_ids)] for item in seq.in_flight):
                raise IntegrityError(f"{request_id}: a step in flight uses blocks that it no longer owns")
        if len(self.running) + len(self.waiting) + len(self.leaving) != len(self.sequences):
            raise IntegrityError("a sequence that is gone is still in some place")


def ending(seq: Sequence, finish: FinishReason, error: str | None = None) -> SeqUpdate:
    """The last news of a sequence that ends without further tokens."""
    return SeqUpdate(
        seq.request.id,
        finish=finish,
        error=error,
        cached_tokens=seq.cached_tokens,
        scheduled_at=seq.scheduled_at,
        preemptions=seq.preemptions,
    )
