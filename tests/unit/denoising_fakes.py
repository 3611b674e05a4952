"""Fake devices that denoise, over the fake KV memory of `fakes`: a canvas, and blocks that grow one by one.

Both check every slot that a step would read: it must hold what the right pass of the same request put there, or, in
closed blocks of block-causal models, what all tokens up to the block's end make of it, whoever computed it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from engine.diffusion import DiffusionParams
from engine.types import Admission, DecodeTraits, Passes, Request, ScheduledSeq, SeqResult, StepPlan
from tests.unit.fakes import AutoregressiveDevice, Driver, State, make_request, make_scheduler, truth


class Denoiser(AutoregressiveDevice):
    """What the two share: `state.tokens` are what the scheduler knows, `state.canvas` the open block (None: a mask)."""

    def __init__(self, num_blocks: int, rng: random.Random) -> None:
        super().__init__(num_blocks, rng)
        self.slots: dict[str, dict[int, int]] = {}  # by request: what its own slots must hold, by position
        self.open: dict[str, tuple[int, list[int | None]]] = {}  # by request: the open block's start, and its tokens
        self.stamp = 0

    def drop(self, request_ids: tuple[str, ...]) -> None:
        super().drop(request_ids)
        for request_id in request_ids:
            self.slots.pop(request_id, None)
            self.open.pop(request_id, None)

    def admit(self, admission: Admission) -> None:
        super().admit(admission)
        self.slots[admission.request.id] = {}

    def write(self, item: ScheduledSeq, positions: Iterable[int], value: int | None = None) -> None:
        """Rows of this pass; each pass leaves values that no other one does, unless the caller knows better."""
        for position in positions:
            self.stamp += 1
            kept = self.stamp if value is None else value
            self.memory[self.slot(item, position)] = self.slots[item.request_id][position] = kept

    def read(self, item: ScheduledSeq, positions: Iterable[int]) -> None:
        for position in positions:
            held = self.memory[self.slot(item, position)]
            assert held == self.slots[item.request_id][position], f"not its own KV at {position}"

    def begin(self, state: State, start: int, end: int) -> list[int | None]:
        """The open block, new or as it is: a new one holds what belongs to the prompt, and masks."""
        known = self.open.get(state.request.id)
        if known is None or known[0] != start:
            prompt = state.request.prompt_ids
            block = [prompt[p] if p < len(prompt) else None for p in range(start, end)]
            self.open[state.request.id] = (start, block)
        return self.open[state.request.id][1]

    def unmask(self, state: State, start: int, block: list[int | None], masked: Sequence[int]) -> list[int]:
        """Commit some of the masked places; the tokens by which the contiguous prefix passes what was handed over."""
        for place in self.rng.sample(masked, self.rng.randint(1, len(masked))):
            block[place] = truth(state.request, start + place)
        sent = len(state.tokens) - start
        filled = next((place for place, token in enumerate(block) if token is None), len(block))
        return [token for token in block[sent:filled] if token is not None]


class Canvas(Denoiser):
    """Full attention: whole passes, and steps over a private cache of the last one (none, prefix or dual)."""

    traits = DecodeTraits(chunkable=False, prefix_cacheable=False, denoises=True, canvas=True)

    def run(self, item: ScheduledSeq, state: State) -> SeqResult:
        request = state.request
        prompt, wish = len(request.prompt_ids), request.diffusion
        end, fed = prompt + wish.canvas, item.start + len(item.tokens)
        assert not item.pending and list(item.tokens) == state.tokens[item.start :] and fed == len(state.tokens)
        assert item.start == max(0, state.num_computed), "a canvas goes on where its last pass said"
        assert len(item.block_ids) * 4 >= end, "a canvas owns all its blocks from the start"
        start = prompt + (len(state.tokens) - prompt) // wish.block_length * wish.block_length
        block = self.begin(state, start, min(start + wish.block_length, end))
        reach = fed + item.lookahead
        if item.start == 0:
            assert reach == end + (wish.block_length if wish.verify == "masked_copy" else 0)
        else:
            assert item.start == start and reach == (end if wish.cache == "prefix" else start + len(block))
            self.read(item, range(start))
            self.read(item, range(reach, end))
        self.write(item, range(item.start, reach))
        tokens = self.unmask(state, start, block, [place for place, token in enumerate(block) if token is None])
        cached = start if None in block and wish.cache != "none" else 0
        result = self.commit(state, tokens, cached)
        return replace(result, passes=Passes(forwards=1, positions=reach - item.start))


class BlockCausal(Denoiser):
    """Blocks of eight over pages of four. The step that opens a block makes the KV of the closed one final."""

    traits = DecodeTraits(lookahead=8, denoises=True, unit=8)

    def run(self, item: ScheduledSeq, state: State) -> SeqResult:
        unit, fed = self.traits.unit, item.start + len(item.tokens)
        state.num_computed = item.start if state.num_computed < 0 else state.num_computed
        assert item.start == state.num_computed and not item.pending and item.start % unit == 0
        assert list(item.tokens) == state.tokens[item.start : fed]
        for position in range(item.start):  # of a prefix hit too: whoever computed it, it must be of these tokens
            held = self.memory[self.slot(item, position)]
            assert held == self.final(state, position), f"KV of other tokens at {position}"
        closed = fed - fed % unit
        for position in range(item.start, closed):
            self.write(item, (position,), self.final(state, position))
        passes = Passes(forwards=1, positions=fed + item.lookahead - item.start)
        if item.lookahead == 0:
            assert fed == closed < len(state.tokens), "the last block is fed with the open one behind it"
            return replace(self.commit(state, [], closed), passes=passes)
        assert fed == len(state.tokens) and fed + item.lookahead == closed + unit
        assert item.tokens or self.open.get(item.request_id, (-1,))[0] == closed, (
            "the row before a new block is missing"
        )
        block = self.begin(state, closed, closed + unit)
        self.write(item, range(closed, closed + unit))
        masked = [place for place, token in enumerate(block) if token is None]
        if state.request.diffusion.cache == "dual":  # only the first part of a block that has masks
            masked = [place for place in masked if place < masked[0] - masked[0] % 4 + 4]
        return replace(self.commit(state, self.unmask(state, closed, block, masked), closed), passes=passes)

    def final(self, state: State, position: int) -> int:
        """KV of a closed block: a function of its place and of all tokens up to its block's end."""
        return hash((position, state.digest(position - position % self.traits.unit + self.traits.unit - 1)))


