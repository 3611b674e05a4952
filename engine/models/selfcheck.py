"""The check every model passes before it serves: the paged path against the model's own plain forward.

Two sequences are run packed together, in chunks and in blocks, over scattered KV blocks. What this catches (a
layer that ignores positions, a convolution between layers, a mask of its own) would be silently wrong text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.errors import ModelLoadError
from engine.models.adapter import DecoderAdapter
from engine.models.context import PagedContext
from engine.models.support import context_length
from engine.protocols import AttentionBackend
from engine.runtime.batch import AttentionMode, SeqInput, pack
from engine.runtime.kv_cache import LayerShape, PagedKVCache

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LENGTHS = (29, 17)
CHUNKS = ((11, 0), (1, 13), (5, 1), (12, 3))  # tokens of each sequence fed in each step
BLOCK_SIZE = 4
# Rounding tips close calls of a router, and a token meets another expert: this share of the tokens may differ for that.
TIPPED = 0.25
# Largest difference of a logit, relative to the largest logit. 16 bits differ from fp32 by rounding alone.
# Packed weights are compared with a plain forward over the same rounded weights, so that the rounding of activations
# is all that is left; fbgemm's with the exact ones.
TOLERANCE = {"none": 1e-3, "fp16": 1e-3, "int8": 1e-1, "int4": 1e-1, "fp8": 1e-1, "fp16 by fbgemm": 3e-2}
TOLERANCE_OF_DTYPE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2, torch.float8_e4m3fn: 2e-1}


def tolerance(quant: str, dtype: torch.dtype) -> float:
    """What `check` allows for packed weights (`quant`) and keys and values of this type."""
    return max(TOLERANCE[quant], TOLERANCE_OF_DTYPE[dtype])


def sample_ids(vocab_size: int) -> list[torch.Tensor]:
    """Fixed pseudo-random token ids, one tensor per sequence."""
    generator = torch.Generator().manual_seed(20260101)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in LENGTHS]


def first_positions(config: PretrainedConfig) -> tuple[int, ...]:
    """Where each sequence starts: the last one ends with the context, as some models scale by position only far out."""
    return (0, max(context_length(config) - LENGTHS[1], 0))


def plain_logits(model: PreTrainedModel, vocab_size: int) -> list[torch.Tensor]:
    """fp32 logits [length, vocabulary] of the model's own eager forward; call before anything is replaced.

    Raises ModelLoadError if the model itself fails.
    """
    return run_plain(model, sample_ids(vocab_size), first_positions(model.config))


@torch.inference_mode()
def run_plain(
    model: PreTrainedModel,
    sequences: list[torch.Tensor],
    firsts: tuple[int, ...],
    masks: list[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """`plain_logits` of these ids from these positions on. `masks` [T, T] are added to the scores of attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = []
    try:
        for index, (ids, first) in enumerate(zip(sequences, firsts, strict=True)):
            positions = torch.arange(first, first + len(ids), device=model.device)
            mask = None if masks is None else masks[index][None, None].to(model.device, model.dtype)
            out = model(
                input_ids=ids[None].to(model.device), position_ids=positions[None], use_cache=False, attention_mask=mask
            )
            logits.append(out.logits[0].float())
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        kind, cause = model.config.model_type, f"{type(error).__name__}: {error}"
        raise ModelLoadError(f"{kind}: the model's own forward pass fails: {cause}") from error
    finally:
        model.set_attn_implementation(before)
    return logits


@dataclass(frozen=True, slots=True)
class Fed:
    """Feed ids start to end - 1 of a sequence, and let them attend to its first `seen` positions."""

    sequence: int
    start: int
    end: int
    seen: int


