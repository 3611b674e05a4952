"""The memory of the device that a model runs on: what a step needs at most, and how large the KV pool may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.models.draft_host import LoadedDraft
from engine.runtime.batch import SeqInput
from engine.runtime.drafts import scratch_blocks
from engine.runtime.kv_cache import block_bytes
from engine.runtime.loading import LoadedModel
from engine.runtime.memory import activation_bytes, available_bytes, measured_budget, plan_pool
from engine.runtime.packing import weight_bytes
from engine.runtime.runner import ModelRunner
from engine.runtime.running_ahead import runs_ahead
from engine.runtime.sampler import Sampler, SamplingState
from engine.types import Request, SamplingParams

# On CUDA, besides the largest step: captured graphs, the workspaces of libraries, and what the allocator can't reuse.
GRAPHS = 1 << 29


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a loaded target and its draft hold. What the draft uses of the target's weights is the target's.

    The draft may be a diffusion model that drafts for another one.
    """

    target_weights: int
    draft_weights: int
    target_pool: int
    draft_pool: int

    def account(self, resident: int) -> str:
        """What the process will hold, in words; `resident` bytes are its own before the pools are written to."""
        weights, pools = self.target_weights + self.draft_weights, self.target_pool + self.draft_pool
        rest = max(resident - weights, 0)
        return f"in all: weights {_mib(weights)} + pools {_mib(pools)} + {_mib(rest)} for the rest"


def memory_of(
    loaded: LoadedModel,
    draft: LoadedDraft | None,
    config: EngineConfig,
    num_blocks: int,
    fast: LoadedModel | None = None,
) -> Memory:
    """What a target and its draft, or the `fast` model beside it, hold, with a pool of `num_blocks` blocks."""
    size = config.kv.block_size
    draft_weights, draft_pool = 0, 0
    if fast is not None:
        draft_weights = weight_bytes(fast.adapter.model)
        draft_pool = num_blocks * block_bytes(fast.shapes, size, fast.placement.pool)
    if draft is not None:
        draft_weights = weight_bytes(draft.network)
        draft_pool = (num_blocks + scratch_blocks(config, draft)) * draft.block_bytes(size)
    pool = num_blocks * block_bytes(loaded.shapes, size, loaded.placement.pool)
    return Memory(weight_bytes(loaded.adapter.model), draft_weights, pool, draft_pool)


def size_pool(
    config: EngineConfig,
    loaded: LoadedModel,
    bytes_per_block: int,
    lookahead: int = 0,
    draft: LoadedDraft | None = None,
    fast: LoadedModel | None = None,
) -> tuple[int, int, str]:
    """(blocks, tokens that one sequence may have, what a step's temporaries need in words). See `plan_pool`.

    The pool of a draft, or of the `fast` model that drafts for a diffusion model, has a block for each of the
    target's, so the two share the memory; a draft's scratch comes on top.
    """
    device = loaded.placement.device
    both = [loaded] if fast is None else [loaded, fast]  # a step runs one after the other
    context = min(model.context_length for model in both)
    # Laws of all rows, once as they are computed and once laid out by draft, if all requests have a verifier with laws.
    drafting = 2 * 4 * config.scheduler.max_num_seqs * (1 + lookahead) * loaded.adapter.vocab_size if lookahead else 0
    if draft is not None:
        each = draft.block_bytes(config.kv.block_size)
        bytes_per_block += each
        drafted = config.scheduler.max_num_seqs * draft.most  # rows, with their logits twice
        drafting += scratch_blocks(config, draft) * each + 2 * 4 * drafted * loaded.adapter.vocab_size
    if fast is not None:
        bytes_per_block += block_bytes(fast.shapes, config.kv.block_size, fast.placement.pool)
    if device.type == "cpu":
        reserve = max(_step_estimate(config, model) for model in both) + drafting
        blocks, length = plan_pool(config, bytes_per_block, context, available_bytes(config.model.share), reserve)
        return blocks, length, f"{_mib(reserve)} kept for a step (estimated)"
    peak = max(step_peak(config, model, lookahead) for model in both)
    if runs_ahead(config, loaded):
        peak *= 2  # what captured steps compute lies in a pool of their own, which no other step may use
    reserve = peak + GRAPHS + drafting
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    measured = measured_budget(config, total, free, own) - reserve
    blocks, length = plan_pool(config, bytes_per_block, context, free, reserve, measured)
    return blocks, length, f"{_mib(reserve)} kept for a step (measured) and graphs, {_mib(free)} of {_mib(total)} free"


def scored_rows(config: EngineConfig, loaded: LoadedModel, lookahead: int = 0) -> int:
    """Most rows whose logits a step draws from: a diffusion model scores what is masked of each open block."""
    spec, most = loaded.diffusion, config.scheduler.max_batched_tokens
    if spec is None:
        return config.scheduler.max_num_seqs * (1 + lookahead)
    wished = config.model.diffusion.block_length if config.model.diffusion is not None else None
    each = spec.block_length if spec.block_causal else max(spec.block_length, wished or 0)
    return max(min(config.scheduler.max_num_seqs * each, most), 1)


def _step_estimate(config: EngineConfig, loaded: LoadedModel) -> int:
    """Bytes that the largest step takes on a CPU; the rows of a draft's law are not counted."""
    text, vocab = loaded.adapter.config, loaded.adapter.vocab_size
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    further = 0 if loaded.diffusion is None else max(scored_rows(config, loaded) - config.scheduler.max_num_seqs, 0)
    return activation_bytes(config, text.hidden_size, intermediate, vocab) + 4 * 4 * further * vocab


def step_peak(config: EngineConfig, loaded: LoadedModel, lookahead: int) -> int:
    """Bytes that the largest step takes on a CUDA device besides weights and pool, by running it."""
    device = loaded.placement.device
    rows = scored_rows(config, loaded, lookahead)
    tokens = max(config.scheduler.max_batched_tokens, rows)
    runner = loaded.runner(-(-tokens // config.kv.block_size) + tokens // loaded.context_length, config.kv.block_size)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    largest_step(runner, tokens, rows, loaded.context_length)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del runner
    torch.cuda.empty_cache()
    return peak


@torch.inference_mode()
def largest_step(runner: ModelRunner, tokens: int, rows: int, context_length: int) -> torch.Tensor:
    """Feed `tokens` tokens and draw from `rows` of their logits, the dearest way; the drawn tokens [rows].

    The logits of all tokens are asked for, as `prompt_logprobs` may. The pool needs a block more per sequence of
    `context_length` tokens than the tokens fill.
    """
    inputs, block, size = [], 0, runner.cache.block_size
    for start in range(0, tokens, context_length):
        length = min(context_length, tokens - start)
        blocks = range(block, block := block + -(-length // size))
        inputs.append(SeqInput([0] * length, 0, blocks, length))
    logits = runner.forward(inputs, range(tokens))
    sampling = SamplingParams(
        max_tokens=1, temperature=1.0, top_p=0.9, top_k=runner.vocab_size - 1, repetition_penalty=1.1, seed=1
    )
    states = [SamplingState(Request(str(row), (0,), sampling)) for row in range(rows)]
    return Sampler(runner.vocab_size).sample(logits[:rows], states, [20] * rows).tokens


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
