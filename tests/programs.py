"""Tiny models fused, packed and run as native programs, as a worker does it at load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.attention.paged_cpu import PagedCpuAttention
from engine.models.adapter import DecoderAdapter
from engine.models.context import PagedContext, Taps
from engine.models.program import Program
from engine.runtime.batch import AttentionMode, SeqInput, pack
from engine.runtime.kv_cache import LayerShape, PagedKVCache
from engine.runtime.linear import pack_linear, pack_weight
from tests.contract import paged
from tests.families import family, random_model

CPU = torch.device("cpu")
BLOCK = 4


@dataclass(slots=True, eq=False)
class Programmed:
    """An adapter with a program, and a pool of `blocks` blocks."""

    adapter: DecoderAdapter
    shapes: tuple[LayerShape, ...]
    cache: PagedKVCache = field(init=False)
    blocks: int = 64

    def __post_init__(self) -> None:
        self.fresh()

    def fresh(self, dtype: torch.dtype = torch.float32) -> None:
        """Another pool, full of junk."""
        self.cache = PagedKVCache(self.shapes, self.blocks, BLOCK, dtype, CPU)
        for layer in self.cache.layers:
            layer.joint.fill_(paged.JUNK)

    @property
    def program(self) -> Program:
        assert self.adapter.program is not None
        return self.adapter.program

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Within this, the modules serve."""
        program, self.adapter.program = self.adapter.program, None
        yield
        self.adapter.program = program

    def feed(
        self,
        inputs: list[SeqInput],
        rows: list[int] | None = None,
        mode: AttentionMode = AttentionMode.CAUSAL,
        block_length: int = 1,
        taps: Taps | None = None,
    ) -> torch.Tensor:
        """Logits of `rows`, or of all."""
        batch = pack(inputs, BLOCK, CPU, mode, block_length)
        wanted = torch.arange(batch.ids.shape[0]) if rows is None else torch.tensor(rows, dtype=torch.long)
        context = PagedContext(self.cache, PagedCpuAttention().prepare(batch), batch.slots)
        return self.adapter.forward(batch.ids, batch.positions, wanted, context, taps)


def programmed(name: str, format: str = "fp16", **overrides: object) -> Programmed:
    """The tiny model of a family."""
    return programmed_model(random_model(family(name).config(**overrides)), format)


def programmed_model(model: PreTrainedModel, format: str) -> Programmed:
    adapter = DecoderAdapter(model)
    shapes = adapter.probe()
    paged.fuse_in_place(adapter, shapes, PagedCpuAttention())
    pack_all(adapter.model, format)
    adapter.use_program()
    return Programmed(adapter, shapes)


def pack_all(model: nn.Module, format: str) -> None:
    """Pack every linear layer, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                setattr(parent, name, pack_weight(child.weight.T, child.bias, format))
            elif type(child) is nn.Linear:
                setattr(parent, name, pack_linear(child, format))