class OddBlocks(BlockCausal):
    """Blocks of six over pages of four: two blocks and three pages are final together."""

    traits = DecodeTraits(lookahead=6, denoises=True, unit=6)


def canvas_request(request_id: str, prompt: int = 4, canvas: int = 8, *, block: int = 4, **fields: object) -> Request:
    """A request with a settled canvas; `cache`, `verify` and the fields of `make_request` may be given by name."""
    wish = DiffusionParams(
        cache=str(fields.pop("cache", "dual")),
        verify=str(fields.pop("verify", "")),
        block_length=block,
        canvas=canvas,
    )
    tokens = fields.pop("max_tokens", canvas)
    return make_request(request_id, prompt, tokens, diffusion=wish, **fields)  # type: ignore[arg-type]


def driver(device: type[Denoiser] = Canvas, *, lag: int = 0, **sizes: object) -> Driver:
    blocks = sizes.setdefault("blocks", 100)
    scheduler = make_scheduler(device.traits, **sizes)  # type: ignore[arg-type]
    return Driver(scheduler, device(blocks, random.Random(1)), lag)  # type: ignore[arg-type]


def spans(plan: StepPlan) -> dict[str, tuple[int, int, int]]:
    """By request: where its share starts, the known tokens it feeds, the positions it writes past them."""
    return {item.request_id: (item.start, len(item.tokens), item.lookahead) for item in plan.items}
