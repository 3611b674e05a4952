"""What denoising pipelines keep of a request: its tokens, masks where there are none yet, and the block that is open.

Blocks are filled one after another. They are counted from the end of the prompt where attention is full, and from
position 0 where it is block-causal; there a prompt may end inside the first open block. A request that starts again
goes back to the start of its open block, masks and all: draws are functions of position and step, so that it comes
to the same tokens, and only those that were not handed over before leave it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.diffusion import CanvasStep, DiffusionSpec
from engine.pipelines.quotas import Schedule
from engine.protocols import UnmaskRule
from engine.runtime.sampler import SamplingState
from engine.types import Request, StepPlan, TokenLogprob

Positions = npt.NDArray[np.int64]  # absolute, rising
Chosen = npt.NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class OpenBlock:
    """Positions `start` to `stop` - 1; those that are `masked` [stop - start] have no token yet."""

    start: int
    stop: int
    masked: Chosen
    begun: int  # masks when its first denoise step began
    step: int = 0  # denoise steps since then
    cached: bool = False  # has a denoise step of the whole block left its KV?
    turns: int = 0  # steps that changed it, where anybody wants to know

    @property
    def left(self) -> int:
        """Masks; a block without any is closed."""
        return int(np.count_nonzero(self.masked))


class Canvas:
    """Device-side truth of one request."""

    def __init__(
        self,
        request: Request,
        output_ids: Sequence[int],
        spec: DiffusionSpec,
        rule: UnmaskRule,
        *,
        ends: bool = False,
    ) -> None:
        """`output_ids`: what was handed over before, if the request starts again.

        `ends`: the answer has a canvas though the model is block-causal; its last block may be cut by the end.
        """
        params, prompt = request.diffusion, request.prompt_ids
        self.request = request
        self.spec = spec
        self.rule = rule
        self.knobs = dict(rule.card.settle(dict(params.knobs)))
        self.cache = params.cache or spec.caches[0]
        self.length = spec.block_length if spec.block_causal else params.block_length or spec.block_length
        self.end = None if spec.block_causal and not ends else len(prompt) + params.canvas  # of the canvas
        self.schedule = Schedule.of(request, spec, self.length, rule.card)
        self.sampling = SamplingState(request)
        self.told = len(prompt) + len(output_ids)  # so many tokens are handed over, the prompt's among them
        self.reports: dict[int, TokenLogprob] = {}  # of committed tokens that are not handed over, by position
        self._changes: dict[int, int] | None = (
            {} if params.trace else None
        )  # this step's, by position; -1: masked again
        origin = 0 if spec.block_causal else len(prompt)
        start = self.told - (self.told - origin) % self.length
        self.ids = [*prompt, *output_ids][: max(start, len(prompt))]
        if self.end is not None:
            self._pad(self.end)
        self.block = self._open(start)
        self._changed: OpenBlock | None = None  # the block that was open when the step last changed something

    def candidates(self) -> Positions:
        """Masked positions that are open to this step: those of the first sub-block that has any."""
        masked = np.flatnonzero(self.block.masked)
        width = self.spec.sub_block
        if width and len(masked):
            masked = masked[masked < (masked[0] // width + 1) * width]
        return masked + self.block.start

    def commit(self, positions: Positions, tokens: Sequence[int]) -> None:
        """Put tokens at positions of the open block."""
        self.place(zip(positions.tolist(), tokens, strict=True))
        self.block.masked[positions - self.block.start] = False

    def place(self, tokens: Iterable[tuple[int, int]]) -> None:
        """Write tokens at positions of the open block, whether or not they had one."""
        for position, token in tokens:
            self.ids[position] = token
            if self._changes is not None:
                self._note(position, token)

    def remask(self, positions: Positions) -> None:
        """Take back tokens of the open block that were not handed over."""
        for position in positions.tolist():
            self.ids[position] = self.spec.mask_id
            self.reports.pop(position, None)
            if self._changes is not None:
                self._note(position, -1)
        self.block.masked[positions - self.block.start] = True

    def take_changes(self) -> CanvasStep | None:
        """What the step that ends now has changed; None where that is nothing, or nobody wants to know."""
        if not self._changes:
            return None
        block, self._changed = self._changed, None
        assert block is not None
        changes, self._changes = sorted(self._changes.items()), {}
        block.turns += 1
        return CanvasStep(
            block.start,
            block.stop,
            block.turns,
            tuple((position, token) for position, token in changes if token >= 0),
            tuple(position for position, token in changes if token < 0),
        )

    def _note(self, position: int, token: int) -> None:
        assert self._changes is not None
        self._changes[position] = token
        self._changed = self.block

    def hand_over(self) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...] | None]:
        """The tokens by which the part without masks has grown, and their log-probabilities if they are wanted."""
        block = self.block
        end = block.start + int(block.masked.argmax()) if block.left else block.stop
        new = range(self.told, end)  # empty while a request that started again has not come further than it was
        self.told = max(self.told, end)
        wanted = self.request.sampling.logprobs is not None
        return tuple(self.ids[new.start : end]), tuple(self.reports.pop(at) for at in new) if wanted else None

    def advance(self) -> None:
        """Open the next block; one without positions where the canvas is full."""
        self.reports.clear()
        self.block = self._open(self.block.stop)

    def _open(self, start: int) -> OpenBlock:
        stop = start + self.length if self.end is None else min(start + self.length, self.end)
        self._pad(stop)
        masked = np.arange(start, stop) >= len(self.request.prompt_ids)
        return OpenBlock(start, stop, masked, int(np.count_nonzero(masked)))

    def _pad(self, end: int) -> None:
        self.ids.extend([self.spec.mask_id] * (end - len(self.ids)))


class CanvasTable:
    """The canvases of all requests between `admitted` and `dropped`, by id."""

    def __init__(self, spec: DiffusionSpec, rules: Mapping[str, UnmaskRule]) -> None:
        self._spec = spec
        self._rules = rules
        self._canvases: dict[str, Canvas] = {}

    def __len__(self) -> int:
        return len(self._canvases)

    def __getitem__(self, request_id: str) -> Canvas:
        return self._canvases[request_id]

    def enter(self, plan: StepPlan) -> None:
        """Forget whom the plan drops, then take in whom it admits."""
        for request_id in plan.dropped:
            self._canvases.pop(request_id, None)
        for admission in plan.admitted:
            request = admission.request
            if request.reading is not None:
                continue  # it has nothing to fill
            rule = self._rules[request.diffusion.rule or self._spec.rule]
            self._canvases[request.id] = Canvas(request, admission.output_ids, self._spec, rule)
