"""A model from its checkpoint: loaded, run plainly for reference, fused and packed. Brings `transformers` along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import ModelConfig
from engine.diffusion import DiffusionSpec
from engine.errors import ModelLoadError
from engine.models import selfcheck, selfcheck_diffusion
from engine.models.adapter import DecoderAdapter
from engine.models.context import ForwardContext, PagedContext
from engine.models.draft_host import embedding_of, head_of
from engine.models.fusion import fuse, fused_levels
from engine.models.support import has_experts
from engine.models.windows import check_windows
from engine.protocols import AttentionBackend
from engine.runtime.batch import SeqInput, pack
from engine.runtime.devices import Placement
from engine.runtime.kv_cache import LayerShape, PagedKVCache
from engine.runtime.packing import Ends, are_tied, pack_embedding, pack_linears, release_pages, rounded_numbers
from engine.runtime.phases import OnPhase, phase
from engine.runtime.weights import load_config, load_model


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """A fused and packed model that has not been checked yet.

    `expected` are the logits of the self-checks' rows by the plain forward, with weights and inputs rounded as packed
    layers round them; `exact` are those with the checkpoint's own weights, where they differ.
    `tipped`: see `selfcheck.TIPPED`.
    """

    adapter: DecoderAdapter
    shapes: tuple[LayerShape, ...]
    expected: list[torch.Tensor]
    exact: list[torch.Tensor] | None
    tipped: float
    fused: str


def build(
    config: ModelConfig,
    folder: Path,
    placement: Placement,
    attention: AttentionBackend,
    spec: DiffusionSpec | None,
    on_phase: OnPhase,
) -> Built:
    """Raises ModelLoadError."""
    dtype, quant = placement.dtype, placement.quant
    with phase("weights", on_phase):
        model_config = load_config(folder)
        model = load_model(folder, model_config, dtype, placement.device, config.load_format)
        vocab_size = model_config.get_text_config().vocab_size
    with phase("plain forward (reference)", on_phase):
        adapter = DecoderAdapter(model)
        shapes = adapter.probe()
        check_windows(adapter, shapes, attention, dtype, selfcheck.tolerance("none", dtype))

        def plain() -> list[torch.Tensor]:
            found = selfcheck.plain_logits(model, vocab_size)
            return found if spec is None else found + selfcheck_diffusion.plain_logits(model, vocab_size, spec)

        expected, exact = plain(), None
        if placement.native:
            exact = expected
            with rounded_numbers(model, quant, ends_of(model)):
                expected = plain()
    with phase("fusion and packing", on_phase) as note:
        fused = fuse_and_pack(adapter, shapes, attention, quant)
        note.append(f"fused: {fused}; weights: {quant}")
    tipped = selfcheck.TIPPED if quant != "none" and has_experts(model_config) else 0.0
    return Built(adapter, shapes, expected, exact, tipped, fused)


def ends_of(model: torch.nn.Module) -> Ends:
    """The embedding table and the output head of a causal language model, where they can be told."""
    found: list[torch.nn.Module | None] = []
    for find in (embedding_of, head_of):
        try:
            found.append(find(model))  # type: ignore[arg-type]
        except ModelLoadError:
            found.append(None)
    return found[0], found[1]


def fuse_and_pack(
    adapter: DecoderAdapter, shapes: tuple[LayerShape, ...], attention: AttentionBackend, quant: str
) -> str:
    """Fuse what proves equal and pack the weights if `quant` says so, in place; what was fused, in words."""
    model = adapter.model
    table, head = ends_of(model)
    tied = table is not None and head is not None and are_tied(table, head)
    fuse(model, *_fusion_run(adapter, shapes, attention), _finish(quant, head))
    if quant != "none":
        pack_linears(model, quant, head)
        _pack_table(model, tied)
    return ", ".join(f"{count} {level}" for level, count in fused_levels(model).items()) or "nothing"


def _pack_table(model: torch.nn.Module, tied: bool) -> None:
    """Put a small embedding table in the place of the fp32 one, wherever the model keeps it."""
    table, head = ends_of(model)
    if table is None or head is None:
        return
    packed = pack_embedding(table, head, tied)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is table:
                setattr(parent, name, packed)


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


def _finish(quant: str, head: torch.nn.Module | None) -> Callable[[torch.nn.Module, torch.nn.Module], None]:
    """What happens to each fused module at once, so that the whole model is never in memory twice."""

    def finish(original: torch.nn.Module, fused: torch.nn.Module) -> None:
        if quant != "none":
            pack_linears(fused, quant, head)
        release_pages(original)

    return finish
