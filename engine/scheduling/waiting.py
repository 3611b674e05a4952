"""Sequences that wait to run: a queue by rank, and followers held back until their leader's prompt is computed."""

from __future__ import annotations

import heapq

from engine.types import Sequence

SLACK = 64  # entries of the heap that may be out of date, however few are queued


class WaitingQueue:
    """Lowest rank first (priority, then arrival). Held followers are not in the queue, so they block nobody.

    A follower (choice > 0) is held while a leader (choice 0) of its group is known and still computes its
    prompt, so that it finds the prompt's blocks published. The hold ends when the leader is ready or gone,
    however it went; a follower whose leader is unknown is queued at once.
    """

    def __init__(self, shared_from: int | None) -> None:
        """`shared_from`: prompts longer than this can share blocks; None if nothing is ever shared."""
        self._shared_from = shared_from
        self._heap: list[tuple[tuple[int, float, int], Sequence]] = []
        self._queued: set[Sequence] = set()  # what left out of order stays in the heap until it comes up
        self._held: dict[str, dict[Sequence, None]] = {}  # by group, for groups whose leader is not ready
        self._num_held = 0

    def __len__(self) -> int:
        return len(self._queued) + self._num_held

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._queued or seq in self._held.get(seq.request.group, ())

    def add(self, seq: Sequence) -> None:
        """A new sequence: queue it or, if it can profit from its leader, hold it."""
        request = seq.request
        if request.group and self._shared_from is not None and len(request.prompt_ids) > self._shared_from:
            if request.choice == 0:
                self._held.setdefault(request.group, {})
            elif request.group in self._held:
                self._held[request.group][seq] = None
                self._num_held += 1
                return
        self.push(seq)

    def push(self, seq: Sequence) -> None:
        """Queue a sequence by its rank (ranks differ, so that sequences are never compared)."""
        self._queued.add(seq)
        heapq.heappush(self._heap, (seq.rank, seq))

    def head(self) -> Sequence | None:
        """The sequence to run next, which stays in the queue."""
        heap, queued = self._heap, self._queued
        while heap and heap[0][1] not in queued:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def pop(self) -> Sequence:
        seq = self.head()
        assert seq is not None, "the queue is empty"
        heapq.heappop(self._heap)
        self._queued.discard(seq)
        return seq

    def discard(self, seq: Sequence) -> None:
        """A sequence ended: forget it if it is here, and let its followers go if it led any."""
        if seq in self._queued:
            self._queued.discard(seq)
            self._clear_out()
        held = self._held.get(seq.request.group)
        if held is not None and seq in held:
            del held[seq]
            self._num_held -= 1
        self.leader_ready(seq)

    def _clear_out(self) -> None:
        """Forget those that left out of order once they are most of the heap: it would hold on to their prompts."""
        if len(self._heap) > 2 * len(self._queued) + SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in self._queued]
            heapq.heapify(self._heap)

    def leader_ready(self, seq: Sequence) -> None:
        """If `seq` leads a group, its followers need not wait for it any longer."""
        if seq.request.choice == 0 and seq.request.group:
            for follower in self._held.pop(seq.request.group, ()):
                self._num_held -= 1
                self.push(follower)
