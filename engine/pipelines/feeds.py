"""What a denoise step feeds of a request, and which of its positions may get a token there.

Models that shift have the logits of position i in the row of position i - 1, so that a block's first position needs a
row that is no part of the block. Full attention has it in every whole pass: one that fills a cache commits the block's
first position whatever the rule says, for the passes over the cache lack that row (Fast-dLLM for Dream). Block-causal
models get it from the block before, in the pass that makes that block's KV final, and commit that one token there as
an autoregressive model would (Fast-dLLM v2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.pipelines.canvas import Canvas, Positions
from engine.runtime.batch import AttentionMode, SeqInput
from engine.types import ScheduledSeq

NOWHERE: Positions = np.empty(0, dtype=np.int64)


@dataclass(slots=True, eq=False)
class Feed:
    """One request's part of the running step: positions `start` to `stop` - 1, which see keys up to `kv_len` - 1."""

    item: ScheduledSeq
    canvas: Canvas
    start: int
    stop: int
    kv_len: int
    candidates: Positions = field(default_factory=lambda: NOWHERE)  # positions that may get a token
    forced: bool = False  # the first of them gets one, whatever the rule says
    opening: bool = False  # it is the block's first token, from the row before the block; no denoise step

    def input(self) -> SeqInput:
        return SeqInput(self.canvas.ids[self.start : self.stop], self.start, self.item.block_ids, self.kv_len)

    @property
    def rows(self) -> Positions:
        """Of the candidates' logits, counted from the feed's first row."""
        return self.candidates - (self.start + self.canvas.spec.shift)


def mode_of(block_causal: bool) -> AttentionMode:
    return AttentionMode.BLOCK_CAUSAL if block_causal else AttentionMode.BIDIRECTIONAL


def feed(canvas: Canvas, item: ScheduledSeq) -> Feed:
    """What a plan's item comes to."""
    if canvas.spec.block_causal:
        return block_causal_feed(canvas, item) if item.lookahead else prefill_feed(canvas, item)
    return whole_feed(canvas, item) if item.start == 0 else cached_feed(canvas, item)


def prefill_feed(canvas: Canvas, item: ScheduledSeq) -> Feed:
    """Committed tokens of closed blocks, whose KV is final after the pass."""
    end = item.start + len(item.tokens)
    return Feed(item, canvas, item.start, end, end)


def block_causal_feed(canvas: Canvas, item: ScheduledSeq) -> Feed:
    """Committed tokens that are not computed yet, such as those of the block before, then the open block."""
    block = canvas.block
    if canvas.spec.shift and block.masked[0]:
        # The row before may have been computed: fed again, its KV comes out as it is.
        start = min(item.start, block.start - 1)
        return Feed(item, canvas, start, block.start, block.start, np.array([block.start]), opening=True)
    candidates = canvas.candidates()
    width = canvas.spec.sub_block
    if canvas.cache == "dual" and width and block.cached and item.start == block.start:
        first = int(candidates[0]) // width * width
        if not block.masked[first - block.start]:
            return Feed(item, canvas, first, min(first + width, block.stop), block.stop, candidates)
    return Feed(item, canvas, item.start, block.stop, block.stop, candidates)


def whole_feed(canvas: Canvas, item: ScheduledSeq) -> Feed:
    """Prompt and canvas in one pass, which is exact, and whose KV later passes over a part of it see."""
    assert canvas.end is not None
    forced = canvas.spec.shift and canvas.cache != "none" and bool(canvas.block.left) and bool(canvas.block.masked[0])
    return Feed(item, canvas, 0, canvas.end, canvas.end, canvas.candidates(), forced)


def cached_feed(canvas: Canvas, item: ScheduledSeq) -> Feed:
    """The open block, and all that follows it under a prefix cache; the KV of these positions is overwritten."""
    assert canvas.end is not None
    block = canvas.block
    stop = canvas.end if canvas.cache == "prefix" else block.stop
    return Feed(item, canvas, block.start, stop, canvas.end, canvas.candidates())


def wanted_rows(feeds: Sequence[Feed]) -> list[int]:
    """The rows of all candidates among the packed tokens of a step."""
    rows: list[int] = []
    first = 0
    for part in feeds:
        rows.extend((part.rows + first).tolist())
        first += part.stop - part.start
    return rows
