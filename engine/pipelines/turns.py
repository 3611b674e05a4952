"""Whose turn it is in a request that is drafted and verified: what its next pass feeds, and what comes of it.

Positions of the open block are final, drafted since the last verify step, or masked. Drafting is cheap: over the served
model's own dual cache, or with a drafter. Verifying is one exact pass of the served model over the whole canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from engine.diffusion import DiffusionSpec
from engine.pipelines.canvas import Canvas, Positions
from engine.pipelines.feeds import Feed, block_causal_feed, cached_feed, mode_of, whole_feed
from engine.pipelines.verifying import Judgement, Opinion, with_copies
from engine.protocols import UnmaskRule
from engine.runtime.batch import AttentionMode, SeqInput
from engine.types import Passes, Request, ScheduledSeq, TokenLogprob


class Kind(Enum):
    REFRESH = auto()  # the served model's exact pass at the start of a block that it drafts itself
    DRAFT = auto()
    VERIFY = auto()


@dataclass(frozen=True, slots=True)
class Models:
    """The served model, and the drafter if that is another one; blocks are the drafting model's."""

    served: DiffusionSpec
    drafter: DiffusionSpec | None
    block_size: int  # of the pools

    @property
    def drafting(self) -> DiffusionSpec:
        return self.drafter or self.served


@dataclass(slots=True, eq=False)
class Turn:
    """One request's pass of the running step. `rows` count from the first row that it feeds."""

    state: Drafting
    feed: Feed  # its candidates may get a token from this pass
    kind: Kind
    served: bool  # else it is the drafter's
    input: SeqInput
    mode: AttentionMode
    rows: list[int]  # of the candidates' logits
    asked: list[int] = field(default_factory=list)  # drafted positions of which the verifier's opinion is wanted
    asked_rows: list[int] = field(default_factory=list)
    ahead: bool = False  # the candidates are the next block's, if this pass closes the open one as it is
    failed: bool = False
    remasked: int = 0
    closed: list[tuple[tuple[int, ...], tuple[TokenLogprob, ...] | None]] = field(default_factory=list)

    def passes(self) -> Passes:
        fed = len(self.input.ids)
        if not self.served:
            return Passes(draft_forwards=1, positions=fed, draft_positions=fed)
        verified = self.kind is Kind.VERIFY
        return Passes(forwards=1, verifies=int(verified), remasked=self.remasked, positions=fed)


