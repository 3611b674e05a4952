"""The paged_cpu backend and its torch twin: against a plain loop, against each other, and what must never show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from functools import lru_cache
from typing import cast

import pytest
import torch

from engine.attention import paged_cpu
from engine.attention.paged_cpu import PagedCpuAttention, PagedCpuStep
from engine.attention.sdpa import SdpaStep
from engine.kernels import native, reference
from engine.kernels.layout import MODES, PagedBatch
from engine.runtime.batch import AttentionMode, DeviceBatch, SeqInput, pack
from engine.runtime.kv_cache import LayerCache, LayerShape, PagedKVCache
from tests.numeric.native_kernels import VECTOR_VARIANTS as VARIANTS
from tests.numeric.native_kernels import build
from tests.numeric.test_attention import naive

CPU = torch.device("cpu")
Attend = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=["twin", *VARIANTS])
def attend(request: pytest.FixtureRequest) -> Attend:
    """attend(query, cache, batch, scale=..., ...), as the twin or as a native library does it."""
    if request.param == "twin":
        return lambda query, cache, batch, **given: reference.paged_attention(query, cache, paged(batch), **given)
    library = build(request.param)
    return lambda query, cache, batch, **given: native.paged_attention(library, query, cache, paged(batch), **given)


def paged(batch: DeviceBatch) -> PagedBatch:
    return PagedBatch(
        batch.block_tables,
        batch.query_starts,
        batch.kv_lens,
        batch.positions,
        batch.block_size,
        MODES.index(batch.mode.value),
        batch.block_length,
        batch.tree_starts,
        batch.tree_masks,
    )


def scene(
    shape: LayerShape, heads: int, lengths: list[tuple[int, int]], mode: str = "causal", block: int = 4, seed: int = 0
) -> tuple[DeviceBatch, LayerCache, torch.Tensor]:
    """Sequences of (query length, kv length) over scattered blocks of a pool full of noise, and their queries."""
    random = torch.Generator().manual_seed(seed)
    counts = [-(-kv_len // block) for _, kv_len in lengths]
    total = sum(counts) + 3
    cache = PagedKVCache((shape,), total, block, torch.float32, CPU).layers[0]
    cache.joint.copy_(torch.randn(cache.joint.shape, generator=random))
    blocks = torch.randperm(total, generator=random).tolist()
    inputs = []
    for (query_len, kv_len), count in zip(lengths, counts, strict=True):
        behind = 0 if mode in ("causal", "tree") else min(2, kv_len - query_len)
        inputs.append(
            SeqInput([1] * query_len, kv_len - query_len - behind, [blocks.pop() for _ in range(count)], kv_len)
        )
    batch = pack(inputs, block, CPU, AttentionMode(mode), block_length=5)
    return batch, cache, torch.randn(batch.ids.numel(), heads, shape.key_dim, generator=random)


LENGTHS = {
    "decode": [(1, 9), (1, 1), (1, 30), (1, 17)],
    "verify": [(5, 13), (2, 2), (3, 40)],
    "prefill": [(23, 31)],
    "mixed": [(1, 9), (5, 13), (1, 45), (17, 17), (1, 3)],
}
OPTIONS = {
    "plain": (None, None, False),
    "window": (5, None, False),
    "softcap": (None, 3.0, False),
    "sinks": (None, None, True),
    "all": (4, 2.0, True),
}


SMALL = LayerShape(kv_heads=2, key_dim=8, value_dim=12)


def options(name: str) -> tuple[int | None, float | None, torch.Tensor | None]:
    window, softcap, with_sinks = OPTIONS[name]
    return window, softcap, torch.randn(6, generator=torch.Generator().manual_seed(1)) if with_sinks else None


@lru_cache
def plain_loop(mode: str, lengths: str, option: str) -> torch.Tensor:
    """The truth, worked out once for all implementations."""
    batch, cache, query = scene(SMALL, 6, LENGTHS[lengths], mode)
    return naive(query, cache, batch, 0.3, *options(option))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("option", OPTIONS)
def test_equals_plain_loop(attend: Attend, mode: str, lengths: str, option: str) -> None:
    batch, cache, query = scene(SMALL, 6, LENGTHS[lengths], mode)
    window, softcap, sinks = options(option)
    got = attend(query, cache, batch, scale=0.3, window=window, softcap=softcap, sinks=sinks)
    expected = plain_loop(mode, lengths, option)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-6)


# kv heads, key width, value width, query heads: widths with and without a tail, all groupings, more rows than few
SIZES = [
    *((3, 64, 64, 9), (2, 80, 80, 2), (1, 128, 128, 4), (4, 20, 28, 8), (1, 33, 17, 3)),
    *((2, 16, 16, 32), (1, 64, 64, 71), (2, 256, 256, 4), (1, 5, 1, 1)),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("block", [1, 16])
def test_native_equals_twin_at_every_size(variant: str, size: tuple[int, int, int, int], block: int) -> None:
    """Long enough for several splits and tiles; scores large enough that most keys get next to no weight."""
    kv_heads, key_dim, value_dim, heads = size
    lengths = [(1, 700), (130, 300), (8, 600), (1, 1), (2, 129)]
    batch, cache, query = scene(LayerShape(kv_heads, key_dim, value_dim), heads, lengths, "causal", block)
    scale, wide = 4 * key_dim**-0.5, LayerCache(cache.joint.double(), cache.shape)
    for window in (None, 150):
        got = native.paged_attention(build(variant), query, cache, paged(batch), scale=scale, window=window)
        expected = reference.paged_attention(query.double(), wide, paged(batch), scale=scale, window=window)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_sequence_is_the_same_alone_and_in_company(variant: str) -> None:
    """To the bit, whatever else is in the batch, and on one thread or two."""
    library, before = build(variant), torch.get_num_threads()
    lengths = [(1, 900), (1, 200), (8, 1800), (1, 33), (150, 400), (3, 20), (1, 1)]
    batch, cache, query = scene(LayerShape(3, 64, 64), 9, lengths, block=16)
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(native.paged_attention(library, query, cache, paged(batch), scale=0.125))
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)
    starts = batch.query_starts.tolist()
    for seq in range(len(lengths)):
        rows = slice(starts[seq], starts[seq + 1])
        alone = PagedBatch(
            batch.block_tables[seq : seq + 1].contiguous(),
            torch.tensor([0, lengths[seq][0]], dtype=torch.int32),
            batch.kv_lens[seq : seq + 1],
            batch.positions[rows].contiguous(),
            batch.block_size,
            0,
            1,
        )
        got = native.paged_attention(library, query[rows], cache, alone, scale=0.125)
        assert torch.equal(got, results[0][rows]), f"sequence {seq}"


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_where_it_is(attend: Attend, mode: str) -> None:
    """NaN in slots of nobody reaches nobody; in the keys or values of a sequence it reaches that sequence alone."""
    lengths = [(1, 9), (20, 30), (1, 30), (2, 21)]
    batch, cache, query = scene(LayerShape(2, 20, 12), 4, lengths, mode)
    clean = attend(query, cache, batch, scale=0.3)
    own = [
        {int(batch.block_tables[seq, key // 4]) * 4 + key % 4 for key in range(kv_len)}
        for seq, (_, kv_len) in enumerate(lengths)
    ]
    strangers = [slot for slot in range(cache.joint.shape[0]) if not any(slot in slots for slots in own)]
    cache.joint[strangers] = float("nan")
    assert torch.equal(attend(query, cache, batch, scale=0.3), clean)
    for half in (cache.key, cache.value):
        spoiled = min(own[1])
        kept = half[spoiled].clone()
        half[spoiled] = float("nan")
        got = attend(query, cache, batch, scale=0.3)
        assert torch.equal(got[0], clean[0]) and torch.equal(got[21:], clean[21:])
        last_row = got[20]
        assert last_row.isnan().any(), "NaN must not be hidden from the sequence that it belongs to"
        half[spoiled] = kept


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_past_a_causal_query_are_not_read(variant: str) -> None:
    """A key range may reach past the queries, into slots that were never written."""
    batch, cache, query = scene(LayerShape(2, 16, 16), 4, [(1, 40), (30, 60)])
    clean = native.paged_attention(build(variant), query, cache, paged(batch), scale=0.3)
    spare = ({*range(cache.joint.shape[0] // 4)} - {*batch.block_tables.flatten().tolist()}).pop()
    cache.joint[spare * 4 : spare * 4 + 4] = float("nan")
    tables = torch.cat((batch.block_tables, torch.full((2, 1), spare, dtype=torch.int32)), dim=1)
    tables[0, 10] = spare  # this sequence's own table is shorter
    longer = replace(batch, block_tables=tables, kv_lens=batch.kv_lens + 3)
    assert torch.equal(native.paged_attention(build(variant), query, cache, paged(longer), scale=0.3), clean)


def test_row_that_sees_nothing_is_zero() -> None:
    """A window that ends before the first key."""
    for variant in VARIANTS:
        batch, cache, query = scene(LayerShape(1, 8, 8), 2, [(1, 10)], "bidirectional")
        far = PagedBatch(
            batch.block_tables, batch.query_starts, batch.kv_lens, torch.tensor([50]), batch.block_size, 2, 1
        )
        assert not native.paged_attention(build(variant), query, cache, far, scale=0.3, window=4).any()


def test_no_tokens_no_work(attend: Attend) -> None:
    batch, cache, query = scene(LayerShape(1, 8, 8), 2, [(2, 10), (1, 5)])
    starts = torch.tensor([0, 0, 0], dtype=torch.int32)
    empty = replace(batch, query_starts=starts, positions=batch.positions[:0], query_lens=(0, 0))
    assert attend(query[:0], cache, empty, scale=0.3).shape == (0, 2, 8)


def test_heads_of_a_query_may_lie_anywhere(attend: Attend) -> None:
    """[T, heads, dim] as a view of [heads, T, dim], which is how `transformers` hands queries over."""
    batch, cache, query = scene(LayerShape(2, 16, 16), 4, [(1, 9), (30, 33)])
    view = query.transpose(0, 1).contiguous().transpose(0, 1)
    assert not view.is_contiguous()
    assert torch.equal(attend(view, cache, batch, scale=0.3), attend(query, cache, batch, scale=0.3))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 40])
def test_tables_that_lead_astray_are_errors(variant: str, length: int) -> None:
    """Never a read outside the pool, the table or the batch."""
    batch, cache, query = scene(LayerShape(1, 8, 8), 2, [(length, 60)])
    good = paged(batch)
    for change in (
        {"tables": torch.full_like(good.tables, cache.joint.shape[0] // 4)},
        {"tables": -torch.ones_like(good.tables)},
        {"tables": good.tables[:, :3].contiguous()},
        {"starts": torch.tensor([0, length + 1], dtype=torch.int32)},
        {"starts": torch.tensor([-1, length], dtype=torch.int32)},
    ):
        fields = {name: getattr(good, name) for name in ("tables", "starts", "kv_lens", "positions")} | change
        bad = PagedBatch(**fields, block_size=4, mode=0, block_length=1)
        with pytest.raises(IndexError):
            native.paged_attention(build(variant), query, cache, bad, scale=0.3)


# ---- the backend -------------------------------------------------------------------------------------------------


def test_backend_runs_native_code_where_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_cpu, "library", lambda: build(VARIANTS[0]) if VARIANTS else None)
    batch, cache, query = scene(LayerShape(2, 16, 16), 4, LENGTHS["mixed"])
    step = PagedCpuAttention().prepare(batch)
    assert isinstance(step, PagedCpuStep if VARIANTS else SdpaStep)
    assert paged_cpu.usable(CPU, torch.float32) == bool(VARIANTS)
    assert not paged_cpu.usable(CPU, torch.bfloat16) and not paged_cpu.usable(torch.device("meta"), torch.float32)
    got = step.attend(query, cache, scale=0.3, window=7)
    expected = naive(query, cache, batch, 0.3, 7, None, None)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-6)


class OtherMode(Enum):
    SPIRAL = "spiral"


def test_backend_falls_back_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library or an unknown mode: the whole step. Another dtype, or gradients: that layer."""
    monkeypatch.setattr(paged_cpu, "library", lambda: None)
    batch, cache, query = scene(LayerShape(2, 16, 16), 4, LENGTHS["mixed"])
    assert isinstance(PagedCpuAttention().prepare(batch), SdpaStep)
    for variant in VARIANTS:
        monkeypatch.setattr(paged_cpu, "library", lambda variant=variant: build(variant))
        strange = replace(batch, mode=cast(AttentionMode, OtherMode.SPIRAL))
        assert isinstance(PagedCpuAttention().prepare(strange), SdpaStep)
        step = PagedCpuAttention().prepare(batch)
        expected = step.attend(query, cache, scale=0.3)
        half = LayerCache(cache.joint.bfloat16(), cache.shape)
        got = step.attend(query.bfloat16(), half, scale=0.3)
        assert got.dtype is torch.bfloat16
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.03)
        with torch.inference_mode(False), torch.enable_grad():
            own, pool, leaf = scene(LayerShape(2, 16, 16), 4, LENGTHS["mixed"])
            PagedCpuAttention().prepare(own).attend(leaf.requires_grad_(), pool, scale=0.3).sum().backward()
            assert leaf.grad is not None and math.isfinite(float(leaf.grad.sum()))
