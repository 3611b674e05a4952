"""Fusion on weights that come in pieces: checkpoints of several files, and one rank's slices of every layer."""

from __future__ import annotations

import copy
import fnmatch
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from engine.attention.paged_cpu import PagedCpuAttention
from engine.models.adapter import DecoderAdapter
from engine.models.fused.attention import FusedAttention
from engine.models.fusion import fused_levels, set_reduce
from engine.runtime.weights import load_config, load_model
from tests.contract import paged
from tests.families import LAYERS, VOCAB, family, random_model

RANKS = 2


def logits_of(adapter: DecoderAdapter) -> list[torch.Tensor]:
    """Through packed mixed batches over the pool."""
    return paged.paged(adapter, adapter.probe(), PagedCpuAttention(), paged.sequences(VOCAB))


def fused(model: PreTrainedModel) -> DecoderAdapter:
    adapter = DecoderAdapter(model)
    paged.fuse_in_place(adapter, adapter.probe(), PagedCpuAttention())
    return adapter


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mixtral"])
def test_several_files_are_one_model(name: str, tmp_path: Path) -> None:
    transformers_logging.disable_progress_bar()
    model = random_model(family(name).config())
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model.save_pretrained(whole)
    model.save_pretrained(parts, max_shard_size="60KB")
    assert (parts / "model.safetensors.index.json").exists() and len(list(parts.glob("model-*.safetensors"))) > 3
    adapters = []
    for folder in (whole, parts):
        loaded = load_model(folder, load_config(folder), torch.float32, paged.CPU)
        adapters.append(fused(loaded))
    levels = [fused_levels(adapter.model) for adapter in adapters]
    assert levels[0] == levels[1] and levels[0]["backbone"] == 1
    for one, other in zip(*map(logits_of, adapters), strict=True):
        assert torch.equal(one, other)


# ---- one rank's slices -----------------------------------------------------------------------------------


def slice_for(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """A copy of the model that keeps this rank's part of every linear layer that the family's own plan splits.

    What is split by its input gives a part of a sum; its bias belongs to the first rank.
    """
    mine = copy.deepcopy(model)
    plan = {f"model.{pattern}": style for pattern, style in (model.config.base_model_tp_plan or {}).items()}
    split = 0
    for name, module in mine.named_modules():
        style = next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if not isinstance(module, nn.Linear) or style not in ("colwise", "rowwise"):
            continue
        dim = 0 if style == "colwise" else 1
        module.weight = nn.Parameter(module.weight.chunk(RANKS, dim)[rank].clone())
        module.out_features, module.in_features = module.weight.shape
        for bias in (own for key, own in module.named_parameters() if key == "bias"):
            part = bias.chunk(RANKS)[rank] if style == "colwise" else bias * (rank == 0)
            module.bias = nn.Parameter(part.detach().clone())
        split += 1
    assert split == 7 * LAYERS
    return mine


class Exchange:
    """An all-reduce between threads, each of which is a rank."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = [torch.empty(0)] * RANKS
        self._barrier = threading.Barrier(RANKS, timeout=60)
        self.calls = 0

    def of(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def reduce(part: torch.Tensor) -> torch.Tensor:
            self._parts[rank] = part
            self._barrier.wait()
            total = torch.stack(self._parts).sum(0)
            self.calls += rank == 0
            self._barrier.wait()
            return total

        return reduce


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),  # biases of q, k, v alone
        ("qwen3", {}),  # norms per head
        ("gemma3_text", {}),  # norms of the summed output
        ("granite", {}),  # the summed output times a number
        ("cohere2", {}),  # attention and MLP side by side: one sum for both
    ],
)
def test_sum_over_ranks_is_the_whole_model(name: str, options: dict[str, object]) -> None:
    """Sliced, then fused. Nothing is told how many heads a rank has: that follows from its slices."""
    model = random_model(family(name).config(**options))
    ranks = [fused(slice_for(model, rank)) for rank in range(RANKS)]
    exchange = Exchange()
    for rank, adapter in enumerate(ranks):
        assert fused_levels(adapter.model)["backbone"] == 1
        attention = next(module for module in adapter.model.modules() if isinstance(module, FusedAttention))
        assert attention.layout.heads == model.config.num_attention_heads // RANKS
        assert attention.shape.kv_heads == model.config.num_key_value_heads // RANKS
        set_reduce(adapter.model, exchange.of(rank))
    # Shapes are known without a pass, in which every rank would have to take part.
    shapes = [tuple(_shapes(adapter)) for adapter in ranks]
    with ThreadPoolExecutor(RANKS) as threads:
        ids = paged.sequences(VOCAB)
        passes = [
            threads.submit(paged.paged, adapter, shape, PagedCpuAttention(), ids)
            for adapter, shape in zip(ranks, shapes, strict=True)
        ]
        got = [each.result(timeout=120) for each in passes]
    assert exchange.calls == len(paged.STEPS) * LAYERS * (1 if name == "cohere2" else 2)
    whole = fused(model)
    expected = logits_of(whole)
    for each in got:
        assert paged.worst(expected, each) < 1e-5
    set_reduce(ranks[0].model, None)
    assert paged.worst(expected, logits_of(ranks[0])) > 0.01


def _shapes(adapter: DecoderAdapter) -> list:
    return [module.shape for module in adapter.model.modules() if isinstance(module, FusedAttention)]
