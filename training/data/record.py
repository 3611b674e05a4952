"""Hidden states of the target, kept while it answers: one pass through the engine gives answers and features."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.protocols import Pipeline
from engine.runtime.assembly import build_pipeline
from engine.runtime.batch import DeviceBatch
from engine.runtime.device_memory import size_pool
from engine.runtime.devices import prepare_torch
from engine.runtime.kv_cache import block_bytes
from engine.runtime.loading import load_checked
from engine.runtime.worker import DoneHandle
from engine.types import Capacity, Request, StepPlan


class TapPool:
    """The hidden states of every slot of a KV pool: [slots, taps * width] float16. See `protocols.Follower`."""

    def __init__(self, taps: tuple[int, ...], slots: int, width: int, device: torch.device) -> None:
        self.taps = taps
        self.states = torch.zeros(slots, len(taps) * width, dtype=torch.float16, device=device)

    def write(self, states: tuple[torch.Tensor, ...], batch: DeviceBatch) -> None:
        limit = torch.finfo(torch.float16).max
        self.states[batch.slots] = torch.cat(states, dim=1).clamp(-limit, limit).half()

    def compact(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.states.index_copy_(0, target, self.states.index_select(0, source))


class RecordingWorker:
    """A worker (see `protocols.Worker`) that hands on the hidden states of a request when it is dropped."""

    def __init__(self, config: EngineConfig, folder: Path, taps: tuple[int, ...]) -> None:
        prepare_torch(config.parallel)
        loaded = load_checked(config.model, folder, lambda _: None, config.kv.dtype)
        size = block_bytes(loaded.shapes, config.kv.block_size, loaded.placement.pool)
        blocks, max_len, _ = size_pool(config, loaded, size)
        runner = loaded.runner(blocks, config.kv.block_size)
        width = loaded.adapter.config.hidden_size
        self._block_size = config.kv.block_size
        self._pool = TapPool(taps, blocks * config.kv.block_size, width, loaded.placement.device)
        if taps:
            runner.follow(self._pool)
        self._pipeline: Pipeline = build_pipeline(config.model, runner)
        traits = self._pipeline.traits
        self._capacity = Capacity(blocks, config.kv.block_size, max_len, runner.vocab_size, traits)
        self._computed: dict[str, tuple[tuple[int, ...], int]] = {}  # block table and computed positions
        self._taken: dict[str, torch.Tensor] = {}

    def capacity(self) -> Capacity:
        return self._capacity

    def prepare(self, request: Request) -> None:
        """Nothing that takes time."""

    def submit(self, plan: StepPlan) -> DoneHandle:
        for request_id in plan.dropped:  # its blocks still hold what it wrote: nothing ran since it ended
            table, computed = self._computed.pop(request_id)
            blocks = self._pool.states.unflatten(0, (-1, self._block_size))
            self._taken[request_id] = blocks[list(table)].flatten(0, 1)[:computed].cpu()
        output = self._pipeline.execute(plan)
        tables = {item.request_id: item.block_ids for item in plan.items}
        for result in output.results:
            self._computed[result.request_id] = (tables[result.request_id], result.num_computed)
        return DoneHandle(output)

    def take(self) -> dict[str, torch.Tensor]:
        """[positions, taps * width] float16 by request, of those dropped since: all positions but the last token's."""
        taken, self._taken = self._taken, {}
        return taken

    def num_states(self) -> int:
        return self._pipeline.num_states()

    def close(self) -> None:
        """Nothing to release."""
