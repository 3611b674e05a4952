"""The self-check in the mode that a diffusion model is served in: rows see later ones, and rows are fed again.

Against the model's own forward with that mask given outright. A network that is causal in some hidden place, or
whose rows do not depend on later ones as they should, would be silently wrong text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.diffusion import DiffusionSpec
from engine.models.adapter import DecoderAdapter
from engine.models.selfcheck import LENGTHS, Fed, run_paged, run_plain
from engine.models.support import context_length
from engine.protocols import AttentionBackend
from engine.runtime.batch import AttentionMode
from engine.runtime.kv_cache import LayerShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST = 256  # tokens


def sequences(spec: DiffusionSpec, vocab_size: int, context: int) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """Ids of two sequences, some of them masked, and where each begins: the second one ends with the context.

    Long enough for more than two blocks, where that is not too long.
    """
    wanted = (2 * spec.block_length + 5, spec.block_length + 3) if spec.block_causal else LENGTHS
    lengths = [max(min(wish, LONGEST, context), 4) for wish in wanted]
    generator = torch.Generator().manual_seed(20260102)
    ids = [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]
    for row in ids:
        row[len(row) // 2 :: 2] = spec.mask_id
    return ids, (0, max(context - lengths[1], 0))


def plain_logits(model: PreTrainedModel, vocab_size: int, spec: DiffusionSpec) -> list[torch.Tensor]:
    """fp32 logits [length, vocabulary] of the model's own eager forward under the mask that it is served with.

    Call before anything is replaced. Raises ModelLoadError if the model itself fails.
    """
    ids, firsts = sequences(spec, vocab_size, context_length(model.config))
    return run_plain(model, ids, firsts, [additive_mask(spec, len(row)) for row in ids])


def additive_mask(spec: DiffusionSpec, length: int) -> torch.Tensor:
    """[length, length] of 0 and -inf: row i is what position i sees."""
    blocks = torch.arange(length) // (spec.block_length if spec.block_causal else length)
    hidden = blocks[None, :] > blocks[:, None]
    return torch.zeros(length, length).masked_fill_(hidden, float("-inf"))


def paged_logits(
    adapter: DecoderAdapter,
    shapes: tuple[LayerShape, ...],
    backend: AttentionBackend,
    dtype: torch.dtype,
    spec: DiffusionSpec,
) -> list[torch.Tensor]:
    """The same logits over a small paged pool: whole canvases, then slices of them; or block by block."""
    given = sequences(spec, adapter.vocab_size, adapter.context_length)
    first, second = (len(row) for row in given[0])
    if spec.block_causal:
        length = spec.block_length
        cuts = [min(length, first), first]
        steps = [
            [Fed(0, 0, cuts[0], cuts[0]), Fed(1, 0, second, second)],
            [Fed(0, cuts[0], first, first)] if cuts[0] < first else [],
            [Fed(1, (second - 1) // length * length, second, second)],
        ]
        how = AttentionMode.BLOCK_CAUSAL, length
    else:
        # K/V that a slice writes again is what stands there already, so its logits are those of the whole.
        start, end = first // 3, 2 * first // 3
        steps = [
            [Fed(0, 0, first, first), Fed(1, 0, second, second)],
            [Fed(0, start, end, first), Fed(1, second // 2, second, second)],
        ]
        how = AttentionMode.BIDIRECTIONAL, 1
    return run_paged(adapter, shapes, backend, dtype, given, [step for step in steps if step], how)
