"""The worker: assembles model, KV pool, attention and pipeline from a configuration, and runs plans."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import DeviceOutOfMemory
from engine.runtime.assembly import build_pipeline, measure_step_costs
from engine.runtime.device_memory import size_pool
from engine.runtime.devices import device_failure, prepare_torch
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
        with phase("KV pool", on_phase) as note:
            size = block_bytes(loaded.shapes, config.kv.block_size, loaded.placement.dtype)
            blocks, max_len, step = size_pool(
                config, loaded, size, (config.model.draft.max_draft or 8) if config.model.draft else 0
            )
            runner = loaded.runner(blocks, config.kv.block_size)
            note += [f"{blocks} blocks of {config.kv.block_size} tokens, {blocks * size / 2**20:.0f} MiB", step]
        if max_len < loaded.context_length:
            declared = loaded.context_length
            logger.warning("context cut from %d to %d tokens: that is what the KV pool holds", declared, max_len)
        self._pipeline = build_pipeline(config.model, runner)
        costs: tuple[tuple[int, float], ...] = ()
        if self._pipeline.traits.drafts:
            with phase("step costs", on_phase) as note:
                costs = measure_step_costs(runner, config.kv.block_size, blocks)
                note.append(", ".join(f"{tokens}: {seconds * 1e3:.0f} ms" for tokens, seconds in costs))
        traits = self._pipeline.traits
        self._capacity = Capacity(
            blocks, config.kv.block_size, max_len, runner.vocab_size, traits, costs, loaded.numerics
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
