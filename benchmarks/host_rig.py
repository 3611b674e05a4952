"""Engines whose model takes no time: real scheduler, pipelines, batches and samplers over logits made beforehand.

What is left of a step is the host's own work, told apart by the function that does it. Clocks count the processor
time of the engine's thread, so that other programs on the machine don't matter (torch should have one thread).
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch

from engine.attention.paged_cpu import PagedCpuAttention
from engine.config import EngineConfig, KVConfig, SchedulerConfig
from engine.core import EngineCore
from engine.diffusion import BLOCK_CAUSAL, DiffusionSpec
from engine.drafters.dflash import DFlashDrafter
from engine.drafters.ngram import NgramDrafter
from engine.models.adapter import DecoderAdapter
from engine.models.context import ForwardContext, Taps
from engine.pipelines import denoise, referee, shaping, states
from engine.pipelines.autoregressive import AutoregressivePipeline
from engine.pipelines.masked_diffusion import MaskedDiffusionPipeline
from engine.pipelines.speculative import SpeculativePipeline
from engine.protocols import BlockDraftModel, DraftAsk, Drafter, Pipeline
from engine.runtime.assembly import build_rules
from engine.runtime.batch import Packer
from engine.runtime.kv_cache import PagedKVCache
from engine.runtime.runner import ModelRunner
from engine.runtime.sampler import Sampler
from engine.scheduling.scheduler import Scheduler
from engine.types import Capacity, Request, SamplingParams, SpeculationParams, StepOutput, StepPlan
from engine.verifiers.rejection import RejectionVerifier
from engine.verifiers.strict import StrictVerifier

VOCABULARY = 49_152
WORDS = 150  # tokens that texts are made of
MASK = VOCABULARY - 1
DRAFTED = 7  # tokens of a draft
BLOCK = 32  # tokens that are denoised together
FED = 8192  # tokens that a step may feed


@dataclass(frozen=True, slots=True)
class Case:
    """`pipeline`: autoregressive, ngram, dflash or masked_diffusion."""

    pipeline: str
    batch: int
    prompt: int = 256
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(100_000, temperature=0.0, ignore_eos=True))
    verifier: str = "strict"


class Clocks:
    """Processor seconds of this thread by part, each without what is spent in parts inside of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[list[float]] = []

    def timed(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(function)
        def run(*args: object, **kwargs: object) -> object:
            inner = [0.0]
            self._open.append(inner)
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.thread_time() - begin
                self._open.pop()
                if self._open:
                    self._open[-1][0] += spent
                self.seconds[name] = self.seconds.get(name, 0.0) + spent - inner[0]

        return run


MODEL = "model"  # no work of the host's
PARTS: tuple[tuple[object, str, str], ...] = (
    (EngineCore, "step", "core"),
    (Scheduler, "schedule", "schedule"),
    (Scheduler, "update", "update"),
    (AutoregressivePipeline, "execute", "pipeline"),
    (SpeculativePipeline, "execute", "pipeline"),
    (MaskedDiffusionPipeline, "execute", "pipeline"),
    (states.StateTable, "shares", "pipeline"),
    (Packer, "pack", "pack"),
    (PagedCpuAttention, "prepare", "pack"),
    (Sampler, "sample", "sampler"),
    (Sampler, "sample_spread", "sampler"),
    (Sampler, "denoise", "sampler"),
    (Sampler, "processed_log_probs", "laws"),
    (referee.Referee, "verify", "referee"),
    (referee.Referee, "draw", "referee"),
    (StrictVerifier, "verify", "verifier"),
    (RejectionVerifier, "verify", "verifier"),
    (shaping.Shaper, "shape", "shaping"),
    (shaping.Shaper, "observe", "shaping"),
    (NgramDrafter, "propose", "drafter"),
    (NgramDrafter, "commit", "drafter"),
    (DFlashDrafter, "propose", "drafter"),
    (denoise, "certainty", "certainty"),
)


@contextmanager
def clocked(clocks: Clocks) -> Iterator[None]:
    """Every function of PARTS is timed in this block."""
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in PARTS]
    try:
        for owner, name, part in PARTS:
            setattr(owner, name, clocks.timed(part, getattr(owner, name)))
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


class Text:
    """What comes after a token: mostly the same as the last time, so that drafts stand now and then."""

    def __init__(self) -> None:
        chance = random.Random(7)
        self.after = torch.tensor([chance.randrange(WORDS) for _ in range(WORDS)])

    def follow(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        surprise = (positions * 7919 + tokens * 31) % 11 == 0
        return torch.where(surprise, (positions * 104_729 + tokens) % WORDS, self.after[tokens % WORDS])


class Logits:
    """Rows of numbers like a model's, each with one token that stands out; made once, and lent without a copy."""

    def __init__(self, rows: int) -> None:
        self._rows = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(1)).mul_(3.0)
        self._set: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def lend(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._set is not None:
            at, before, kept = self._set
            self._rows[at, before] = kept
        at = torch.arange(len(tokens))
        self._set = at, tokens, self._rows[at, tokens]
        self._rows[at, tokens] = 18.0
        return self._rows[: len(tokens)]


class InstantAdapter:
    """In place of a `DecoderAdapter`."""

    vocab_size = VOCABULARY
    device = torch.device("cpu")

    def __init__(self, rows: int, clocks: Clocks, *, masked: bool) -> None:
        self._logits, self._text, self._masked = Logits(rows), Text(), masked
        self.forward = clocks.timed(MODEL, self._forward)

    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        _context: ForwardContext,
        _taps: Taps | None = None,
    ) -> torch.Tensor:
        tokens, places = ids[rows], positions[rows]
        if self._masked:
            tokens = places * 7 % WORDS
        return self._logits.lend(self._text.follow(tokens, places))


