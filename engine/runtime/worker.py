"""The worker: assembles model, KV pool, attention and pipeline from a configuration, and runs plans."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from engine.config import EngineConfig
from engine.diffusion import DiffusionSpec
from engine.errors import DeviceOutOfMemory, InsufficientMemory, InvalidRequest
from engine.models.draft_host import LoadedDraft
from engine.protocols import LaunchingPipeline, Pipeline, PricedPipeline, StepHandle
from engine.runtime.assembly import build_denoiser, build_drafter, build_pipeline, build_rules
from engine.runtime.costs import Costs, measure_costs
from engine.runtime.denoising import load_fast, settle_model
from engine.runtime.device_memory import memory_of, size_pool
from engine.runtime.devices import device_failure, prepare_engine
from engine.runtime.drafts import bind_draft, load_draft, offer_verifiers
from engine.runtime.kv_cache import block_bytes
from engine.runtime.loading import LoadedModel, load_checked
from engine.runtime.memory import resident_bytes
from engine.runtime.phases import OnPhase, phase
from engine.runtime.runner import ModelRunner
from engine.runtime.running_ahead import SPARE, draft_scratch, run_ahead, runs_ahead
from engine.structured.grammars import Grammars
from engine.types import Capacity, DecodeTraits, Request, StepOutput, StepPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DoneHandle:
    """A step that ran to its end inside `submit`."""

    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


@dataclass(frozen=True, slots=True)
class LaunchedHandle:
    """A step under way on a device whose failures may show as late as in its results."""

    step: StepHandle
    device: torch.device

    def result(self) -> StepOutput:
        try:
            return self.step.result()
        except RuntimeError as error:
            raise device_failure(error, self.device) or error from error


class LocalWorker:
    """A worker in this process, on one device. See `protocols.Worker`."""

    def __init__(self, config: EngineConfig, folder: Path, on_phase: OnPhase) -> None:
        prepare_engine(config)
        config = settle_model(config, folder)
        loaded = load_checked(config.model, folder, on_phase, config.kv.dtype, config.cache_folder)
        loaded.attention.check_block_size(config.kv.block_size)
        self._device = loaded.placement.device
        draft = load_draft(config.model.draft, loaded, folder, on_phase)
        fast = load_fast(config, loaded, folder, on_phase)
        with phase("KV pool", on_phase) as note:
            size = block_bytes(loaded.shapes, config.kv.block_size, loaded.placement.pool)
            blocks, max_len, step = size_pool(config, loaded, size, _lookahead(config, draft), draft, fast)
            ahead = runs_ahead(config, loaded)
            runner = loaded.runner(blocks + SPARE * ahead, config.kv.block_size)
            note += [f"{blocks} blocks of {config.kv.block_size} tokens, {blocks * size / 2**20:.0f} MiB", step]
            follower = None
            if draft is not None:
                scratch = draft_scratch(config, draft) if ahead else None
                follower = bind_draft(draft, config, blocks + SPARE * ahead, scratch)
            if follower is not None:
                runner.follow(follower)
            self.memory = memory_of(loaded, draft, config, blocks, fast)
            note += [f"{self.memory.draft_pool / 2**20:.0f} MiB for the draft"] if draft or fast else []
            if self._device.type == "cpu":
                note.append(self.memory.account(resident_bytes("VmRSS")))
        declared = min(model.context_length for model in (loaded, fast) if model is not None)
        if max_len < declared:
            logger.warning("context cut from %d to %d tokens: that is what the KV pool holds", declared, max_len)
        offer = Capacity(
            blocks, config.kv.block_size, max_len, runner.vocab_size, DecodeTraits(), numerics=loaded.numerics
        )
        self._grammars = Grammars(folder, runner.vocab_size)
        if loaded.diffusion is not None:
            self._pipeline, self._capacity = _denoising(config, loaded.diffusion, runner, fast, offer)
            return
        drafter = build_drafter(config.model, follower)
        verifiers = offer_verifiers(config.model, folder, runner, draft, drafter, on_phase)
        self._pipeline = build_pipeline(config.model, runner, follower, drafter, verifiers, self._grammars)
        traits = self._pipeline.traits
        costs = Costs()
        if drafter is not None and config.model.draft is not None and config.model.draft.adaptive:
            with phase("step costs", on_phase) as note:
                costs = measure_costs(config, runner, None if follower is None else drafter, blocks, traits.max_draft)
                cast(PricedPipeline, self._pipeline).set_costs(costs.steps, costs.drafts, costs.trees)
                note.append(str(costs))
        if ahead:
            self._pipeline = run_ahead(config, self._pipeline, runner, drafter, blocks, max_len, on_phase)
        cards = tuple(verifier.card for verifier in verifiers)
        self._capacity = replace(
            offer, traits=traits, step_costs=costs.steps, draft_costs=costs.drafts, verifiers=cards
        )

    def capacity(self) -> Capacity:
        return self._capacity

    def prepare(self, request: Request) -> None:
        grammar = request.sampling.grammar
        if grammar is None:
            return
        if self._capacity.diffusion is not None:
            raise InvalidRequest("Structured output is not supported for models that denoise.")
        self._grammars.prepare(grammar)

    def submit(self, plan: StepPlan) -> StepHandle:
        """Raises DeviceOutOfMemory when the step did not fit, and EngineDead when the device is beyond repair."""
        try:
            if isinstance(self._pipeline, LaunchingPipeline):
                return LaunchedHandle(self._pipeline.submit(plan), self._device)
            return DoneHandle(self._pipeline.execute(plan))
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError among them
            failure = device_failure(error, self._device)
            if failure is None:
                raise
        if isinstance(failure, DeviceOutOfMemory) and self._device.type == "cuda":
            torch.cuda.empty_cache()  # not in the handler: there, the error's frames still hold the step's tensors
        raise failure

    def num_states(self) -> int:
        return self._pipeline.num_states()

    def close(self) -> None:
        """Nothing to release: tensors go with the process."""


def _denoising(
    config: EngineConfig, spec: DiffusionSpec, runner: ModelRunner, fast: LoadedModel | None, offer: Capacity
) -> tuple[Pipeline, Capacity]:
    """The pipeline of a diffusion model, and `offer` with what denoising adds to it.

    Nothing is drafted for whose price would have to be measured, and no verifier but the pipeline's own.
    """
    rules, pair = build_rules(), None
    if fast is not None and fast.diffusion is not None:
        pair = fast.runner(offer.num_blocks, offer.block_size), fast.diffusion
        offer = replace(offer, vocab_size=min(offer.vocab_size, fast.adapter.vocab_size))  # one may be padded
    pipeline = build_denoiser(config.model, runner, spec, rules, pair)
    length = offer.max_model_len - offer.max_model_len % pipeline.traits.unit
    if length == 0:
        raise InsufficientMemory(
            f"models.max_model_len: {offer.max_model_len} tokens are less than one block of {pipeline.traits.unit}"
        )
    return pipeline, replace(
        offer,
        max_model_len=length,  # in whole blocks: the last one is denoised as a whole, too
        traits=pipeline.traits,
        diffusion=spec,
        rules=tuple(rule.card for rule in rules.values()),
        max_canvas=config.scheduler.max_batched_tokens if pipeline.traits.canvas else 0,
    )


def _lookahead(config: EngineConfig, draft: LoadedDraft | None) -> int:
    """Positions past the last committed token that a step may score."""
    if config.model.draft is None:
        return 0
    most = config.model.draft.max_draft or (8 if draft is None else draft.most)
    return max(most, config.model.draft.tree)
