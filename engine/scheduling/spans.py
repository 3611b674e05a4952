"""Where the steps of denoised sequences end, and how a step's tokens are split among them.

A denoised sequence runs all positions up to its `reach`, or none: attention inside a block, or a canvas, looks both
ways, so a part of it would be another computation. Only the committed tokens of closed blocks can come in pieces.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from engine.scheduling.budget import Share
from engine.types import DecodeTraits, Passes, Request, ScheduledSeq, Sequence


def reach(seq: Sequence, traits: DecodeTraits) -> int:
    """The position behind the last one that a step covers which denoises this sequence.

    Block-causal: the end of the block that holds the first open position. It may lie past the sequence's limit, by
    less than a block. A canvas: its end in whole passes and under a prefix cache, else the end of the open block.
    One that is only read has nothing open.
    """
    if seq.request.reading is not None:
        return seq.num_tokens
    if traits.canvas and seq.num_computed == 0:
        return canvas_span(seq.request, traits)
    if not traits.canvas or traits.unit > 1:  # a canvas with a unit: its drafter's blocks are counted from 0
        return (seq.num_tokens // traits.unit + 1) * traits.unit
    size, wish, end = len(seq.request.prompt_ids), seq.request.diffusion, canvas_end(seq.request)
    if wish.cache == "prefix":
        return end
    return min(size + ((seq.num_tokens - size) // wish.block_length + 1) * wish.block_length, end)


def canvas_end(request: Request) -> int:
    return len(request.prompt_ids) + request.diffusion.canvas


def canvas_span(request: Request, traits: DecodeTraits) -> int:
    """Most positions that any step of a canvas covers: it holds blocks for all of them from its first step on."""
    end, unit = canvas_end(request), traits.unit
    copies = request.diffusion.block_length if request.diffusion.verify == "masked_copy" else 0
    return max(end + copies, -(-end // unit) * unit)


def least_budget(traits: DecodeTraits) -> int:
    """Tokens that a step must have room for, so that every block-causal sequence can go on: two blocks.

    The step that opens a block feeds the closed one before it as well, whose KV becomes final there.
    """
    return 2 * traits.unit if traits.denoises and not traits.canvas else 1


class SpanBudget:
    """Splits `max_batched_tokens` over one step's sequences, which must have their turns in the order of `wants`.

    What the running denoise steps need is set aside before prompts and whole canvases get the rest: those are
    staggered over the steps that have room for them. Whoever finds no room comes first in the next step, as `late`,
    and then nothing is set aside for others. So nobody waits for more steps than there are running sequences, as
    each of them fits a step of its own.
    """

    def __init__(self, total: int, traits: DecodeTraits, wants: list[Share], late: Container[Sequence]) -> None:
        self.left = total
        self._traits = traits
        self._late = late
        self._set_aside = min(total, sum(_cost(want) for want in wants if self._steps(want)))

    def offer(self, seq: Sequence, want: Share) -> Share | None:
        """What the sequence may run; None if there is no room for it. Prompts may be cut where a block ends.

        The last block of committed tokens is never fed without the block behind it: models whose logits predict
        the next position open that one with the logits of the last row before it.
        """
        room = self.left - self._set_aside
        if seq in self._late:
            room = max(room, min(self.left, self._least(want)))
        if _cost(want) <= room:
            return want
        if self._traits.canvas:
            return None
        unit = self._traits.unit
        feed = (want.start + min(want.feed - 1, room)) // unit * unit - want.start
        return Share(want.start, feed, 0) if feed > 0 else None

    def turn(self, seq: Sequence, want: Share) -> Share | None:
        """The turn of a running sequence: see `offer`."""
        self.pass_over(want)
        return self.offer(seq, want)

    def pass_over(self, want: Share) -> None:
        """What was set aside for a running sequence is free to be spent, by it or others."""
        if self._steps(want):
            self._set_aside = max(0, self._set_aside - _cost(want))

    def _steps(self, want: Share) -> bool:
        """Is this a denoise step of a sequence that is under way, not a prompt or a whole canvas?"""
        return want.start > 0 if self._traits.canvas else want.feed <= self._traits.unit

    def _least(self, want: Share) -> int:
        """The smallest share that brings it on."""
        return _cost(want) if self._traits.canvas or self._steps(want) else self._traits.unit


@dataclass(slots=True)
class Denoised:
    """Totals of what denoising took and gave."""

    passes: Passes = field(default_factory=Passes)
    steps: int = 0  # one per sequence and step that denoises, not those that only compute committed tokens
    tokens: int = 0

    def note(self, seq: Sequence, item: ScheduledSeq, passes: Passes) -> Passes:
        """Take in one share's passes; returns the sequence's own so far."""
        self.passes = self.passes.plus(passes)
        self.steps += item.lookahead > 0
        return seq.passes.plus(passes)


def _cost(want: Share) -> int:
    return want.feed + want.lookahead
