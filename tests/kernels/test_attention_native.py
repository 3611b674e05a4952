"""Native attention over trees and fp16 pools, and that a query's bits depend on its own position alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from engine.attention import paged_cpu
from engine.attention.paged_cpu import PagedCpuAttention, PagedCpuStep
from engine.attention.sdpa import SdpaAttention
from engine.kernels import native, reference
from engine.kernels.layout import HeadLayout, PagedBatch
from engine.runtime.batch import AttentionMode, SeqInput, TreeRows, pack
from engine.runtime.kv_cache import LayerCache, LayerShape, PagedKVCache
from tests.numeric.native_kernels import VECTOR_VARIANTS, build
from tests.numeric.test_attention import naive, scenario
from tests.numeric.test_paged_cpu import paged

CPU = torch.device("cpu")
variants = pytest.mark.parametrize("variant", VECTOR_VARIANTS)
pools = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


# ---- trees -------------------------------------------------------------------------------------------------------

TREES = {
    "few": [(9, 20), (1, 9), (2, 40), (9, 9), (8, 12)],
    "many": [(67, 69), (9, 20), (40, 60)],
}


@variants
@pytest.mark.parametrize("lengths", TREES)
@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks"),
    [(None, None, False), (5, None, False), (None, 3.0, False), (3, 2.0, True)],
)
def test_trees_equal_the_plain_loop(
    variant: str, lengths: str, window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    """Masks of two words, siblings, sequences without a tree, and windows that hide nodes of a tree."""
    batch, cache, query = scenario(AttentionMode.TREE, TREES[lengths])
    sinks = torch.randn(6) if with_sinks else None
    expected = naive(query, cache, batch, 0.3, window, softcap, sinks)
    for attend in (partial(native.paged_attention, build(variant)), reference.paged_attention):
        got = attend(query, cache, paged(batch), scale=0.3, window=window, softcap=softcap, sinks=sinks)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-6)


@variants
@pytest.mark.parametrize("shallow", [3, 30])
def test_later_nodes_may_lie_before_earlier_ones(variant: str, shallow: int) -> None:
    """A window then begins at another query's key: a deep chain comes first, nodes beside its root last."""
    deep = 12
    ancestors = [(2 << row) - 1 for row in range(deep)] + [1 << deep + row for row in range(shallow)]
    tree = TreeRows(20, [*range(20, 20 + deep), *[20] * shallow], ancestors)
    rows, (_, cache, query) = deep + shallow, scenario(AttentionMode.TREE, [(42, 62)])
    batch = pack([SeqInput([1] * rows, 20, [*range(40, 24, -1)], 20 + rows, tree)], 4, CPU, AttentionMode.TREE)
    last = slice(deep - 1, rows)  # as if the first had been fed before
    kept = TreeRows(20, tree.positions[last], ancestors[last])
    part = pack([SeqInput([1] * (shallow + 1), 19 + deep, [*range(40, 24, -1)], 20 + rows, kept)], 4, CPU, batch.mode)
    for fed, queries in ((batch, query[:rows]), (part, query[:rows][last])):
        got = native.paged_attention(build(variant), queries, cache, paged(fed), scale=0.3, window=4)
        expected = naive(queries, cache, fed, 0.3, 4, None, None)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-6)


@variants
def test_backend_takes_trees(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_cpu, "library", lambda: build(variant))
    batch, cache, query = scenario(AttentionMode.TREE, TREES["few"])
    step = PagedCpuAttention().prepare(batch)
    assert isinstance(step, PagedCpuStep)
    expected = SdpaAttention().prepare(batch).attend(query, cache, scale=0.3)
    torch.testing.assert_close(step.attend(query, cache, scale=0.3), expected, rtol=0, atol=5e-6)
    assert step.other is None


# ---- the same bits, whatever is fed beside -----------------------------------------------------------------------


