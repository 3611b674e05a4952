"""The worker: assembles model, KV pool, attention and pipeline from a configuration, and runs plans."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from engine.config import EngineConfig
from engine.models import selfcheck
from engine.models.adapter import DecoderAdapter, context_length
from engine.models.context import ForwardContext, PagedContext
from engine.models.fusion import fuse
from engine.protocols import AttentionBackend, ForwardRunner, Pipeline
from engine.registry import ATTENTION, PIPELINES, resolve
from engine.runtime.batch import SeqInput, pack
from engine.runtime.kv_cache import LayerShape, PagedKVCache, block_bytes
from engine.runtime.linear import packing_available
from engine.runtime.memory import activation_bytes, available_bytes, plan_pool, resident_bytes
from engine.runtime.runner import ModelRunner
from engine.runtime.weights import load_config, load_model, pack_linears, release_pages
from engine.types import Capacity, Phase, StepOutput, StepPlan

logger = logging.getLogger(__name__)
OnPhase = Callable[[Phase], None]
DEVICE, DTYPE = torch.device("cpu"), torch.float32  # the only place that says so: the rest takes what it is given


@dataclass(frozen=True, slots=True)
class DoneHandle:
    """A step that ran to its end inside `submit`."""

    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


class LocalWorker:
    """A worker in this process, on one device. See `protocols.Worker`."""

    def __init__(self, config: EngineConfig, folder: Path, on_phase: OnPhase) -> None:
        torch.set_num_threads(config.parallel.threads or physical_cores())
        model_config = config.model
        attention = cast(
            Callable[[], AttentionBackend], resolve(ATTENTION, model_config.attention, "attention backend")
        )()
        adapter, shapes, declared_len = self._load(config, folder, attention, on_phase)
        with _phase("KV pool", on_phase) as note:
            text = adapter.config
            intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
            reserve = activation_bytes(config, text.hidden_size, intermediate, adapter.vocab_size)
            size = block_bytes(shapes, config.kv.block_size, DTYPE)
            blocks, max_len = plan_pool(config, size, declared_len, available_bytes(), reserve)
            cache = PagedKVCache(shapes, blocks, config.kv.block_size, DTYPE, DEVICE)
            note.append(f"{blocks} blocks of {config.kv.block_size} tokens, {blocks * size / 2**20:.0f} MiB")
        if max_len < declared_len:
            logger.warning("context cut from %d to %d tokens: that is what the KV pool holds", declared_len, max_len)
        runner = ModelRunner(adapter, cache, attention)
        pipeline = cast(Callable[[ForwardRunner], Pipeline], resolve(PIPELINES, model_config.pipeline, "pipeline"))
        self._pipeline = pipeline(runner)
        self._capacity = Capacity(blocks, config.kv.block_size, max_len, adapter.vocab_size, self._pipeline.traits)

    def capacity(self) -> Capacity:
        return self._capacity

    def submit(self, plan: StepPlan) -> DoneHandle:
        return DoneHandle(self._pipeline.execute(plan))

    def num_states(self) -> int:
        return self._pipeline.num_states()

    def close(self) -> None:
        """Nothing to release: tensors go with the process."""

    def _load(
        self, config: EngineConfig, folder: Path, attention: AttentionBackend, on_phase: OnPhase
    ) -> tuple[DecoderAdapter, tuple[LayerShape, ...], int]:
        """Load, fuse, pack and check the model: (adapter, cache shapes, declared context length)."""
        quant = config.model.quant
        if quant == "fp16" and not packing_available():
            logger.warning("fp16-packed linears need an x86 CPU; serving with exact fp32 weights")
            quant = "none"
        with _phase("weights", on_phase):
            model_config = load_config(folder)
            model = load_model(folder, model_config, DTYPE, DEVICE)
            vocab_size = model_config.get_text_config().vocab_size
        with _phase("plain forward (reference)", on_phase):
            expected = selfcheck.plain_logits(model, vocab_size)
            adapter = DecoderAdapter(model)
            shapes = adapter.probe()
        with _phase("fusion and packing", on_phase) as note:
            fused = fuse(model, *_fusion_run(adapter, shapes, attention), _finish(quant))
            if quant == "fp16":
                pack_linears(model)
            note.append(f"{fused} modules fused, weights: {quant}")
        with _phase("self-check", on_phase) as note:
            got = selfcheck.paged_logits(adapter, shapes, attention, DTYPE)
            tolerance = selfcheck.TOLERANCE[quant]
            error = selfcheck.check(expected, got, tolerance, model_config.model_type)
            note.append(f"paged forward within {error:.1e} of the model's own")
        return adapter, shapes, context_length(model_config)


def _fusion_run(
    adapter: DecoderAdapter, shapes: tuple[LayerShape, ...], attention: AttentionBackend
) -> tuple[Callable[[ForwardContext], object], ForwardContext]:
    """What `fuse` needs: one real forward pass of a few tokens over a pool of one block."""
    ids = selfcheck.sample_ids(adapter.vocab_size)[0][:8]
    cache = PagedKVCache(shapes, 1, len(ids), adapter.model.dtype, adapter.device)
    batch = pack([SeqInput(ids.tolist(), 0, (0,), len(ids))], len(ids), adapter.device)
    context = PagedContext(cache, attention.prepare(batch), batch.slots)
    rows = torch.zeros(1, dtype=torch.long, device=adapter.device)
    return (lambda recording: adapter.forward(batch.ids, batch.positions, rows, recording)), context


def _finish(quant: str) -> Callable[[torch.nn.Module, torch.nn.Module], None]:
    """What happens to each fused module at once, so that the whole model is never in memory twice."""

    def finish(original: torch.nn.Module, fused: torch.nn.Module) -> None:
        if quant == "fp16":
            pack_linears(fused)
        release_pages(original)

    return finish


@contextmanager
def _phase(name: str, on_phase: OnPhase) -> Iterator[list[str]]:
    """Time a phase of the start-up; the body may append a detail for the table."""
    detail: list[str] = []
    begin = time.monotonic()
    yield detail
    on_phase(Phase(name, time.monotonic() - begin, resident_bytes(), "; ".join(detail)))


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once (they slow matrix products down)."""
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(allowed)
    return max(len(siblings), 1)
