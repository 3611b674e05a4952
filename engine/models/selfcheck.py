"""The check every model passes before it serves: the paged path against the model's own plain forward.

Two sequences are run packed together, in chunks and in blocks, over scattered KV blocks. What this catches (a
layer that ignores positions, a convolution between layers, a mask of its own) would be silently wrong text.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from engine.errors import ModelLoadError
from engine.models.adapter import DecoderAdapter
from engine.models.context import PagedContext
from engine.protocols import AttentionBackend
from engine.runtime.batch import SeqInput, pack
from engine.runtime.kv_cache import LayerShape, PagedKVCache

LENGTHS = (29, 17)
CHUNKS = ((11, 6), (1, 7), (5, 1), (12, 3))  # tokens of each sequence fed in each step
BLOCK_SIZE = 4
# Largest difference of a logit, relative to the largest logit. fp16 weights differ from fp32 by rounding alone.
TOLERANCE = {"none": 1e-3, "fp16": 3e-2}


def sample_ids(vocab_size: int) -> list[torch.Tensor]:
    """Fixed pseudo-random token ids, one tensor per sequence."""
    generator = torch.Generator().manual_seed(20260101)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in LENGTHS]


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, vocab_size: int) -> list[torch.Tensor]:
    """fp32 logits [length, vocabulary] of the model's own eager forward; call before anything is replaced."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return [
            model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float()
            for ids in sample_ids(vocab_size)
        ]
    finally:
        model.set_attn_implementation(before)


def paged_logits(
    adapter: DecoderAdapter, shapes: tuple[LayerShape, ...], backend: AttentionBackend, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The same logits over a small paged pool, fed by CHUNKS, both sequences in one batch."""
    device = adapter.device
    all_ids = sample_ids(adapter.vocab_size)
    blocks_each = -(-max(LENGTHS) // BLOCK_SIZE)
    cache = PagedKVCache(shapes, 2 * blocks_each, BLOCK_SIZE, dtype, device)
    scattered = torch.randperm(2 * blocks_each, generator=torch.Generator().manual_seed(7)).tolist()
    tables = (scattered[:blocks_each], scattered[blocks_each:])
    done, parts = [0, 0], ([], [])  # type: tuple[list[int], tuple[list[torch.Tensor], list[torch.Tensor]]]
    for chunk in CHUNKS:
        inputs = []
        for ids, table, start, size in zip(all_ids, tables, done, chunk, strict=True):
            inputs.append(SeqInput(ids[start : start + size].tolist(), start, table, start + size))
        batch = pack(inputs, BLOCK_SIZE, device)
        context = PagedContext(cache, backend.prepare(batch), batch.slots)
        rows = torch.arange(sum(chunk), device=device)
        logits = adapter.forward(batch.ids, batch.positions, rows, context)
        for i, part in enumerate(logits.split(list(chunk))):
            parts[i].append(part)
            done[i] += chunk[i]
    return [torch.cat(part) for part in parts]


def check(expected: list[torch.Tensor], got: list[torch.Tensor], tolerance: float, family: str) -> float:
    """Largest relative difference. Raises ModelLoadError when it is above `tolerance` or not a number."""
    worst = 0.0
    for want, have in zip(expected, got, strict=True):
        error = float((want - have).abs().max() / want.abs().max().clamp(min=1e-6))
        worst = max(worst, error) if error == error else float("nan")
    if not worst <= tolerance:
        raise ModelLoadError(
            f"{family}: the paged forward differs from the model's own by {worst:.2g} of its largest logit (allowed: "
            f"{tolerance:g}); serving it would give wrong text"
        )
    return worst
