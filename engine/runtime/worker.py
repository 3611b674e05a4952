"""The worker: assembles model, KV pool, attention and pipeline from a configuration, and runs plans."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from engine.config import EngineConfig
from engine.errors import DeviceOutOfMemory
from engine.models.draft_host import LoadedDraft
from engine.protocols import PricedPipeline
from engine.runtime.assembly import build_drafter, build_pipeline
from engine.runtime.costs import Costs, measure_costs
from engine.runtime.device_memory import memory_of, size_pool
from engine.runtime.devices import device_failure, prepare_torch
from engine.runtime.drafts import bind_draft, load_draft, offer_verifiers
from engine.runtime.kv_cache import block_bytes
from engine.runtime.loading import OnPhase, load_checked, phase
from engine.types import Capacity, StepOutput, StepPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DoneHandle:
    """A step that ran to its end inside `submit`."""

    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


class LocalWorker:
    """A worker in this process, on one device. See `protocols.Worker`."""

    def __init__(self, config: EngineConfig, folder: Path, on_phase: OnPhase) -> None:
        prepare_torch(config.parallel)
        loaded = load_checked(config.model, folder, on_phase)
        loaded.attention.check_block_size(config.kv.block_size)
        self._device = loaded.placement.device
        draft = load_draft(config.model.draft, loaded, folder, on_phase)
        with phase("KV pool", on_phase) as note:
            size = block_bytes(loaded.shapes, config.kv.block_size, loaded.placement.dtype)
            blocks, max_len, step = size_pool(config, loaded, size, _lookahead(config, draft), draft)
            runner = loaded.runner(blocks, config.kv.block_size)
            note += [f"{blocks} blocks of {config.kv.block_size} tokens, {blocks * size / 2**20:.0f} MiB", step]
            follower = None if draft is None else bind_draft(draft, config, blocks)
            if follower is not None:
                runner.follow(follower)
            self.memory = memory_of(loaded, draft, config, blocks)
            note += [f"{self.memory.draft_pool / 2**20:.0f} MiB for the draft"] if draft is not None else []
        if max_len < loaded.context_length:
            declared = loaded.context_length
            logger.warning("context cut from %d to %d tokens: that is what the KV pool holds", declared, max_len)
        drafter = build_drafter(config.model, follower)
        verifiers = offer_verifiers(config.model, folder, runner, draft, drafter, on_phase)
        self._pipeline = build_pipeline(config.model, runner, follower, drafter, verifiers)
        traits = self._pipeline.traits
        costs = Costs()
        if drafter is not None and config.model.draft is not None and config.model.draft.adaptive:
            with phase("step costs", on_phase) as note:
                costs = measure_costs(config, runner, None if follower is None else drafter, blocks, traits.max_draft)
                cast(PricedPipeline, self._pipeline).set_costs(costs.steps, costs.drafts, costs.trees)
                note.append(str(costs))
        self._capacity = Capacity(
            num_blocks=blocks,
            block_size=config.kv.block_size,
            max_model_len=max_len,
            vocab_size=runner.vocab_size,
            traits=traits,
            step_costs=costs.steps,
            numerics=loaded.numerics,
            draft_costs=costs.drafts,
            verifiers=tuple(verifier.card for verifier in verifiers),
        )

    def capacity(self) -> Capacity:
        return self._capacity

    def submit(self, plan: StepPlan) -> DoneHandle:
        """Raises DeviceOutOfMemory when the step did not fit, and EngineDead when the device is beyond repair."""
        try:
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


def _lookahead(config: EngineConfig, draft: LoadedDraft | None) -> int:
    """Positions past the last committed token that a step may score."""
    if config.model.draft is None:
        return 0
    most = config.model.draft.max_draft or (8 if draft is None else draft.most)
    return max(most, config.model.draft.tree)
