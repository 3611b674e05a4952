"""Requests that read, in pipelines that write: which rows of a step are theirs, and what they end with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from engine.diffusion import DiffusionSpec
from engine.pipelines.reader import Reader, Wanted
from engine.pipelines.states import FAILED, Share, first_rows
from engine.protocols import ForwardRunner
from engine.reading import Readout
from engine.runtime.batch import AttentionMode, SeqInput
from engine.types import Passes, ScheduledSeq, SeqResult, StepPlan


def forward(
    runner: ForwardRunner,
    inputs: Sequence[SeqInput],
    rows: Sequence[int],
    wanted: Wanted,
    mode: AttentionMode = AttentionMode.CAUSAL,
    *,
    stated: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Logits of the rows and, if `stated`, what the output head read there; in the same pass, `wanted` is read."""
    scored = [*rows, *wanted.laws]
    states: Tensor | None = None
    if stated or wanted.states:
        read = [*(rows if stated else ()), *wanted.states]
        logits, states = runner.forward_with_states(inputs, scored, mode, read=read)
        wanted.take(logits[len(rows) :, : runner.vocab_size], states[len(read) - len(wanted.states) :])
        return logits[: len(rows)], states[: len(rows)] if stated else None
    logits = runner.forward(inputs, scored, mode)
    wanted.take(logits[len(rows) :, : runner.vocab_size], None)
    return logits[: len(rows)], None


def wanted_of(shares: Iterable[Share], first: Sequence[int]) -> Wanted:
    """`first`: the row in which each share begins."""
    wanted = Wanted()
    for share, row in zip(shares, first, strict=True):
        if share.state.reader is not None:
            wanted.add(share.state.reader, share.start, share.end, row)
    return wanted


def readout_of(share: Share) -> tuple[Readout | None, str | None]:
    """What a share's request has read, if this was the last of its prompt; or the error that it ends with."""
    reader = share.state.reader
    if reader is None or share.end < reader.length:
        return None, None
    found = reader.readout()
    return found, FAILED if found is None else None


class CanvasReader:
    """Readings of a model that denoises. The prompt, masks and all, is the canvas; nothing is committed.

    They have passes of their own: chunks of whole blocks where attention is block-causal, else the whole of it at once.
    """

    def __init__(self, runner: ForwardRunner, spec: DiffusionSpec, vocab_size: int) -> None:
        self._runner = runner
        self._spec = spec
        self._vocab_size = vocab_size
        self._readers: dict[str, Reader] = {}

    def __len__(self) -> int:
        return len(self._readers)

    def enter(self, plan: StepPlan) -> None:
        """Forget whom the plan drops, then take in those of whom it admits that read."""
        for request_id in plan.dropped:
            self._readers.pop(request_id, None)
        for admission in plan.admitted:
            request = admission.request
            if request.reading is not None:
                self._readers[request.id] = Reader(request.reading, len(request.prompt_ids), int(self._spec.shift))

    def execute(self, plan: StepPlan) -> tuple[tuple[SeqResult, ...], list[ScheduledSeq]]:
        """One pass for all readings of the plan; what came of them, and the items of all others."""
        items = [item for item in plan.items if item.request_id in self._readers]
        if not items:
            return (), list(plan.items)
        inputs = [SeqInput(part.tokens, part.start, part.block_ids, part.start + len(part.tokens)) for part in items]
        wanted = Wanted()
        for part, row in zip(items, first_rows(inputs), strict=True):
            wanted.add(self._readers[part.request_id], part.start, part.start + len(part.tokens), row)
        mode = AttentionMode.BLOCK_CAUSAL if self._spec.block_causal else AttentionMode.BIDIRECTIONAL
        block, states = self._spec.block_length, None
        if wanted.states:
            logits, states = self._runner.forward_with_states(inputs, wanted.laws, mode, block, read=wanted.states)
        else:
            logits = self._runner.forward(inputs, wanted.laws, mode, block)
        logits = logits[:, : self._vocab_size]
        logits[:, self._spec.mask_id] = float("-inf")  # no text has it
        wanted.take(logits, states)
        others = [item for item in plan.items if item.request_id not in self._readers]
        return tuple(map(self._result, items)), others

    def _result(self, item: ScheduledSeq) -> SeqResult:
        reader, end = self._readers[item.request_id], item.start + len(item.tokens)
        passes = Passes(forwards=1, positions=len(item.tokens))
        if end < reader.length:
            return SeqResult(item.request_id, (), end, passes=passes)
        found = reader.readout()
        error = FAILED if found is None else None
        return SeqResult(item.request_id, (), end, passes=passes, error=error, reading=found)
