"""From a checkpoint folder to a model that has proved itself: load, fuse, pack, check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import ModelConfig
from engine.diffusion import DiffusionSpec
from engine.hub.diffusion import find_spec
from engine.models import selfcheck, selfcheck_diffusion
from engine.models.adapter import DecoderAdapter
from engine.models.context import ForwardContext, PagedContext
from engine.models.fusion import fuse, fused_levels
from engine.models.support import context_length, has_experts
from engine.models.windows import check_windows
from engine.protocols import AttentionBackend
from engine.runtime.batch import SeqInput, pack
from engine.runtime.devices import Placement, choose_attention, place
from engine.runtime.kv_cache import LayerShape, PagedKVCache
from engine.runtime.memory import resident_bytes
from engine.runtime.runner import ModelRunner
from engine.runtime.weights import load_config, load_model, pack_linears, release_pages, stored_dtype
from engine.types import Phase

OnPhase = Callable[[Phase], None]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A checked model without a KV pool. `context_length` is what it declares, in tokens.

    `diffusion` says how it denoises; None for an autoregressive one.
    """

    adapter: DecoderAdapter
    shapes: tuple[LayerShape, ...]
    attention: AttentionBackend
    placement: Placement
    context_length: int
    numerics: str  # see `Capacity`
    diffusion: DiffusionSpec | None = None

    def runner(self, num_blocks: int, block_size: int) -> ModelRunner:
        """The model over a new pool."""
        cache = PagedKVCache(self.shapes, num_blocks, block_size, self.placement.dtype, self.placement.device)
        return ModelRunner(self.adapter, cache, self.attention)


def load_checked(config: ModelConfig, folder: Path, on_phase: OnPhase) -> LoadedModel:
    """Load, fuse, pack and check the model of a folder. Raises ModelLoadError and ConfigError."""
    with phase("device", on_phase) as note:
        spec = find_spec(folder, config.diffusion)
        model_config = load_config(folder)
        placement = place(config, stored_dtype(model_config))
        attention, why = choose_attention(config.attention, placement.device, placement.dtype)
        quant, dtype = placement.quant, placement.dtype
        threads = f", threads: {torch.get_num_threads()}" if placement.device.type == "cpu" else ""
        note.append(f"{placement.detail}, attention: {why}{threads}")
    with phase("weights", on_phase):
        model = load_model(folder, model_config, dtype, placement.device, config.load_format)
        vocab_size = model_config.get_text_config().vocab_size
    with phase("plain forward (reference)", on_phase):
        adapter = DecoderAdapter(model)
        shapes = adapter.probe()
        check_windows(adapter, shapes, attention, dtype, selfcheck.tolerance("none", dtype))
        expected = selfcheck.plain_logits(model, vocab_size)
        if spec is not None:
            expected += selfcheck_diffusion.plain_logits(model, vocab_size, spec)
    with phase("fusion and packing", on_phase) as note:
        note.append(f"fused: {fuse_and_pack(adapter, shapes, attention, quant)}; weights: {quant}")
    with phase("self-check", on_phase) as note:
        got = selfcheck.paged_logits(adapter, shapes, attention, dtype)
        if spec is not None:
            got += selfcheck_diffusion.paged_logits(adapter, shapes, attention, dtype, spec)
            note.append(f"{spec.family}, {spec.attention} attention")
        tolerance = selfcheck.tolerance(quant, dtype)
        rounded = tolerance > selfcheck.TOLERANCE["none"]
        tipped = selfcheck.TIPPED if rounded and has_experts(model_config) else 0.0
        error = selfcheck.check(expected, got, tolerance, model_config.model_type, tipped)
        note.append(f"paged forward within {error:.1e} of the model's own")
    numerics = f"{placement.name}, {placement.dtype_name}, {quant}, {why}"
    return LoadedModel(adapter, shapes, attention, placement, context_length(model_config), numerics, spec)


def fuse_and_pack(
    adapter: DecoderAdapter, shapes: tuple[LayerShape, ...], attention: AttentionBackend, quant: str
) -> str:
    """Fuse what proves equal and pack the weights if `quant` says so, in place; what was fused, in words."""
    fuse(adapter.model, *_fusion_run(adapter, shapes, attention), _finish(quant))
    if quant == "fp16":
        pack_linears(adapter.model)
    return ", ".join(f"{count} {level}" for level, count in fused_levels(adapter.model).items()) or "nothing"


def _fusion_run(
    adapter: DecoderAdapter, shapes: tuple[LayerShape, ...], attention: AttentionBackend
) -> tuple[Callable[[ForwardContext], object], ForwardContext]:
    """What `fuse` needs: one real forward pass of a few tokens over a pool of one block."""
    ids = selfcheck.sample_ids(adapter.vocab_size)[0][:5]
    cache = PagedKVCache(shapes, 1, len(ids), adapter.model.dtype, adapter.device)
    batch = pack([SeqInput(ids.tolist(), 0, (0,), len(ids))], len(ids), adapter.device)
    context = PagedContext(cache, attention.prepare(batch), batch.slots)
    rows = torch.zeros(1, dtype=torch.long, device=adapter.device)
    # Over the whole context: what a layer does far out only must not get lost.
    positions = torch.linspace(0, adapter.context_length - 1, len(ids), device=adapter.device).long()
    return (lambda recording: adapter.forward(batch.ids, positions, rows, recording)), context


def _finish(quant: str) -> Callable[[torch.nn.Module, torch.nn.Module], None]:
    """What happens to each fused module at once, so that the whole model is never in memory twice."""

    def finish(original: torch.nn.Module, fused: torch.nn.Module) -> None:
        if quant == "fp16":
            pack_linears(fused)
        release_pages(original)

    return finish


@contextmanager
def phase(name: str, on_phase: OnPhase) -> Iterator[list[str]]:
    """Time a phase of the start-up; the body may append a detail for the table."""
    detail: list[str] = []
    begin = time.monotonic()
    yield detail
    on_phase(Phase(name, time.monotonic() - begin, resident_bytes(), "; ".join(detail)))
