"""How much of a sequence the next step may run: arithmetic on its counters and its shares in flight."""

from __future__ import annotations

from engine.records import record
from engine.types import DecodeTraits, ScheduledSeq, Sequence


@record
class Share:
    """What a sequence would like of a step, or is given: feed `feed` tokens from position `start`, then write up to
    `lookahead` positions more."""

    start: int
    feed: int
    lookahead: int


def samples(seq: Sequence, item: ScheduledSeq) -> bool:
    """Does this share in flight reach the end of the committed tokens, so that it may commit new ones?"""
    return item.pending or item.start + len(item.tokens) >= seq.num_tokens


def awaits_tokens(seq: Sequence) -> bool:
    """Is a step in flight about to commit tokens that the scheduler has not seen?"""
    return bool(seq.in_flight) and samples(seq, seq.in_flight[-1])


def backlog(seq: Sequence, traits: DecodeTraits) -> int | None:
    """Tokens to feed before the sequence can go on, or None if it has to wait for a step in flight.

    Behind a sampling step that is one token, yet unseen; but not where that step may reach the sequence's limit,
    and not for sequences that are denoised or can't be chunked: what those feed next depends on the result.
    """
    if not seq.in_flight:
        return len(seq.request.prompt_ids) + len(seq.output_ids) - seq.num_computed
    if not traits.chunkable:
        return None
    if awaits_tokens(seq):
        return 1 if not traits.denoises and seq.num_reserved + 1 < seq.limit else None
    return seq.num_tokens - seq.num_reserved


def reserved(seq: Sequence) -> int:
    """Upper bound of the positions that are or may be written, from what is committed and what is in flight.

    A sampling step that may write up to position e commits at most e + 1 tokens: the last has no KV yet.
    """
    if not seq.in_flight:
        return seq.num_computed
    bound, tokens = seq.num_computed, seq.num_tokens
    for item in seq.in_flight:
        fed = tokens if item.pending else item.start + len(item.tokens)
        bound = fed + item.lookahead
        tokens = max(tokens, bound + 1)
    return bound


class StepBudget:
    """Splits `max_batched_tokens` over one step's sequences, which must have their turns in the order of `wants`.

    Decodes are never starved by prefills: what all of them need is set aside first. Their lookahead shrinks to
    what is left, and to half of that while prompts wait, so that drafting never keeps a prompt out. Prompts get
    the rest, in chunks.
    """

    def __init__(self, total: int, traits: DecodeTraits, wants: list[Share], *, queued: bool) -> None:
        """`wants`: of each running sequence; `queued`: could a waiting one start in this step?"""
        self.left = total
        self._bonus = int(traits.drafts)  # a round commits one token more than it drafts
        self._decode_limit = traits.lookahead + 1  # a longer backlog is a prefill
        self._cap = traits.lookahead
        decodes = [want for want in wants if want.feed <= self._decode_limit]
        needed = sum([want.feed for want in decodes])
        lookaheads = [want.lookahead for want in decodes if want.lookahead] if traits.lookahead else []
        if lookaheads:
            spare = max(0, total - needed)
            spare = spare // 2 if queued or len(decodes) < len(wants) else spare
            if sum(lookaheads) > spare:
                self._cap = spare // len(lookaheads)
            needed += sum([min(lookahead, self._cap) for lookahead in lookaheads])
        self._set_aside = min(total, needed)

    def turn(self, seq: Sequence, want: Share) -> Share | None:
        """The turn of a running sequence: what it may run; None if nothing is left for it."""
        self.pass_over(want)
        if not want.lookahead and 0 < want.feed <= self.left - self._set_aside:
            return want  # nearly all turns
        return self.offer(seq, want)

    def offer(self, seq: Sequence, want: Share) -> Share | None:
        """What a sequence may run for which nothing was set aside; None if nothing is left for it."""
        start, todo = want.start, want.feed
        room = self.left - self._set_aside
        wanted = max(0, min(want.lookahead, self._cap, seq.limit - start - todo - self._bonus))
        feed = min(todo, room)
        lookahead = min(wanted, room - feed)
        return Share(start, feed, lookahead) if feed >= 0 and feed + lookahead > 0 else None

    def pass_over(self, want: Share) -> None:
        """What was set aside for a running sequence is free to be spent, by it or others."""
        if want.feed <= self._decode_limit:
            self._set_aside = max(0, self._set_aside - want.feed - min(want.lookahead, self._cap))