class InstantDraft:
    """In place of a `BlockDraftModel`."""

    most = DRAFTED
    sequential = False

    def __init__(self, rows: int, clocks: Clocks) -> None:
        self._logits, self._text = Logits(rows), Text()
        self.blocks = clocks.timed(MODEL, self._blocks)

    def _blocks(self, anchors: Sequence[int], asks: Sequence[DraftAsk]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, rows = torch.tensor(anchors), []
        for step in range(self.most):
            tokens = self._text.follow(tokens, torch.tensor([ask.position + step for ask in asks]))
            rows.append(tokens)
        logits = self._logits.lend(torch.stack(rows, 1).flatten())
        return logits.view(len(asks), self.most, VOCABULARY), torch.zeros(len(asks), self.most, 8)

    def confidence(self, _hidden: torch.Tensor, _previous: torch.Tensor) -> None:
        return None

    def target_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return ids

    def widen(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


@dataclass(frozen=True, slots=True)
class Done:
    """See `protocols.StepHandle`."""

    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


class PlainWorker:
    """See `protocols.Worker`."""

    def __init__(self, pipeline: Pipeline, capacity: Capacity) -> None:
        self._pipeline, self._capacity = pipeline, capacity

    def capacity(self) -> Capacity:
        return self._capacity

    def prepare(self, _: Request) -> None:
        """Nothing here has a grammar."""

    def submit(self, plan: StepPlan) -> Done:
        return Done(self._pipeline.execute(plan))

    def num_states(self) -> int:
        return self._pipeline.num_states()

    def close(self) -> None:
        pass


def build(case: Case, clocks: Clocks, steps: int) -> EngineCore:
    """An engine for this case with all its requests added, and room for so many steps."""
    reach = case.prompt + (steps + 50) * (BLOCK if case.pipeline == "masked_diffusion" else DRAFTED + 1)
    config = EngineConfig(
        scheduler=SchedulerConfig(max_num_seqs=case.batch, max_batched_tokens=max(FED, case.batch * BLOCK)),
        kv=KVConfig(prefix_cache=False),
    )
    size = config.kv.block_size
    blocks = case.batch * -(-reach // size) + 1
    pipeline = _pipeline(case, clocks, blocks, size)
    worker = PlainWorker(pipeline, Capacity(blocks, size, reach, VOCABULARY, pipeline.traits))
    core = EngineCore(worker, config)
    speculation = SpeculationParams(verifier="" if case.verifier == "strict" else case.verifier)
    chance = random.Random(1)
    for i in range(case.batch):
        prompt = tuple(chance.randrange(WORDS) for _ in range(case.prompt))
        core.add(Request(f"request {i}", prompt, case.sampling, arrival=float(i), speculation=speculation))
    return core


def _pipeline(case: Case, clocks: Clocks, blocks: int, size: int) -> Pipeline:
    masked = case.pipeline == "masked_diffusion"
    adapter = cast(DecoderAdapter, InstantAdapter(case.batch * BLOCK, clocks, masked=masked))
    model = ModelRunner(adapter, PagedKVCache((), blocks, size, torch.float32, adapter.device), PagedCpuAttention())
    if masked:
        return MaskedDiffusionPipeline(model, DiffusionSpec(BLOCK_CAUSAL, MASK, BLOCK), build_rules())
    if case.pipeline == "autoregressive":
        return AutoregressivePipeline(model)
    drafter: Drafter = NgramDrafter()
    if case.pipeline == "dflash":
        drafter = DFlashDrafter(cast(BlockDraftModel, InstantDraft(case.batch * DRAFTED, clocks)))
    return SpeculativePipeline(model, drafter, [StrictVerifier(), RejectionVerifier()], DRAFTED)


def measure(case: Case, steps: int) -> dict[str, float]:
    """Microseconds of a step by part, over `steps` steps in which all sequences decode."""
    torch.set_num_threads(1)
    clocks = Clocks()
    with clocked(clocks):
        core = build(case, clocks, steps)
        for _ in range(-(-case.batch * case.prompt // FED) + 20):
            core.step()
        clocks.seconds.clear()
        for _ in range(steps):
            core.step()
    return {name: seconds / steps * 1e6 for name, seconds in clocks.seconds.items() if name != MODEL}