def paged_logits(
    adapter: DecoderAdapter, shapes: tuple[LayerShape, ...], backend: AttentionBackend, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The same logits over a small paged pool, fed by CHUNKS, both sequences in one batch."""
    done, steps = [0, 0], []
    for chunk in CHUNKS:
        ends = [start + size for start, size in zip(done, chunk, strict=True)]
        steps.append([Fed(i, done[i], end, end) for i, end in enumerate(ends) if end > done[i]])
        done = ends
    firsts = first_positions(adapter.model.config)
    return run_paged(adapter, shapes, backend, dtype, (sample_ids(adapter.vocab_size), firsts), steps)


def run_paged(
    adapter: DecoderAdapter,
    shapes: tuple[LayerShape, ...],
    backend: AttentionBackend,
    dtype: torch.dtype,
    sequences: tuple[list[torch.Tensor], tuple[int, ...]],
    steps: list[list[Fed]],
    how: tuple[AttentionMode, int] = (AttentionMode.CAUSAL, 1),
) -> list[torch.Tensor]:
    """Logits of both sequences (ids, first positions), a step a pass; what is fed twice counts by its last pass.

    `how` is the attention mode and its block length.
    """
    device, (all_ids, firsts) = adapter.device, sequences
    blocks_each = -(-max(map(len, all_ids)) // BLOCK_SIZE)
    cache = PagedKVCache(shapes, 2 * blocks_each, BLOCK_SIZE, dtype, device)
    scattered = torch.randperm(2 * blocks_each, generator=torch.Generator().manual_seed(7)).tolist()
    tables = (scattered[:blocks_each], scattered[blocks_each:])
    logits = [torch.empty(len(ids), adapter.vocab_size, device=device) for ids in all_ids]
    for step in steps:
        inputs = [
            SeqInput(all_ids[fed.sequence][fed.start : fed.end].tolist(), fed.start, tables[fed.sequence], fed.seen)
            for fed in step
        ]
        batch = pack(inputs, BLOCK_SIZE, device, *how)
        context = PagedContext(cache, backend.prepare(batch), batch.slots)
        sizes = torch.tensor([fed.end - fed.start for fed in step])
        shift = torch.tensor([firsts[fed.sequence] for fed in step]).repeat_interleave(sizes).to(device)
        rows = torch.arange(int(sizes.sum()), device=device)
        scored = adapter.forward(batch.ids, batch.positions + shift, rows, context)
        for fed, part in zip(step, scored.split(sizes.tolist()), strict=True):
            logits[fed.sequence][fed.start : fed.end] = part
    return logits


def check(
    expected: list[torch.Tensor], got: list[torch.Tensor], tolerance: float, family: str, tipped: float = 0.0
) -> float:
    """Largest relative difference of a token, when the share `tipped` of the tokens is left out, the worst first.

    Raises ModelLoadError when it is above `tolerance` or not a number.
    """
    pairs = list(zip(expected, got, strict=True))
    errors = torch.cat([(want - have).abs().amax(-1) / want.abs().max().clamp(min=1e-6) for want, have in pairs])
    worst = float(errors.sort(descending=True).values[int(tipped * len(errors))])  # NaN sorts first, as the largest
    if bool(errors.isnan().any()) or worst > tolerance:
        raise ModelLoadError(
            f"{family}: the paged forward differs from the model's own by {worst:.2g} of its largest logit (allowed: "
            f"{tolerance:g}); serving it would give wrong text"
        )
    return worst


def difference(expected: list[torch.Tensor], got: list[torch.Tensor]) -> str:
    """How far rounded weights move the logits of the check's rows, in words: what a format costs, roughly."""
    want, have = torch.cat(expected), torch.cat(got)
    relative = float((want - have).abs().amax(-1).median() / want.abs().max().clamp(min=1e-6))
    law, other = want.double().log_softmax(-1), have.double().log_softmax(-1)
    divergence = float((law.exp() * (law - other)).sum(-1).mean())
    same = int((want.argmax(-1) == have.argmax(-1)).sum())
    return f"logits within {relative:.1e} (median), KL {divergence:.1e}, first choice the same in {same} of {len(want)}"
