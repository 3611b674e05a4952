"""Three sequences through a paged pool, in every way that the engine feeds a model, and what the model itself says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from engine.models.adapter import DecoderAdapter
from engine.models.context import ForwardContext, PagedContext
from engine.models.fusion import fuse
from engine.protocols import AttentionBackend
from engine.runtime.batch import SeqInput, pack
from engine.runtime.kv_cache import LayerShape, PagedKVCache
from engine.runtime.runner import ModelRunner

CPU = torch.device("cpu")
BLOCK_SIZE = 4
LENGTHS = (41, 30, 12)
JUNK = 50.0  # what the pool holds where nothing was written: reading it would show


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens fed of each sequence; the last `wrong` of them are drafts that get rejected, and are fed anew."""

    fed: tuple[int, int, int]
    wrong: tuple[int, int, int] = (0, 0, 0)


STEPS = (
    Step((13, 0, 0)),  # a chunk of a prompt, alone
    Step((12, 17, 0)),  # two chunks
    Step((1, 6, 9)),  # a decode step beside chunks
    Step((1, 1, 1)),
    Step((5, 3, 2), wrong=(2, 1, 2)),  # blocks to verify: some drafts stand, or none
    Step((1, 1, 1)),
    Step((8, 3, 1)),  # a block of which everything stands, beside a decode step
    Step((2, 0, 0)),
)


def sequences(vocab_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in LENGTHS]


@torch.inference_mode()
def plain(model: PreTrainedModel, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    """fp32 logits [length, vocabulary] of the model's own eager forward, each sequence alone and whole."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = [model(input_ids=one[None], use_cache=False).logits[0].float() for one in ids]
    model.set_attn_implementation(before)
    return logits


def paged(
    adapter: DecoderAdapter, shapes: tuple[LayerShape, ...], backend: AttentionBackend, ids: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The same logits by STEPS, over blocks that lie scattered in a pool full of junk."""
    each = -(-max(LENGTHS) // BLOCK_SIZE)
    cache = PagedKVCache(shapes, len(ids) * each, BLOCK_SIZE, torch.float32, CPU)
    for layer in cache.layers:
        layer.joint.fill_(JUNK)
    tables = torch.randperm(len(ids) * each, generator=torch.Generator().manual_seed(3)).view(len(ids), each).tolist()
    runner = ModelRunner(adapter, cache, backend)
    done, found = [0] * len(ids), [torch.empty(0)] * len(ids)
    for step in STEPS:
        members = [i for i, fed in enumerate(step.fed) if fed]
        inputs: list[SeqInput] = []
        rows: list[int] = []
        packed = 0
        for i in members:
            fed, right = step.fed[i], step.fed[i] - step.wrong[i]
            given = ids[i][done[i] : done[i] + fed].clone()
            given[right:] = (given[right:] + 1) % adapter.vocab_size
            inputs.append(SeqInput(given.tolist(), done[i], tables[i], done[i] + fed))
            rows += range(packed, packed + right)
            packed += fed
            done[i] += right
        parts = runner.forward(inputs, rows).split([step.fed[i] - step.wrong[i] for i in members])
        for i, part in zip(members, parts, strict=True):
            found[i] = torch.cat((found[i], part)) if len(found[i]) else part
    assert done == list(LENGTHS)
    return found


def fuse_in_place(adapter: DecoderAdapter, shapes: tuple[LayerShape, ...], backend: AttentionBackend) -> int:
    """Fuse as a worker does at load; the number of fused modules."""
    ids = sequences(adapter.vocab_size)[0][:8]
    cache = PagedKVCache(shapes, 1, len(ids), torch.float32, CPU)
    batch = pack([SeqInput(ids.tolist(), 0, (0,), len(ids))], len(ids), CPU)
    positions = torch.linspace(0, adapter.context_length - 1, len(ids)).long()
    context = PagedContext(cache, backend.prepare(batch), batch.slots)
    run: Callable[[ForwardContext], object] = lambda given: adapter.forward(  # noqa: E731
        batch.ids, positions, torch.zeros(1, dtype=torch.long), given
    )
    return fuse(adapter.model, run, context, lambda *_: None)


def worst(expected: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Largest difference of a logit, relative to the largest logit of its sequence."""
    pairs = zip(expected, got, strict=True)
    return float(torch.stack([(want - have).abs().max() / want.abs().max() for want, have in pairs]).max())  # NaN wins
