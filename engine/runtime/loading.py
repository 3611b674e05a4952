"""From a checkpoint folder to a model that has proved itself: built, or mapped from an earlier start, and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import ModelConfig
from engine.diffusion import DiffusionSpec
from engine.hub.diffusion import find_spec
from engine.models import selfcheck, selfcheck_diffusion
from engine.models.adapter import DecoderAdapter
from engine.protocols import AttentionBackend
from engine.runtime.devices import Placement, choose_attention, on_cpu, place
from engine.runtime.kv_cache import LayerShape, PagedKVCache
from engine.runtime.phases import OnPhase, phase
from engine.runtime.runner import ModelRunner
from engine.runtime.weight_store import WeightStore


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
        cache = PagedKVCache(self.shapes, num_blocks, block_size, self.placement.pool, self.placement.device)
        return ModelRunner(self.adapter, cache, self.attention)


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """A model that is fused and packed, and what its logits should be. `exact`: with the checkpoint's own weights."""

    adapter: DecoderAdapter
    shapes: tuple[LayerShape, ...]
    expected: list[torch.Tensor]
    tipped: float
    exact: list[torch.Tensor] | None = None


def load_checked(
    config: ModelConfig, folder: Path, on_phase: OnPhase, kv: str = "auto", cache: Path | None = None
) -> LoadedModel:
    """The model of a folder, fused, packed and checked; `kv` is kv.dtype.

    Packed weights are kept in the folder `cache` and mapped from there at the next start. Raises ModelLoadError and
    ConfigError.
    """
    with phase("device", on_phase) as note:
        spec = find_spec(folder, config.diffusion)
        placement = place(config, None if on_cpu(config) else _stored_dtype(folder), kv)
        attention, why = choose_attention(config.attention, placement.device, placement.dtype)
        threads = f", threads: {torch.get_num_threads()}" if placement.device.type == "cpu" else ""
        note.append(f"{placement.detail}, attention: {why}{threads}")
    store = None
    if (
        cache is not None
        and placement.native
        and placement.device.type == "cpu"
        and config.load_format == "safetensors"
    ):
        store = WeightStore(cache, folder, placement.quant, spec)
    found = None if store is None else _mapped(store, on_phase)
    if found is None:
        found = _built(config, folder, placement, attention, spec, store, on_phase)
    try:
        _check(found, placement, attention, spec, on_phase)
    except Exception:
        if store is not None:
            store.remove()
        raise
    numerics = f"{placement.name}, {placement.dtype_name}, {placement.weights_name}, {placement.pool_name}{why}"
    adapter = found.adapter
    return LoadedModel(adapter, found.shapes, attention, placement, adapter.context_length, numerics, spec)


def _stored_dtype(folder: Path) -> torch.dtype | None:
    from engine.runtime.weights import (  # with transformers, which a CPU's start can do without
        load_config,
        stored_dtype,
    )

    return stored_dtype(load_config(folder))


def _mapped(store: WeightStore, on_phase: OnPhase) -> _Found | None:
    """The model of an earlier start."""
    if not store.path.exists():
        return None
    with phase("packed weights", on_phase) as note:
        stored = store.read()
        if stored is None:
            note.append("none that can be used")
            return None
        note.append(f"mapped: {store.path.name}, {stored.path.stat().st_size / 2**20:.0f} MiB; fused: {stored.fused}")
        return _Found(DecoderAdapter(stored.model), stored.shapes, stored.expected, stored.tipped)


def _built(
    config: ModelConfig,
    folder: Path,
    placement: Placement,
    attention: AttentionBackend,
    spec: DiffusionSpec | None,
    store: WeightStore | None,
    on_phase: OnPhase,
) -> _Found:
    """The model from its checkpoint; kept and mapped where there is a store, so that every start serves the same."""
    from engine.runtime.building import build  # brings transformers, which a mapped model does without

    built = build(config, folder, placement, attention, spec, on_phase)
    if store is not None:
        with phase("keeping packed weights", on_phase) as note:
            if store.write(built.adapter.model, built.shapes, built.expected, built.tipped, built.fused):
                note.append(str(store.path))
                if (stored := store.read()) is not None:
                    adapter = DecoderAdapter(stored.model)
                    return _Found(adapter, stored.shapes, stored.expected, stored.tipped, built.exact)
    return _Found(built.adapter, built.shapes, built.expected, built.tipped, built.exact)


def _check(
    found: _Found, placement: Placement, attention: AttentionBackend, spec: DiffusionSpec | None, on_phase: OnPhase
) -> None:
    """The self-check, with the code that will serve. Raises ModelLoadError."""
    found.adapter.use_program()
    with phase("self-check", on_phase) as note:
        got = selfcheck.paged_logits(found.adapter, found.shapes, attention, placement.pool)
        if spec is not None:
            got += selfcheck_diffusion.paged_logits(found.adapter, found.shapes, attention, placement.pool, spec)
            note.append(f"{spec.family}, {spec.attention} attention")
        tolerance = selfcheck.tolerance(placement.weights_name, placement.pool)
        family = str(found.adapter.model.config.model_type)
        error = selfcheck.check(found.expected, got, tolerance, family, found.tipped)
        note.append(f"paged forward within {error:.1e} of the model's own")
        if found.exact is not None:
            note.append(f"{placement.quant} against exact weights: {selfcheck.difference(found.exact, got)}")
