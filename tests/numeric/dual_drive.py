"""Run requests through `dual_diffusion` over real runners, under a real core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import LlamaForCausalLM

from engine.attention.sdpa import SdpaAttention
from engine.config import EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.diffusion import BLOCK_CAUSAL, FULL, DiffusionParams, DiffusionSpec
from engine.models.adapter import DecoderAdapter
from engine.pipelines.dual_diffusion import DualDiffusionPipeline
from engine.protocols import ForwardRunner, Pipeline, UnmaskRule
from engine.registry import RULES, resolve
from engine.runtime.kv_cache import PagedKVCache
from engine.runtime.runner import ModelRunner
from engine.types import Capacity, FinishReason, Passes, Request, SamplingParams, StepOutput, StepPlan, TokenLogprob
from tests.numeric.dual_reference import JUNK, MASK, VOCAB, Setting

PAGE, BLOCKS = 4, 96
FULL_SPEC = DiffusionSpec(FULL, MASK, block_length=4)


def rules() -> dict[str, UnmaskRule]:
    made: dict[str, UnmaskRule] = {}
    for name in RULES:
        factory = resolve(RULES, name, "rule")
        assert isinstance(factory, type)
        made[name] = factory()
    return made


def runner(model: LlamaForCausalLM) -> ModelRunner:
    """Over a pool full of junk."""
    adapter = DecoderAdapter(model)
    cache = PagedKVCache(adapter.probe(), BLOCKS, PAGE, torch.float32, torch.device("cpu"))
    for layer in cache.layers:
        layer.joint.fill_(JUNK)
    return ModelRunner(adapter, cache, SdpaAttention())


def pipeline(served: ForwardRunner, drafter: ForwardRunner | None, setting: Setting) -> DualDiffusionPipeline:
    spec = replace(FULL_SPEC, shift=setting.shift)
    if drafter is None:
        return DualDiffusionPipeline(served, spec, rules())
    theirs = replace(FULL_SPEC, shift=setting.draft_shift)
    if setting.unit:
        theirs = DiffusionSpec(
            BLOCK_CAUSAL, MASK, block_length=setting.unit, sub_block=setting.sub_block, shift=setting.draft_shift
        )
    return DualDiffusionPipeline(served, spec, rules(), drafter, theirs)


def request(name: str, prompt: Sequence[int], setting: Setting, **sampling: Any) -> Request:
    params = DiffusionParams(
        rule="threshold",
        knobs=(("threshold", setting.threshold),),
        cache="dual",
        block_length=setting.unit or setting.block,
        canvas=setting.canvas,
        drafter_steps=setting.steps,
        verify=setting.verify,
        verify_threshold=setting.least,
    )
    ours = {"max_tokens": setting.canvas, "seed": setting.seed, "temperature": setting.temperature}
    given = SamplingParams(**{**ours, **sampling})
    return Request(name, tuple(prompt), given, diffusion=params)


@dataclass(frozen=True)
class Done:
    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


@dataclass
class PipelineWorker:
    """See `protocols.Worker`."""

    pipeline: Pipeline
    num_blocks: int = BLOCKS
    plans: list[StepPlan] = field(default_factory=list)

    def capacity(self) -> Capacity:
        return Capacity(self.num_blocks, PAGE, 128, VOCAB, self.pipeline.traits, diffusion=FULL_SPEC, max_canvas=200)

    def prepare(self, request: Request) -> None:
        """Nothing that takes time."""

    def submit(self, plan: StepPlan) -> Done:
        self.plans.append(plan)
        return Done(self.pipeline.execute(plan))

    def num_states(self) -> int:
        return self.pipeline.num_states()

    def close(self) -> None:
        pass


@dataclass
class Outcome:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None
    passes: Passes = field(default_factory=Passes)
    pieces: list[int] = field(default_factory=list)  # tokens that came together


def run(
    pipeline: Pipeline,
    requests: Sequence[Request],
    num_blocks: int = BLOCKS,
    budget: int = 400,
    watch: Callable[[EngineCore], None] = lambda _: None,
    later: Sequence[Request] = (),
) -> tuple[dict[str, Outcome], int]:
    """Every request's outcome, and how often one was preempted; those of `later` come in after four steps."""
    worker = PipelineWorker(pipeline, num_blocks)
    core = EngineCore(worker, EngineConfig(scheduler=SchedulerConfig(max_batched_tokens=budget)))
    found = {one.id: Outcome() for one in [*requests, *later]}
    for one in requests:
        core.add(one)
    while core.has_work():
        if len(worker.plans) == 4:
            for one in later:
                core.add(one)
        for update in core.step().updates:
            outcome = found[update.request_id]
            outcome.tokens += update.token_ids
            outcome.logprobs += update.logprobs or ()
            outcome.passes = update.passes or outcome.passes
            outcome.finish, outcome.error = update.finish, update.error
            if update.token_ids:
                outcome.pieces.append(len(update.token_ids))
        core.check_integrity()
        watch(core)
    core.settle()
    assert pipeline.num_states() == 0
    return found, core.stats().preemptions