def one_sequence(
    cache: LayerCache, query: torch.Tensor, begin: int, end: int, tree: TreeRows | None = None
) -> tuple[torch.Tensor, PagedBatch]:
    """Queries [begin, end) of a sequence that owns the pool's blocks in reverse order, of 16."""
    blocks = list(reversed(range(cache.joint.shape[0] // 16)))
    mode = AttentionMode.CAUSAL if tree is None else AttentionMode.TREE
    return query[begin:end], paged(pack([SeqInput([1] * (end - begin), begin, blocks, end, tree)], 16, CPU, mode))


@variants
@pools
@pytest.mark.parametrize("window", [None, 100])
def test_a_query_has_the_same_bits_fed_alone_in_a_block_or_in_a_chain(
    variant: str, dtype: torch.dtype, window: int | None
) -> None:
    """Across a split and over steps: blocks of up to 16 tokens, single tokens, and a tree without branches."""
    library, shape, length = build(variant), LayerShape(3, 64, 40), 560
    cache = PagedKVCache((shape,), 35, 16, dtype, CPU).layers[0]
    cache.joint.copy_(torch.randn(length, shape.width, generator=torch.Generator().manual_seed(0)))
    query = torch.randn(length, 9, 64, generator=torch.Generator().manual_seed(1))

    def attend(begin: int, end: int, tree: TreeRows | None = None) -> torch.Tensor:
        rows, batch = one_sequence(cache, query, begin, end, tree)
        return native.paged_attention(library, rows, cache, batch, scale=0.125, window=window)

    for begin in (0, 30, 505, 544):
        alone = torch.cat([attend(row, row + 1) for row in range(begin, begin + 16)])
        assert torch.equal(attend(begin, begin + 16), alone)
        assert torch.equal(attend(begin + 3, begin + 8), alone[3:8])
        chain = TreeRows(begin, range(begin, begin + 16), [(2 << row) - 1 for row in range(16)])
        assert torch.equal(attend(begin, begin + 16, chain), alone)
    rows, batch = one_sequence(cache, query, 505, 521)
    expected = reference.paged_attention(rows.double(), cache, batch, scale=0.125, window=window)
    torch.testing.assert_close(attend(505, 521).double(), expected, rtol=0, atol=5e-6)
    whole = attend(0, length)
    for begin, end in ((0, 17), (100, 133), (200, 456), (511, 560)):
        assert torch.equal(attend(begin, end), whole[begin:end])


# ---- fp16 pools --------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("mode", [AttentionMode.CAUSAL, AttentionMode.BIDIRECTIONAL])
@pytest.mark.parametrize("size", [(3, 64, 64), (1, 20, 13), (5, 32, 32)], ids=str)
def test_half_pools_are_read_in_place(variant: str, mode: AttentionMode, size: tuple[int, int, int]) -> None:
    """As the twin reads them, up to fp32 rounding; and as sdpa does, which gathers them. Rows end at the pool's end."""
    shape, random = LayerShape(*size), torch.Generator().manual_seed(2)
    cache = PagedKVCache((shape,), 9, 16, torch.float16, CPU).layers[0]
    cache.joint.copy_(torch.randn(cache.joint.shape, generator=random))
    inputs = [SeqInput([1], 57, [1, 3, 0, 8], 58), SeqInput([1] * 40, 37, [2, 4, 6, 5, 7], 77)]
    batch = pack(inputs, 16, CPU, mode)
    query = torch.randn(41, 2 * shape.kv_heads, shape.key_dim, generator=random)
    got = native.paged_attention(build(variant), query, cache, paged(batch), scale=0.3)
    wide = reference.paged_attention(query.double(), cache, paged(batch), scale=0.3)
    torch.testing.assert_close(got.double(), wide, rtol=0, atol=5e-6)
    gathered = SdpaAttention().prepare(batch).attend(query, cache, scale=0.3)
    assert gathered.dtype is torch.float32
    torch.testing.assert_close(got, gathered, rtol=0, atol=5e-6)


@variants
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_keys_and_values_are_rounded_on_their_way_into_a_half_pool(
    variant: str, interleaved: bool, normed: bool
) -> None:
    shape, random = LayerShape(2, 22, 7), torch.Generator().manual_seed(3)
    qkv, norm = torch.randn(5, 4 * 22 + shape.width, generator=random), torch.rand(22, generator=random) + 0.5
    cos, sin = torch.randn(5, 18, generator=random), torch.randn(5, 18, generator=random)
    layout = HeadLayout(4, interleaved, key_norm=norm if normed else None)
    slots, results = torch.tensor([15, 0, 3, 7, 8]), []
    for dtype in (torch.float32, torch.float16):
        cache = PagedKVCache((shape,), 1, 16, dtype, CPU).layers[0]
        query = native.head_norm_rope_write(build(variant), qkv, (cos, sin), slots, cache, layout)
        results.append((query, cache.joint))
    (query, wide), (same, half) = results
    assert torch.equal(query, same)
    assert torch.equal(wide.half(), half)


BEYOND = {70000.0: 65504.0, -1e30: -65504.0, 65519.0: 65504.0, float("inf"): float("inf"), -1e-9: -0.0}


@pytest.mark.parametrize("variant", ["twin", "cache", *VECTOR_VARIANTS])
def test_numbers_beyond_half_are_cut_and_what_is_not_finite_stays(variant: str) -> None:
    shape = LayerShape(1, 3, 3)
    cache = PagedKVCache((shape,), 1, 4, torch.float16, CPU).layers[0]
    given = [*BEYOND, float("nan")]
    row, slots = torch.tensor([[0.0] * 3 + given]), torch.tensor([2])
    if variant == "cache":
        cache.write(slots, row[:, 3:6, None].transpose(1, 2), row[:, 6:, None].transpose(1, 2))
    elif variant == "twin":
        reference.head_norm_rope_write(row, None, None, slots, cache, HeadLayout(1))
    else:
        native.head_norm_rope_write(build(variant), row, None, slots, cache, HeadLayout(1))
    assert cache.joint[2, :5].tolist() == list(BEYOND.values())
    assert cache.joint[2, 5].isnan() and not cache.joint[[0, 1, 3]].any()