class Drafting:
    """Device-side truth of one request."""

    def __init__(self, request: Request, output_ids: Sequence[int], models: Models, rule: UnmaskRule) -> None:
        """`output_ids`: as for a Canvas. The request starts again at the start of its open block, nothing drafted."""
        self.canvas = canvas = Canvas(request, output_ids, models.drafting, rule, ends=True)
        assert canvas.end is not None
        self.end = canvas.end
        self.verify = request.diffusion.verify
        self.least = request.diffusion.verify_threshold
        self._models = models
        self._stops = frozenset(request.eos_ids + request.sampling.stop_token_ids)
        self._steps = max(1, request.diffusion.drafter_steps)
        self._drafted: dict[int, int] = {}  # position -> denoise step in which it was drafted
        self._taken = 0  # draft steps since the last verify step, or since the block began
        self._begun = False  # is there a cache for the open block?
        self._final = 0  # positions whose KV is final, in a block-causal drafter
        if models.drafting.block_causal:
            canvas.cache = "block"

    def kind(self) -> Kind:
        """Of the next pass."""
        if self._models.drafter is None and not self._begun:
            return Kind.REFRESH
        return Kind.DRAFT if self._taken < self._steps and self.canvas.block.left else Kind.VERIFY

    def start(self) -> int:
        """Where the next pass begins: the first position whose KV it does not find; 0 asks for the whole canvas."""
        if self.kind() is not Kind.DRAFT:
            return 0
        if self._models.drafting.block_causal:
            return self._final
        return self.canvas.block.start if self._begun and self.canvas.cache != "none" else 0

    def turn(self, item: ScheduledSeq) -> Turn:
        kind = self.kind()
        if kind is Kind.VERIFY:
            return self._verify_turn(item)
        canvas, spec = self.canvas, self._models.drafting
        if spec.block_causal:
            part = block_causal_feed(canvas, item)
        else:
            part = cached_feed(canvas, item) if self.start() else whole_feed(canvas, item)
        if not part.opening and spec.block_causal:  # it is trained on whole blocks: what the canvas cuts is masks
            part.stop = part.kv_len = -(-part.stop // canvas.length) * canvas.length
        served = self._models.drafter is None
        return Turn(self, part, kind, served, self._input(part), mode_of(spec.block_causal), part.rows.tolist())

    def _input(self, part: Feed) -> SeqInput:
        ids = self.canvas.ids[part.start : part.stop]
        masks = [self.canvas.spec.mask_id] * (part.stop - part.start - len(ids))
        return SeqInput(ids + masks, part.start, part.item.block_ids, part.kv_len)

    def _verify_turn(self, item: ScheduledSeq) -> Turn:
        """A whole pass. It commits what is masked, too, or begins the next block where nothing is and the cache is
        the served model's."""
        canvas, block, shift = self.canvas, self.canvas.block, self._models.served.shift
        ahead = not block.left and self._models.drafter is None
        candidates = self._next_block() if ahead else np.flatnonzero(block.masked) + block.start
        part = Feed(item, canvas, 0, self.end, self.end, candidates)
        part.forced = shift and canvas.cache != "none" and ahead and bool(len(candidates))
        asked = [] if self.verify == "trust" else sorted(self._drafted)
        copied = self.verify == "masked_copy" and bool(asked)
        fed, asked_rows = self._input(part), [position - shift for position in asked]
        rows: Sequence[int] = range(self.end)
        if copied:
            copies = with_copies(fed.ids, asked, canvas.spec.mask_id, item.block_ids, self._models.block_size)
            fed, rows = copies.input, copies.rows
            asked_rows = list(range(self.end, self.end + len(asked)))
        mode = AttentionMode.TREE if copied else AttentionMode.BIDIRECTIONAL
        wanted = [rows[position - shift] for position in candidates.tolist()]
        return Turn(self, part, Kind.VERIFY, True, fed, mode, wanted, asked, asked_rows, ahead)

    def _next_block(self) -> Positions:
        start = self.canvas.block.stop
        return np.arange(start, min(start + self.canvas.length, self.end))

    def step_of(self, position: int) -> int:
        """The denoise step in which it was drafted."""
        return self._drafted[position]

    def never_again(self) -> tuple[int, ...]:
        """What drafting can't predict a second time: with shifted logits, the block's first position, whose row is
        no part of the block."""
        return (self.canvas.block.start,) if self._models.drafting.shift and self.canvas.cache != "none" else ()

    def judged(self, turn: Turn, judgement: Judgement, opinions: Sequence[Opinion]) -> list[Opinion]:
        """The drafted tokens are final now, or masked. Those positions that got another token."""
        rejected = [opinion for opinion in opinions if opinion.position in judgement.replaced]
        placed = [opinion for opinion in rejected if opinion.own != opinion.drafted]
        self.canvas.place((opinion.position, opinion.own) for opinion in placed)
        self.canvas.remask(np.array(judgement.masked, dtype=np.int64))
        turn.remasked = len(judgement.masked) + len(placed)
        self._drafted.clear()
        self._taken = 0
        if turn.ahead and not turn.remasked:
            self._close(turn)  # the candidates are the new block's
        elif turn.ahead:
            turn.feed.candidates, turn.rows = turn.feed.candidates[:0], []
        return placed

    def denoised(self, turn: Turn, committed: Positions, step: int) -> None:
        """The pass gave these positions their tokens, in this denoise step of the block."""
        self._begun = True
        if turn.kind is Kind.DRAFT:
            self._drafted.update((position, step) for position in committed.tolist())
            self._taken += 1
            self._final = self.canvas.block.start
            if self.verify == "trust" and not self.canvas.block.left:
                self._drafted.clear()  # nothing would come of a verify step

    def settle(self, turn: Turn) -> None:
        """The turn is over. Tokens leave in closed blocks, and where the answer has ended."""
        canvas, block = self.canvas, self.canvas.block
        if self._drafted or block.start == block.stop:
            return
        if not block.left:
            self._close(turn)
        elif not self._stops.isdisjoint(canvas.ids[canvas.told : block.start + int(block.masked.argmax())]):
            turn.closed.append(canvas.hand_over())  # all before the first mask is final

    def _close(self, turn: Turn) -> None:
        """All of the open block is final: hand it over, and open the next one."""
        turn.closed.append(self.canvas.hand_over())
        self.canvas.advance()
        self._begun = False
        self._taken = 0
