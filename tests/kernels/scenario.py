"""Builds the tensors of a case: sequences over scattered blocks of a pool that is NaN wherever nothing was written."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from engine.attention.sdpa import SdpaAttention
from engine.protocols import StepAttention
from engine.runtime.batch import AttentionMode, SeqInput, TreeRows, pack
from engine.runtime.kv_cache import LayerCache, LayerShape
from tests.kernels.cases import Case

CPU = torch.device("cpu")
BLOCK_LENGTH = 5
SCALE = 0.3


class Scenario:
    """`batch`, one layer's `cache`, `query` [T, heads, key_dim] (a view with gaps), `sinks` or None."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case = case
        mode = AttentionMode(case.mode)
        shape = LayerShape(case.kv_heads, *case.dims)
        dtype = getattr(torch, case.dtype)
        pool = getattr(torch, case.pool or case.dtype)
        needed = [-(-keys // case.page) for _, keys in case.lengths]
        spare = torch.randperm(sum(needed) + 2).tolist()
        inputs, written = [], []
        for i, (queries, keys) in enumerate(case.lengths):
            table = [spare.pop() for _ in range(needed[i])]
            ahead = 2 if mode in (AttentionMode.BLOCK_CAUSAL, AttentionMode.BIDIRECTIONAL) else 0
            tree = None
            if mode is AttentionMode.TREE and i % 2 == 1:
                tree = random_tree(keys - queries, queries, case.grown, random.Random(seed))
            inputs.append(SeqInput([1] * queries, max(keys - queries - ahead, 0), table, keys, tree))
            written += [table[key // case.page] * case.page + key % case.page for key in range(keys)]
        batch = pack(inputs, case.page, CPU, mode, BLOCK_LENGTH)
        told = tuple(keys + case.bound for keys in batch.kv_lens_host)
        told = (max(told),) * len(told) if case.bounded else told
        self.batch = replace(batch, kv_lens_host=told, bounded=case.bounded)
        self.exact = batch
        joint = torch.full(((sum(needed) + 2) * case.page, shape.width), float("nan"))
        joint[written] = torch.randn(len(written), shape.width)
        self.cache = LayerCache(joint.to(pool), shape)
        heads = case.kv_heads * case.fold
        self.query = torch.randn(batch.ids.numel(), heads + 2, shape.key_dim).to(dtype)[:, 1:-1]
        self.sinks = torch.randn(heads) if case.sinks else None

    def attend(self, step: StepAttention) -> torch.Tensor:
        case = self.case
        options = {"scale": SCALE, "window": case.window, "softcap": case.softcap, "sinks": self.sinks}
        return step.attend(self.query, self.cache, **options)  # type: ignore[arg-type]

    def error(self, got: torch.Tensor) -> float:
        """Largest difference from the reference's answer to the same numbers in fp32, by its largest output."""
        query, cache = self.query, self.cache
        self.query, self.cache = query.float(), LayerCache(cache.joint.float(), cache.shape)
        expected = self.attend(SdpaAttention().prepare(self.exact))
        self.query, self.cache = query, cache
        assert got.shape == expected.shape and got.dtype == query.dtype
        return float((got.float() - expected).abs().max() / expected.abs().max())


def random_tree(first: int, nodes: int, grown: int, choice: random.Random) -> TreeRows:
    """A tree whose parents are any earlier node or the root; its last `nodes` are fed, from place `first` on."""
    root = first - grown
    positions: list[int] = []
    ancestors: list[int] = []
    for node in range(nodes + grown):
        parent = choice.randrange(-1, node)
        positions.append(positions[parent] + 1 if parent >= 0 else root)
        ancestors.append((ancestors[parent] if parent >= 0 else 0) | 1 << node)
    return TreeRows(root, positions[grown:], ancestors[grown:])
